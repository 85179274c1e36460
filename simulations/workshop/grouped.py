"""The front of every workshop: which jobs wait, which cohort each went into, what came of it."""

from collections.abc import Mapping

from federation.errors import TrainingError
from federation.learning.data import LocalData
from federation.protocol.effects import Trained
from simulations.workshop.cohorts import cut
from simulations.workshop.job import Bench, Job
from simulations.workshop.manner import Manner


class Grouped:
    """Collects jobs until a result is asked for that is not there; then all of them start.

    What waits at that moment follows from the simulation's virtual time alone, and the rule
    cuts it into cohorts by nothing else. So the same run gives the same cohorts, and the same
    bits, on every bench.
    """

    def __init__(self, bench: Bench, data: Mapping[str, LocalData], manner: Manner) -> None:
        self.bench, self.data, self.manner = bench, data, manner
        self._waiting: dict[str, Job] = {}
        self._started: dict[str, int] = {}
        self._wanted: dict[int, dict[str, int]] = {}
        self._done: dict[str, Trained] = {}
        self._number = 0

    def begin(self, job: Job) -> None:
        """Take a job. One of the same attempt that was dropped or never asked for goes."""
        attempt = job.assignment.attempt
        self.drop(attempt)
        self._waiting[attempt] = job

    def result(self, attempt: str) -> Trained:
        """What came of a job, which is then forgotten.

        Raises:
            TrainingError: no such job has begun, or it was asked for already; or the bench
                cannot go on.
        """
        if attempt in self._waiting:
            self._start_all()
        if attempt in self._started:
            self._finish(self._started[attempt])
        try:
            return self._done.pop(attempt)
        except KeyError:
            raise TrainingError(
                f"no training of {attempt!r} has begun; begin it before its result is asked "
                "for, and ask once"
            ) from None

    def drop(self, attempt: str) -> None:
        """The job is not wanted. In a cohort that has started it is trained for the others."""
        if self._waiting.pop(attempt, None) is not None:
            return
        self._done.pop(attempt, None)
        number = self._started.pop(attempt, None)
        if number is not None:
            wanted = self._wanted[number]
            del wanted[attempt]
            if not wanted:
                del self._wanted[number]
                self.bench.cancel(number)

    def close(self) -> None:
        """Close the bench."""
        self.bench.close()

    def __enter__(self) -> "Grouped":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start_all(self) -> None:
        jobs, self._waiting = list(self._waiting.values()), {}
        for cohort in cut(jobs, self.data, self.manner.rule):
            self._number += 1
            attempts = {job.assignment.attempt: place for place, job in enumerate(cohort)}
            self._wanted[self._number] = attempts
            self._started.update(dict.fromkeys(attempts, self._number))
            self.bench.start(self._number, cohort)

    def _finish(self, number: int) -> None:
        results = self.bench.finish(number)
        for attempt, place in self._wanted.pop(number).items():
            del self._started[attempt]
            self._done[attempt] = results[place]
