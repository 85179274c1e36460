"""Runs drivers as processes of their own, and accounts for all that they start."""

import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import psutil

from benchmarks.claims import ROOT, Options
from benchmarks.environments import Environment, find_environment, make_environment
from benchmarks.fleet import ONE_THREAD
from benchmarks.processes import MIB, tree
from benchmarks.simulation_peers.marks import HARNESS, Marks, read_marks
from benchmarks.simulation_peers.work import Work
from federation.errors import HeadwaterError

SAMPLE_S = 0.25
"""How often memory is looked at."""

_QUIET = {
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


@dataclass(frozen=True, slots=True)
class Driver:
    """What can do a work: its name in claims, its module, and the Python that runs it.

    With `uses_torchrun` several processes are started by torchrun. `actors` is the least number
    of worker processes it gets, since some are best with more than one. One that `is_slow` does
    fewer rounds.
    """

    name: str
    module: str
    python: Path
    uses_torchrun: bool = False
    actors: int = 1
    is_slow: bool = False

    def command(self, work: Work, *files: Path) -> list[str]:
        """The command that does a work and leaves its marks."""
        package = ["-m", "benchmarks.simulation_peers", self.module, *map(str, files)]
        if self.uses_torchrun and work.processes > 1:
            launch = ["-m", "torch.distributed.run", "--standalone"]
            package = [*launch, f"--nproc-per-node={work.processes}", *package]
        return [str(self.python), *package]


@dataclass(slots=True)
class Outcome:
    """What a driver's runs of one work came to; a run's first round counts as its start-up.

    `seconds` are wall seconds of rounds; `cpu_s` a run's CPU seconds a round and `start_cpu_s`
    those up to its first round's end, of all its processes; `peak_mb` is a run's resident memory
    in MiB, that of all its processes together. `marks` are the last run's.
    """

    seconds: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    start_s: list[float] = field(default_factory=list)
    start_cpu_s: list[float] = field(default_factory=list)
    peak_mb: list[float] = field(default_factory=list)
    marks: Marks | None = None

    def add(self, marks: Marks, peak_mb: float) -> None:
        """Take a run in."""
        rounds = marks.cpu_rounds[-1] - marks.cpu_rounds[0]
        self.seconds += [later - earlier for earlier, later in pairwise(marks.ends)]
        self.cpu_s.append((marks.cpu_s[-1] - marks.cpu_s[0]) / rounds)
        self.start_s.append(marks.ends[0])
        self.start_cpu_s.append(marks.cpu_s[0])
        self.peak_mb.append(peak_mb)
        self.marks = marks

    @property
    def median_s(self) -> float:
        """The median of all rounds, in wall seconds."""
        return statistics.median(self.seconds)

    @property
    def median_cpu_s(self) -> float:
        """The median of the runs' CPU seconds a round."""
        return statistics.median(self.cpu_s)


def headwater() -> Driver:
    """Headwater, in the environment that runs now."""
    return Driver("Headwater", "headwater", Path(sys.executable))


def bare_loop() -> Driver:
    """The plain loop over torch, in the environment that runs now."""
    return Driver("bare loop", "bare", Path(sys.executable))


def pfl_research(options: Options) -> Driver | None:
    """pfl-research in its own environment; None: left out, as told."""
    made = _environment(options, "pfl", ["pfl[pytorch]>=0.6,<0.7"])
    if made is None:
        return None
    name = f"pfl {made.version('pfl')}"
    return Driver(name, "pfl_research", made.python, uses_torchrun=True)


def flower(options: Options) -> Driver | None:
    """Flower's simulation in its own environment; None: left out, as told.

    Two actors are its best on two cores, so that is what it gets where one process is asked for.
    """
    made = _environment(options, "flwr-simulation", ["flwr[simulation]>=1.41,<2"])
    if made is None:
        return None
    return Driver(f"Flower {made.version('flwr')}", "flower", made.python, actors=2, is_slow=True)


def perform(driver: Driver, work: Work, folder: Path, *, patience_s: float) -> tuple[Marks, float]:
    """Let a driver do a work: its marks, and the most memory that was seen, in MiB.

    The marks' ends begin at 0 when the process was started.

    Raises:
        HeadwaterError: it failed, took longer, or fewer updates counted than were asked for.
    """
    files = folder / "work.json", folder / "marks.json"
    work.save(files[0])
    files[1].unlink(missing_ok=True)
    began = time.monotonic()
    with _running(driver.command(work, *files), folder / f"{driver.module}.log") as process:
        peak_mb = _watch(process, began + patience_s)
    if process.returncode != 0 or not files[1].exists():
        raise HeadwaterError(
            f"{driver.name} failed at {work.task} (exit code {process.returncode}, patience "
            f"{patience_s:g} s); it said: {_last_words(folder / f'{driver.module}.log')}"
        )
    marks = read_marks(files[1])
    marks.ends = [end - began for end in marks.ends]
    if len(marks.ends) != work.rounds or marks.updates < work.least_updates:
        raise HeadwaterError(
            f"{driver.name} did {len(marks.ends)} rounds with {marks.updates} updates of "
            f"{work.task}; expected {work.rounds} with {work.per_round} each: its figures would "
            "not compare"
        )
    return marks, peak_mb


def import_torch(driver: Driver) -> tuple[float, float]:
    """Wall and CPU seconds that a process takes in which torch is imported and nothing else."""
    code = "import torch, time; print(time.process_time())"
    began = time.monotonic()
    done = subprocess.run(
        [str(driver.python), "-c", code], check=True, capture_output=True, env=_variables()
    )
    return time.monotonic() - began, float(done.stdout)


def _environment(options: Options, name: str, requirements: Sequence[str]) -> Environment | None:
    if options.is_quick:
        found = find_environment(name)
        if found is None:
            options.tell(f"{name} is left out: --quick uses it only once a full run installed it")
        return found
    constraints = ["--constraint", str(ROOT / "constraints.txt")]
    try:
        options.tell(f"the environment {name} is made, unless it is there")
        wanted = [*constraints, "torch", *requirements, "psutil>=7"]
        return make_environment(name, wanted, afresh=False)
    except HeadwaterError as error:
        options.tell(f"{name} is left out: {error}")
        return None


def _variables() -> dict[str, str]:
    own = {"PYTHONPATH": str(ROOT), HARNESS: str(os.getpid())}
    return {**os.environ, **ONE_THREAD, "MKL_NUM_THREADS": "1", **_QUIET, **own}


@contextmanager
def _running(command: list[str], log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A process of its own session; what it leaves behind is ended with it."""
    with log.open("wb") as said:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            env=_variables(),
            start_new_session=True,
        )
        try:
            yield process
        finally:
            left = tree([process.pid])
            for each in left:
                with suppress(psutil.Error):
                    each.send_signal(signal.SIGKILL)
            process.wait()
            psutil.wait_procs(left, timeout=10)


def _watch(process: "subprocess.Popen[bytes]", until: float) -> float:
    """Wait for the end of a process, or until then: the most memory it had, in MiB."""
    peak_mb = 0.0
    while process.poll() is None and time.monotonic() < until:
        rss = 0
        for each in tree([process.pid]):
            with suppress(psutil.Error):
                rss += each.memory_info().rss
        peak_mb = max(peak_mb, rss / MIB)
        with suppress(subprocess.TimeoutExpired):
            process.wait(SAMPLE_S)
    return peak_mb


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    return " | ".join([line for line in lines if line][-5:])
