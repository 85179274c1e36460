"""What is asked: a run, what would be different, and how many futures to look at."""

from pathlib import Path

import msgspec

from cloud.config import RunPlan
from federation.errors import ConfigError

MAX_FUTURES = 100_000


class Change(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How some devices would differ: factors on what their twins know, 1 for no change.

    `devices` names them (empty: all). `up` and `down` multiply goodput, `compute` the speed of
    training, `delay` the way of a letter.
    """

    devices: tuple[str, ...] = ()
    up: float = 1.0
    down: float = 1.0
    compute: float = 1.0
    delay: float = 1.0

    def __post_init__(self) -> None:
        for name in ("up", "down", "compute", "delay"):
            value = getattr(self, name)
            if not 1e-6 <= value <= 1e6:
                raise ConfigError(
                    f"change.{name} is {value}; expected a factor from 1e-6 to 1e6: correct it"
                )


class WhatIf(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A question: this run, with devices as their twins are, but for these changes.

    `without` names devices that are not there; `copies` is how many there are of each of the
    others. `at` is when the run would begin, in seconds since 1970 (none: when the question is
    asked); it decides the hours of availability. `seed` decides the futures. A run that
    chooses devices by their twins, or that has students, cannot be asked about.
    """

    run: RunPlan
    change: tuple[Change, ...] = ()
    without: tuple[str, ...] = ()
    copies: int = 1
    futures: int = 100
    at: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.futures <= MAX_FUTURES:
            raise ConfigError(f"futures is {self.futures}; expected 1 to {MAX_FUTURES}: correct it")
        if not 1 <= self.copies <= 10_000:
            raise ConfigError(f"copies is {self.copies}; expected 1 to 10000: correct it")
        run = self.run
        if run.selection != "uniform":
            raise ConfigError(
                f"run.selection is {run.selection!r}; futures draw devices by chance: leave it out"
            )
        if run.mirror or run.teaching or run.students or run.at_twin:
            raise ConfigError(
                "the run mirrors data or teaches students; futures are of runs of one model: "
                "ask about such a one"
            )


def named(question: WhatIf) -> set[str]:
    """All devices that a question names."""
    return set(question.without).union(*(change.devices for change in question.change))


def read_paths(question: WhatIf, folder: Path) -> WhatIf:
    """The same question; what a run would be measured on is left out, for nothing is measured."""
    del folder
    run = msgspec.structs.replace(question.run, evaluation=None)
    return msgspec.structs.replace(question, run=run)
