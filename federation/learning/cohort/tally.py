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
        shape = len(self._steps), 3, len(self._members)
        table = np.zeros(shape)
        for step, told in enumerate(self._steps):
            table[step, :, : told.shape[1]] = told.cpu().numpy()
        losses, right, sizes = table.transpose(1, 0, 2)
        is_bad = np.any(~np.isfinite(losses), axis=0)
        with np.errstate(invalid="ignore", over="ignore"):
            sums = (losses * sizes).sum(0), right.sum(0), sizes.sum(0)
        each_s = seconds / max(1, sum(member.steps for member in self._members))
        columns = zip(
            self._members, *(total.tolist() for total in sums), is_bad.tolist(), strict=True
        )
        return [
            _failure(member, losses[:, row])
            if failed
            else Report(
                samples=member.samples,
                steps=member.steps,
                loss_sum=loss * member.samples / seen,
                correct=round(hits * member.samples / seen),
                seconds=each_s * member.steps,
            )
            for row, (member, loss, hits, seen, failed) in enumerate(columns)
        ]


def _failure(member: Member, losses: NDArray[np.float64]) -> TrainingError:
    """What `train_locally` says of the first loss that is not finite."""
    step = int(np.argmin(np.isfinite(losses)))
    try:
        check_loss(float(losses[step]), step + 1, member.steps)
    except TrainingError as error:
        return error
    raise ValueError("all losses are finite")
