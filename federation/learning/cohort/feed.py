"""The batches of members side by side: those of `training.batches`, laid out in advance."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from federation.learning.cohort.shuffling import Shuffles
from federation.learning.cohort.task import Member

LAID_OUT_BYTES = 1 << 25
"""So much is laid out at once, or one step where that is more."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One step of A members: samples (A, B, entries), labels (A, B), shares (A, B), sizes (A,).

    `indices`, (A, B), say which of a member's samples these are.

    A member with fewer than B samples in this step is filled up with one of its own, whose share
    in the mean is 0.
    """

    x: Tensor
    labels: Tensor
    shares: Tensor
    sizes: Tensor
    indices: Tensor


class Feed:
    """Gives the steps of a group in order; members that are done leave from the end.

    Its memory is used again for the next group.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._room: dict[str, NDArray[Any]] = {}

    def open(self, members: Sequence[Member]) -> None:
        """Begin with the first step of these members, those with the most steps first."""
        plan = members[0].task.plan
        self._members = members
        self._done = 0
        seeds = [member.task.plan.seed for member in members]
        epochs = max(
            math.ceil(member.steps / math.ceil(member.samples / plan.batch_size))
            for member in members
        )
        self._shuffles = Shuffles(seeds, epochs)
        self._x = [member.task.data.x.reshape(member.samples, -1) for member in members]
        self.width = min(plan.batch_size, max(member.samples for member in members))
        entries = self._x[0].shape[1]
        bytes_each = 4 * len(members) * self.width * entries
        self._steps = min(max(1, LAID_OUT_BYTES // max(1, bytes_each)), members[0].steps)
        shape = (len(members), self._steps, self.width)
        self._samples = self._array("samples", (*shape, entries), np.float32)
        self._labels = self._array("labels", shape, np.int64)
        self._index = self._array("index", shape, np.intp)
        self._sizes = self._array("sizes", shape[:2], np.int64)

    def _array(self, name: str, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        size = math.prod(shape)
        if name not in self._room or self._room[name].size < size:
            self._room[name] = np.empty(size, dtype)
        return self._room[name][:size].reshape(shape)

    def steps(self, active: int, count: int) -> Iterator[Batch]:
        """The next so many steps of the first `active` members."""
        for start in range(0, count, self._steps):
            yield from self._chunk(active, min(self._steps, count - start))

    def _chunk(self, active: int, count: int) -> Iterator[Batch]:
        for row in range(active):
            self._lay_out(row, count)
        self._done += count
        sizes = torch.from_numpy(self._sizes[:active, :count].copy()).to(self._device)
        widths = self._sizes[:active, :count].max(0).tolist()
        within = torch.arange(self.width, device=self._device) < sizes[..., None]
        shares = within / sizes[..., None]
        x = torch.from_numpy(self._samples[:active, :count]).to(self._device)
        labels = torch.from_numpy(self._labels[:active, :count]).to(self._device)
        indices = torch.from_numpy(self._index[:active, :count]).to(self._device)
        for step, width in enumerate(widths):
            yield Batch(
                x[:, step, :width],
                labels[:, step, :width],
                shares[:, step, :width],
                sizes[:, step],
                indices[:, step, :width],
            )

    def _lay_out(self, row: int, count: int) -> None:
        member = self._members[row]
        batch, index, sizes = member.task.plan.batch_size, self._index[row], self._sizes[row]
        each, start = math.ceil(member.samples / batch), 0
        while start < count:
            epoch, place = divmod(self._done + start, each)
            stop = min(count, start + each - place)
            order = self._shuffles.order(row, member.samples, epoch)
            chosen = order[place * batch : (place + stop - start) * batch]
            # Where a batch is larger than any member's data, an epoch is one step: so here too
            # one sample follows the other.
            room = index[start:stop].reshape(-1)
            room[: len(chosen)] = chosen
            room[len(chosen) :] = order[0]
            sizes[start:stop] = batch
            sizes[stop - 1] = len(chosen) - (stop - start - 1) * batch
            start = stop
        # With mode "raise" NumPy would go through a buffer; these indices are in range.
        np.take(self._x[row], index[:count], axis=0, out=self._samples[row, :count], mode="clip")
        np.take(member.task.data.y, index[:count], out=self._labels[row, :count], mode="clip")
