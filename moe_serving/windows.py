"""Batches of sensor windows by size or deadline: whichever is there first ends the wait."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from moe_serving.models.classifier import WindowClassifier
from moe_serving.requests import Classified, Classify, Ending, RefusedError, Ticket, Work

_HASTE = 3.0
"""A request is not kept waiting when its deadline is nearer than this many waits."""


class WindowBatches:
    """The batcher of classifiers: at most `windows` a batch, of whoever waits.

    Where fewer wait, the oldest is kept for `wait_s` for others to come, unless a deadline is near.
    """

    def __init__(self, model: WindowClassifier, *, windows: int, wait_s: float) -> None:
        self._model = model
        self._windows = windows
        self._wait_s = wait_s
        self._joined: dict[Ticket, Classify] = {}
        self._held = 0

    def check(self, work: Work) -> None:
        """Refuse another shape, too many windows at once, and numbers that are not finite."""
        config = self._model.config
        if not isinstance(work, Classify):
            raise RefusedError("invalid", "this model takes windows, not a prompt")
        shape = work.x_BLC.shape
        if len(shape) != 3 or shape[1:] != (config.window_length, config.n_channels):
            raise RefusedError(
                "invalid",
                f"windows of shape {list(shape)}; expected [windows, {config.window_length}, "
                f"{config.n_channels}]: one row a sample, one column a channel",
                pointer="inputs[0].shape",
            )
        if not 1 <= shape[0] <= self._windows:
            raise RefusedError(
                "invalid",
                f"{shape[0]} windows; between 1 and {self._windows} are taken at once: "
                "split the request",
                pointer="inputs[0].shape",
            )
        if not np.isfinite(work.x_BLC).all():
            raise RefusedError(
                "invalid",
                "the windows hold NaN or infinity: fill or leave out what was not measured",
                pointer="inputs[0].data",
            )

    @property
    def running(self) -> Sequence[Ticket]:
        """Those of the next batch."""
        return list(self._joined)

    def left_tokens(self) -> int:
        """The windows of the next batch."""
        return self._held

    def patience_s(self, waiting: int, waited_s: float, left_s: float) -> float:
        """The rest of the wait, while the batch is not full and no deadline is near."""
        if waiting >= self._windows:
            return 0.0
        return max(0.0, min(self._wait_s - waited_s, left_s - _HASTE * self._wait_s))

    def has_room(self, ticket: Ticket) -> bool:
        """Whether the batch can hold its windows as well."""
        return self._held + ticket.cost <= self._windows

    def join(self, ticket: Ticket) -> None:
        """Take its windows into the batch."""
        if not isinstance(ticket.work, Classify):
            raise TypeError("a ticket was not checked before it joined")
        self._joined[ticket] = ticket.work
        self._held += ticket.cost

    def leave(self, ticket: Ticket) -> None:
        """Take its windows out."""
        if self._joined.pop(ticket, None) is not None:
            self._held -= ticket.cost

    def step(self, now: float) -> tuple[int, list[tuple[Ticket, Ending]]]:
        """Run the model once on all windows together."""
        x_BLC = np.concatenate([work.x_BLC for work in self._joined.values()])
        with torch.inference_mode():
            logits_BK = self._model(torch.from_numpy(x_BLC).to(self._model.head.weight))
        found = logits_BK.float().cpu().numpy()
        batch, rows = self._joined, self._held
        self._joined, self._held = {}, 0
        begin, ended = 0, []
        for ticket in batch:
            part = found[begin : begin + ticket.cost]
            begin += ticket.cost
            ticket.first_at = now
            ended.append((ticket, _ending(part)))
        return rows, ended


def _ending(logits_BK: npt.NDArray[np.float32]) -> Ending:
    if not np.isfinite(logits_BK).all():
        return Ending("failed", reason="the model gave numbers that are not finite")
    return Ending("ok", Classified(logits_BK))
