"""What the hub's answers teach a device about its wearer: a correction of its own model.

The device's model is everybody's. Each answer of the hub says what it should have said of one
window of this wearer, and a linear layer learns from them what to add to its logits. It sees those
logits and a few plain figures of the window: mean, spread and slow rhythm of each channel. That
needs no torch and some hundred weights. Learning on while serving, from the larger model's answers,
is what cascades gain most from (Nie et al., "Online cascade learning for efficient inference over
streams", arXiv:2402.04513).

Departs from the paper: the small model itself stays as the fleet trained it; only the layer
behind it learns, and it is fitted anew to all it remembers instead of by single steps.
"""

from collections import deque
from collections.abc import Iterable

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_agent.calibration import probabilities

REMEMBERED = 512
"""Answers that are learned from; the oldest is forgotten for the newest."""

RHYTHMS = 5
"""So many frequencies of each channel are looked at, the slowest first."""

FEWEST = 16
"""Examples below which nothing is corrected."""

EVERY = 4
"""The layer is fitted anew after so many answers."""

SHRINKAGE = 0.1
"""What a weight of one costs, in examples lost: with few of them little is changed."""

_STEPS = 25

Floats = NDArray[np.float64]


class Example(msgspec.Struct, frozen=True, kw_only=True):
    """One window that somebody knew the answer to: its figures and logits, as float32 bytes."""

    figures: bytes
    logits: bytes
    answer: int


class Correction:
    """A linear layer over the device's logits and the window's figures, learned as answers come.

    It adds nothing until `FEWEST` examples are there. `known` are examples of an earlier start,
    of the same model; those that do not fit together are left out.
    """

    def __init__(self, known: Iterable[Example] = ()) -> None:
        self._examples: deque[tuple[Floats, Floats, int]] = deque(maxlen=REMEMBERED)
        for each in known:
            parts = (_unpacked(each.figures), _unpacked(each.logits), each.answer)
            if self._fits(*parts):
                self._examples.append(parts)
        self._fresh = EVERY if self._examples else 0
        self._weights: Floats | None = None
        self._centre: Floats = np.zeros(1)
        self._scale: Floats = np.ones(1)

    @property
    def examples(self) -> tuple[Example, ...]:
        """What to keep for the next start."""
        return tuple(
            Example(figures=_packed(row), logits=_packed(logits), answer=answer)
            for row, logits, answer in self._examples
        )

    def apply(self, windows: NDArray[np.float32], logits: Floats) -> Floats:
        """Corrected logits (N, classes) of windows (N, ...) and the model's own logits."""
        if self._fresh >= EVERY and len(self._examples) >= FEWEST:
            self._fit()
        if self._weights is None:
            return logits
        corrected: Floats = logits + self._standard(figures(windows, logits)) @ self._weights
        return corrected

    def learn(self, window: NDArray[np.float32], logits: Floats, answer: int) -> None:
        """Remember what is right for a window (...,) of these logits (classes,)."""
        row = figures(window[None], logits[None])[0]
        self._examples.append((row, logits, answer))
        self._fresh += 1

    def _fits(self, row: Floats, logits: Floats, answer: int) -> bool:
        """Whether an example is one, and like the others."""
        first = self._examples[0] if self._examples else (row, logits, answer)
        shapes = (len(row), len(logits)) == (len(first[0]), len(first[1]))
        return shapes and 0 <= answer < len(logits) and bool(np.isfinite(row).all())

    def _fit(self) -> None:
        """Fewest errors of the softmax, with a bound on its curvature in place of a step size.

        The bound is Boehning's ("Multinomial logistic regression algorithm", 1992): each step
        descends, and all steps share one inverse.
        """
        self._fresh = 0
        rows, offsets, answers = (np.array(part) for part in zip(*self._examples, strict=True))
        self._centre = rows.mean(axis=0)
        self._scale = rows.std(axis=0) + 1e-6
        x = self._standard(rows)
        right = np.eye(offsets.shape[1])[answers]
        weights = np.zeros((x.shape[1], offsets.shape[1]))
        if self._weights is not None:
            weights = self._weights
        inverse = np.linalg.inv(0.5 * x.T @ x + SHRINKAGE * np.eye(x.shape[1]))
        for _ in range(_STEPS):
            excess = probabilities(offsets + x @ weights, 1.0) - right
            weights = weights - inverse @ (x.T @ excess + SHRINKAGE * weights)
        self._weights = weights

    def _standard(self, rows: Floats) -> Floats:
        centred = (rows - self._centre) / self._scale / np.sqrt(rows.shape[1])
        ones = np.ones((len(rows), 1))
        joined: Floats = np.concatenate([centred, ones], axis=1)
        return joined


def figures(windows: NDArray[np.float32], logits: Floats) -> Floats:
    """What the layer sees: centred logits, and of each channel mean, spread and slow rhythm."""
    series = windows.reshape(len(windows), windows.shape[1], -1).astype(np.float64)
    rhythm = np.abs(np.fft.rfft(series, axis=1))[:, 1 : 1 + RHYTHMS] / series.shape[1]
    parts = (
        logits - logits.mean(axis=1, keepdims=True),
        series.mean(axis=1),
        series.std(axis=1),
        rhythm.reshape(len(windows), -1),
    )
    return np.concatenate(parts, axis=1)


def _packed(numbers: Floats) -> bytes:
    return numbers.astype("<f4").tobytes()


def _unpacked(data: bytes) -> Floats:
    return np.frombuffer(data[: len(data) // 4 * 4], "<f4").astype(np.float64)
