"""Plasticity: how much what a module says still changes; and when it has said enough."""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Mode = Literal["settled", "signed", "absolute"]

FIRST_SLOPES = 3
"""The tolerance is set by so many slopes (Egeria, section 4.2)."""


def plasticity(trained: Tensor, reference: Tensor) -> float:
    """The similarity-preserving loss between what two models say of one batch, 0 to 4 / B.

    Egeria (arXiv:2201.06227), section 4.1, after Tung & Mori (arXiv:1907.09682), Eq. 4: the
    Gram matrices of the samples, rows normalised, are compared: ||G_T - G_R||^2 / B^2.

    Args:
        trained: activations (B, ...) of the model in training.
        reference: those of the reference for the same samples.
    """
    difference = _similarities(trained) - _similarities(reference)
    return float(difference.square().sum()) / len(trained) ** 2


def _similarities(activations: Tensor) -> Tensor:
    flat = activations.float().flatten(1)
    return torch.nn.functional.normalize(flat @ flat.T, dim=1)


def slope(values: tuple[float, ...]) -> float:
    """The slope of the least-squares line through values at 0, 1, 2...; 0 of fewer than two."""
    if len(values) < 2:
        return 0.0
    at = np.arange(len(values)) - (len(values) - 1) / 2
    return float(at @ np.array(values) / (at @ at))


@dataclass(frozen=True, slots=True)
class Rule:
    """When a module has stopped changing.

    `signed` and `absolute` are Egeria's Algorithm 1: readings are averaged over the last
    `window`; the slope of the line through the last `window` averages is *stale* when it (or its
    absolute value) is at most `tolerance` of the largest of the module's first three slopes;
    `window` stale readings in a row freeze. The algorithm compares the slope with its sign, so a
    plasticity that falls steeply counts as stale; its text calls a slope of zero "no change".

    `settled` departs from the paper: the average itself is compared, not its slope. A module
    whose plasticity is constant moves as far in each window as in the one before; it has not
    arrived. It is stale when the average is at most a share of the largest it ever had, and
    `patience` stale readings in a row freeze. The share is `share` for the front module and
    falls evenly to 0 for the last: the further back, the more of the answer is still made there.
    `first` is the share of the training before which the front module does not freeze, and those
    behind it at even distances up to the end: what moves little at a high rate is not yet right.
    """

    mode: Mode = "settled"
    window: int = 10
    tolerance: float = 0.2
    share: float = 0.3
    patience: int = 2
    first: float = 0.4

    @property
    def needed(self) -> int:
        """So many stale readings in a row freeze."""
        return self.patience if self.mode == "settled" else self.window

    def halved(self) -> "Rule":
        """The rule after an unfreezing: its window is half as long."""
        return replace(self, window=max(2, self.window // 2))


@dataclass(frozen=True, slots=True)
class History:
    """What the readings of one module came to, newest last."""

    readings: tuple[float, ...] = ()
    averages: tuple[float, ...] = ()
    first_slopes: tuple[float, ...] = ()
    peak: float = 0.0
    stale: int = 0

    def after(self, reading: float, rule: Rule) -> "History":
        """The history with one more reading."""
        readings = (*self.readings, reading)[-rule.window :]
        average = sum(readings) / len(readings)
        averages = (*self.averages, average)[-rule.window :]
        found = replace(self, readings=readings, averages=averages)
        if rule.mode == "settled":
            return _compared(found, rule)
        return _sloped(found, rule)

    def has_stopped(self, rule: Rule) -> bool:
        """Whether the module may freeze."""
        return self.stale >= rule.needed


def _compared(found: History, rule: Rule) -> History:
    if len(found.readings) < rule.window:
        return found
    peak = max(found.peak, found.averages[-1])
    is_stale = found.averages[-1] <= rule.share * peak
    return replace(found, peak=peak, stale=found.stale + 1 if is_stale else 0)


def _sloped(found: History, rule: Rule) -> History:
    if len(found.averages) < 2:
        return found
    steepness = slope(found.averages)
    if len(found.first_slopes) < FIRST_SLOPES:
        return replace(found, first_slopes=(*found.first_slopes, abs(steepness)))
    bound = rule.tolerance * max(found.first_slopes)
    is_stale = (steepness if rule.mode == "signed" else abs(steepness)) <= bound
    return replace(found, stale=found.stale + 1 if is_stale else 0)


@dataclass(frozen=True, slots=True)
class Front:
    """How far a model is frozen: its first `front` modules of `modules`. The last never is.

    `histories` has a place for each module; `frozen_at` is the learning rate when the frontmost
    of them froze (0: none has).
    """

    modules: int
    rule: Rule
    front: int = 0
    histories: tuple[History, ...] = ()
    frozen_at: float = 0.0

    def __post_init__(self) -> None:
        if not self.histories:
            object.__setattr__(self, "histories", (History(),) * self.modules)

    @property
    def watched(self) -> range:
        """The modules whose plasticity is read: the frontmost active one, or (settled) all."""
        last = self.modules - 1
        if self.rule.mode == "settled":
            return range(self.front, last)
        return range(self.front, min(self.front + 1, last))

    def after(
        self, readings: tuple[float, ...], rate: float, *, at_most: int | None = None
    ) -> "Front":
        """One reading of each watched module more, at this learning rate.

        All modules in front that have stopped freeze together, but no more than `at_most` are
        frozen (None: all but the last).
        """
        histories = list(self.histories)
        for module, reading in zip(self.watched, readings, strict=True):
            rule = replace(self.rule, share=self.rule.share * (1 - module / (self.modules - 1)))
            histories[module] = histories[module].after(reading, rule)
        front, bound = self.front, self.modules - 1 if at_most is None else at_most
        while front < bound and histories[front].has_stopped(self.rule):
            front += 1
        frozen_at = rate if front > self.front == 0 else self.frozen_at
        return replace(self, front=front, histories=tuple(histories), frozen_at=frozen_at)

    def thawed(self, rate: float, fall: float) -> "Front":
        """All active again, with half the window, once the rate fell `fall` times; else itself."""
        if self.front == 0 or rate * fall > self.frozen_at * (1 + 1e-9):
            return self
        return Front(self.modules, self.rule.halved())
