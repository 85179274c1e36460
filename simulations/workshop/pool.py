"""A bench with several workers: which cohort is whose, and what has come back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from federation.protocol.effects import Trained
from simulations.workshop.job import Job

AHEAD = 2
"""Cohorts a worker has at most: one in hand, and one more, so that it never waits for us."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a worker made of a cohort."""

    worker: int
    number: int
    results: list[Trained]


class Crew(Protocol):
    """Workers that train a cohort at a time, in the order in which they got them."""

    @property
    def workers(self) -> int:
        """How many there are; they are numbered from 0."""
        ...

    def give(self, worker: int, number: int, cohort: Sequence[Job]) -> None:
        """Hand a cohort to a worker."""
        ...

    def wait(self) -> list[Answer]:
        """Block until one answer or more are there.

        Raises:
            TrainingError: a worker has died, or could not do what it was given.
        """
        ...

    def close(self) -> None:
        """End all workers, in the middle of a training too."""
        ...


class Pool:
    """A bench whose cohorts go to the workers of a crew, first come, first served."""

    def __init__(self, crew: Crew) -> None:
        self._crew = crew
        self._queue: dict[int, Sequence[Job]] = {}
        self._load = [0] * crew.workers
        self._done: dict[int, list[Trained]] = {}
        self._given: set[int] = set()

    def start(self, number: int, cohort: Sequence[Job]) -> None:
        """Queue a cohort, and hand it out where a worker is free."""
        self._queue[number] = cohort
        self._hand_out()

    def finish(self, number: int) -> list[Trained]:
        """What came of a cohort.

        Raises:
            TrainingError: a worker has died, or could not do what it was given.
        """
        while number not in self._done:
            for answer in self._crew.wait():
                self._load[answer.worker] -= 1
                if answer.number in self._given:
                    self._given.remove(answer.number)
                    self._done[answer.number] = answer.results
            self._hand_out()
        return self._done.pop(number)

    def cancel(self, number: int) -> None:
        """Forget a cohort; a worker that has it already trains it for nobody."""
        self._queue.pop(number, None)
        self._done.pop(number, None)
        self._given.discard(number)

    def close(self) -> None:
        """End all workers."""
        self._crew.close()

    def _hand_out(self) -> None:
        while self._queue and (load := min(self._load)) < AHEAD:
            worker = self._load.index(load)
            number = next(iter(self._queue))
            self._crew.give(worker, number, self._queue.pop(number))
            self._given.add(number)
            self._load[worker] += 1
