"""A device's own place in the workshop: one job at a time, which may begin ahead of the device.

What a training gives does not depend on when it is done. Once an assignment with its base is on
its way, the job may wait in the workshop together with those of the round's other devices, so
that they are trained as one cohort, however long their letters take.
"""

from federation.protocol.effects import Trained
from federation.protocol.messages import Assignment
from simulations.workshop.job import Job, Workshop


class JobSlot:
    """Begins, ends and drops the jobs of one device."""

    __slots__ = ("_device", "_expected", "_place", "_workshop")

    def __init__(self, workshop: Workshop, place: int, device: str) -> None:
        self._workshop, self._place, self._device = workshop, place, device
        self._expected: tuple[str, bytes] | None = None

    def expect(self, assignment: Assignment, base: bytes, memory: bytes) -> None:
        """A training will most likely begin: it may be done with others'."""
        self.forget()
        self._expected = (assignment.attempt, memory)
        self._workshop.begin(Job(self._place, self._device, assignment, base, memory))

    def begin(self, assignment: Assignment, base: bytes, memory: bytes) -> None:
        """A training begins, as it was expected or not."""
        if self._expected != (assignment.attempt, memory):
            self.forget()
            self._workshop.begin(Job(self._place, self._device, assignment, base, memory))
        self._expected = None

    def result(self, attempt: str) -> Trained:
        """What came of the training that has begun."""
        return self._workshop.result(attempt)

    def drop(self, attempt: str) -> None:
        """The training that has begun is not wanted any more."""
        self._workshop.drop(attempt)

    def forget(self) -> None:
        """What was expected will not come."""
        if self._expected is not None:
            self._workshop.drop(self._expected[0])
            self._expected = None
