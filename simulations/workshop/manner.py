"""How cohorts are trained and cut: what every workshop of one run has in common."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

from federation.learning.data import LocalData
from federation.learning.fulfilment import fulfil_all
from federation.protocol.effects import Trained
from federation.protocol.messages import Assignment
from simulations.workshop.cohorts import ALONE, CohortRule
from simulations.workshop.job import Job, Trainer

Ask: TypeAlias = tuple[Assignment, bytes, LocalData, bytes]
"""What a `Trainer` is called with."""

Fulfil: TypeAlias = Callable[[Sequence[Ask]], list[Trained]]
"""Does what many assignments ask for; the results in the order of the asks."""

TOGETHER = CohortRule()
"""How jobs are cut where they gain from being trained together."""

EACH = CohortRule(most=4)
"""How jobs are cut where each is trained as if alone, and only decoding is shared."""


WIDE = CohortRule(most=2048, macs=math.inf)
"""How jobs are cut for an accelerator, which is idle unless it has many at once."""


@dataclass(frozen=True, slots=True)
class Manner:
    """How a cohort is trained, how jobs are cut into cohorts, and what that says of the bits."""

    fulfil: Fulfil
    rule: CohortRule
    bits: str

    def train(self, cohort: Sequence[Job], data: Mapping[str, LocalData]) -> list[Trained]:
        """What comes of a cohort, in the order of its jobs."""
        return self.fulfil(
            [(job.assignment, job.base, data[job.device], job.memory) for job in cohort]
        )


def manner_of(
    *,
    exact: bool,
    train: Trainer | None,
    rule: CohortRule | None,
    accelerator: str = "cpu",
    in_place: bool = False,
) -> Manner:
    """The manner of a workshop.

    Args:
        exact: the bits of `train_locally`, client by client; else within 1e-5 of it.
        train: in place of the usual training; called for each job by itself.
        rule: how jobs are cut into cohorts (none: as is quickest). With `exact` or `train` it
            decides no bit.
        accelerator: "cpu", "cuda", or "auto": CUDA where torch finds it.
        in_place: updates stay in this process, as tensors.
    """
    if train is not None:
        return Manner(one_by_one(train), rule or ALONE, "each by itself")
    if exact:
        alone = partial(fulfil_all, exact=True, accelerator="cpu", in_place=in_place)
        return Manner(alone, rule or EACH, "exactly")
    device = _resolved(accelerator)
    usual = TOGETHER if device == "cpu" else WIDE
    together = partial(fulfil_all, accelerator=device, in_place=in_place)
    return Manner(together, rule or usual, f"together on {device}")


def _resolved(accelerator: str) -> str:
    if accelerator != "auto":
        return accelerator
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def one_by_one(train: Trainer) -> Fulfil:
    """Does many assignments by doing each."""

    def fulfil_each(asks: Sequence[Ask]) -> list[Trained]:
        return [train(*ask) for ask in asks]

    return fulfil_each
