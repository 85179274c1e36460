"""Trainings in this process: the simplest workshop, and the fastest for small models."""

from collections.abc import Mapping, Sequence

from federation.learning.data import LocalData
from federation.protocol.effects import Trained
from simulations.workshop.cohorts import CohortRule
from simulations.workshop.grouped import Grouped
from simulations.workshop.job import Job, Trainer
from simulations.workshop.manner import Manner, manner_of


class InProcess(Grouped):
    """Trains a cohort when the first of its results is asked for.

    Args:
        data: what each device holds; it may build an entry at each access.
        exact: the bits of `train_locally`, client by client; else within 1e-5 of it.
        train: in place of the usual training; called for each job by itself.
        rule: how jobs are cut into cohorts. With `exact` or `train` it decides no bit.
        accelerator: "cpu", "cuda", or "auto": CUDA where torch finds it. What is trained there
            agrees with other workshops to 1e-5.
        in_place: updates stay as tensors: for a world that shares its memory with its devices,
            and keeps no journal.
    """

    def __init__(
        self,
        data: Mapping[str, LocalData],
        *,
        exact: bool = False,
        train: Trainer | None = None,
        rule: CohortRule | None = None,
        accelerator: str = "cpu",
        in_place: bool = False,
    ) -> None:
        manner = manner_of(
            exact=exact, train=train, rule=rule, accelerator=accelerator, in_place=in_place
        )
        super().__init__(_Here(data, manner), data, manner)


class _Here:
    """A bench in this process: nothing is trained before it is asked for."""

    def __init__(self, data: Mapping[str, LocalData], manner: Manner) -> None:
        self._data, self._manner = data, manner
        self._cohorts: dict[int, Sequence[Job]] = {}

    def start(self, number: int, cohort: Sequence[Job]) -> None:
        self._cohorts[number] = cohort

    def finish(self, number: int) -> list[Trained]:
        return self._manner.train(self._cohorts.pop(number), self._data)

    def cancel(self, number: int) -> None:
        self._cohorts.pop(number, None)

    def close(self) -> None:
        self._cohorts.clear()
