"""What a driver notes at the end of each round, for `harness` to read when it is over."""

import json
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

HARNESS = "HEADWATER_BENCHMARK_PID"
"""The environment variable with the process that started the driver."""


@dataclass(slots=True)
class Marks:
    """The ends of rounds, in seconds of the machine's monotonic clock.

    `cpu_s` are CPU seconds of the driver with all its processes, since each began, after the
    rounds `cpu_rounds` (the first and the last). `rss_mb` is the driver's own resident memory, in
    MiB, every `rss_every` rounds. `updates` counts what was aggregated in all rounds.
    """

    rounds: int
    rss_every: int = 100
    ends: list[float] = field(default_factory=list)
    cpu_rounds: list[int] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    rss_mb: list[float] = field(default_factory=list)
    updates: int = 0
    accuracy: float = 0.0

    def mark(self, updates: int, accuracy: float) -> None:
        """A round is over: it came to so many updates and this accuracy."""
        self.ends.append(time.monotonic())
        self.updates += updates
        self.accuracy = accuracy
        number = len(self.ends)
        if number in (1, self.rounds):
            self.cpu_rounds.append(number)
            self.cpu_s.append(_cpu_s(_root()))
        if number % self.rss_every == 0:
            self.rss_mb.append(psutil.Process().memory_info().rss / 2**20)

    def save(self, path: str | Path) -> None:
        """Write them down."""
        Path(path).write_text(json.dumps(asdict(self)))


def read_marks(path: Path) -> Marks:
    """The marks in this file."""
    return Marks(**json.loads(path.read_text()))


def _root() -> psutil.Process:
    """The process that the harness started: the driver itself, or what launched it."""
    harness = int(os.environ.get(HARNESS, "0"))
    process = psutil.Process()
    while process.ppid() != harness and (parent := process.parent()) is not None and harness:
        process = parent
    return process


def _cpu_s(root: psutil.Process) -> float:
    total = 0.0
    for process in (root, *root.children(recursive=True)):
        with suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total
