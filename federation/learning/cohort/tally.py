"""What the steps of members side by side come to, in numbers."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from federation.errors import TrainingError
from federation.learning.cohort.feed import Batch
from federation.learning.cohort.task import Member
from federation.learning.training import check_loss
from federation.protocol.messages import Report


class Tally:
    """Keeps what each step says where it was computed, and looks at it when all are done."""

    def __init__(self, members: Sequence[Member]) -> None:
        self._members = members
        self._steps: list[Tensor] = []

    def add(self, batch: Batch, losses: Tensor, right: Tensor) -> None:
        """Note a step of the first A members: losses and how many were right, each (A,)."""
        self._steps.append(torch.stack((losses, right.to(losses.dtype), batch.sizes)))

    def reports(self, seconds: float) -> list[Report | TrainingError]:
        """What each member did and saw, the seconds shared out by steps; or why it failed."""
        table = np.zeros((len(self._steps), 3, len(self._members)))
        for step, told in enumerate(self._steps):
            table[step, :, : told.shape[1]] = told.cpu().numpy()
        each = seconds / max(1, sum(member.steps for member in self._members))
        return [
            self._report(member, table[: member.steps, :, row], each)
            for row, member in enumerate(self._members)
        ]

    def _report(
        self, member: Member, told: NDArray[np.float64], seconds: float
    ) -> Report | TrainingError:
        losses, right, sizes = told.T
        if not np.isfinite(losses).all():
            step = int(np.argmin(np.isfinite(losses)))
            try:
                check_loss(float(losses[step]), step + 1, member.steps)
            except TrainingError as error:
                return error
        scale = member.samples / sizes.sum()
        return Report(
            samples=member.samples,
            steps=member.steps,
            loss_sum=float(losses @ sizes * scale),
            correct=round(float(right.sum() * scale)),
            seconds=seconds * member.steps,
        )
