"""What a simulated training is, and what any place that does trainings must offer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from federation.learning.data import LocalData
from federation.protocol.effects import Trained
from federation.protocol.messages import Assignment

Trainer: TypeAlias = Callable[[Assignment, bytes, LocalData, bytes], Trained]
"""Does what one assignment asks for: `edge_agent.trainer.fulfil`."""


@dataclass(frozen=True, slots=True)
class Job:
    """One training to be done.

    `place` is the device's index in the fleet's order, `assignment.attempt` the job's name.
    Jobs of one round hold the same `base` object. `memory` is what the device's last training
    of the same run left (empty: nothing).
    """

    place: int
    device: str
    assignment: Assignment
    base: bytes
    memory: bytes = b""


class Workshop(Protocol):
    """Where simulated trainings are done."""

    def begin(self, job: Job) -> None:
        """Take a job; its training may begin at any time from now on."""
        ...

    def result(self, attempt: str) -> Trained:
        """What came of a job that has begun; blocks until it is there, and then forgets it."""
        ...

    def drop(self, attempt: str) -> None:
        """The job's device died: its result is not wanted any more. Unknown jobs are no error."""
        ...

    def close(self) -> None:
        """End what was started; nothing is asked for afterwards."""
        ...


class Bench(Protocol):
    """Where cohorts, jobs that are trained together, are trained."""

    def start(self, number: int, cohort: Sequence[Job]) -> None:
        """Take a cohort under a number that was not used before; does not block."""
        ...

    def finish(self, number: int) -> list[Trained]:
        """What came of a cohort, in the order of its jobs; blocks, and then forgets it."""
        ...

    def cancel(self, number: int) -> None:
        """A cohort is not wanted any more; one that is being trained may be left to end."""
        ...

    def close(self) -> None:
        """End what was started."""
        ...
