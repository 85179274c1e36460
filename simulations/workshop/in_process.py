"""Trainings in this process: the simplest workshop, and the fastest for small models."""

from collections.abc import Mapping, Sequence

from federation.learning.data import LocalData
from federation.protocol.effects import Trained
from simulations.workshop.cohorts import ALONE, CohortRule
from simulations.workshop.grouped import Grouped
from simulations.workshop.job import Fulfil, Job, Trainer, fulfilment, one_by_one

TOGETHER = CohortRule()
"""How jobs are cut where they gain from being trained together."""

EACH = CohortRule(most=4)
"""How jobs are cut where each is trained as if alone, and only decoding is shared."""


def usual_rule(*, exact: bool, train: Trainer | None) -> CohortRule:
    """The rule where nobody says otherwise. Every workshop takes it, for the same bits."""
    if train is not None:
        return ALONE
    return EACH if exact else TOGETHER


class InProcess(Grouped):
    """Trains a cohort when the first of its results is asked for.

    Args:
        data: what each device holds; it may build an entry at each access.
        exact: the bits of `train_locally`, client by client; else within 1e-5 of it.
        train: in place of the usual training; called for each job by itself.
        rule: how jobs are cut into cohorts. With `exact` or `train` it decides no bit.
    """

    def __init__(
        self,
        data: Mapping[str, LocalData],
        *,
        exact: bool = False,
        train: Trainer | None = None,
        rule: CohortRule | None = None,
    ) -> None:
        fulfil = fulfilment(exact=exact) if train is None else one_by_one(train)
        super().__init__(_Here(data, fulfil), data, rule or usual_rule(exact=exact, train=train))


class _Here:
    """A bench in this process: nothing is trained before it is asked for."""

    def __init__(self, data: Mapping[str, LocalData], fulfil: Fulfil) -> None:
        self._data, self._fulfil = data, fulfil
        self._cohorts: dict[int, Sequence[Job]] = {}

    def start(self, number: int, cohort: Sequence[Job]) -> None:
        self._cohorts[number] = cohort

    def finish(self, number: int) -> list[Trained]:
        return train_cohort_of(self._cohorts.pop(number), self._data, self._fulfil)

    def cancel(self, number: int) -> None:
        self._cohorts.pop(number, None)

    def close(self) -> None:
        self._cohorts.clear()


def train_cohort_of(
    cohort: Sequence[Job], data: Mapping[str, LocalData], fulfil: Fulfil
) -> list[Trained]:
    """What comes of a cohort, in the order of its jobs."""
    return fulfil([(job.assignment, job.base, data[job.device], job.memory) for job in cohort])
