"""When a device should ask: learned from how often the hub's model agreed with its own.

The device's doubt is one minus its calibrated confidence. For doubts alike, `Agreement` keeps how
often the hub said something else; that, made to rise with doubt, is what asking is expected to
change. Asking has a price in the same unit. The price rises while more is asked than the share
that may be, and falls to the cost while less is (dual ascent, as in Balseiro & Gur, "Learning in
repeated auctions with budgets", Management Science 2019). So the threshold follows from the
device's own windows, and moves when they change. The hub's answer is taken for the better one: only
labels could tell otherwise, and a device has none.
"""

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

import msgspec

BINS = 14
"""Doubts from 1 down, each bin reaching to 0.71 of the last; the last one reaches to 0."""

PRIOR_WEIGHT = 4.0
"""Answers that the device's own doubt counts for, before and beside what it has heard."""

MEMORY = 200.0
"""Answers of a bin after which an old one counts for a third: people and sensors change."""

PRICE_STEP = 0.03
"""How far one window moves the price."""

SLACK = 10
"""Windows by whose share the share may be overdrawn, so that a start in doubt can ask."""

_DOUBTS = tuple(0.5 ** ((place + 0.5) / 2) for place in range(BINS))
"""The doubt in the middle of each bin."""

Choice: TypeAlias = Literal["ask", "explore", "stay"]


class AgreementState(msgspec.Struct, frozen=True, kw_only=True):
    """What was learned: answers and disagreements by bin, the price, windows seen and sent."""

    heard: tuple[float, ...] = (0.0,) * BINS
    differed: tuple[float, ...] = (0.0,) * BINS
    price: float = 0.1
    seen: int = 0
    sent: int = 0


class Agreement:
    """Learns the threshold of one device; holds to `share` whatever comes."""

    def __init__(self, state: AgreementState, *, share: float, cost: float, explore: float) -> None:
        self._share, self._cost, self._explore = share, cost, explore
        if not len(state.heard) == len(state.differed) == BINS:
            state = AgreementState()  # Of a version with other bins: learned anew in a day.
        self._heard, self._differed = list(state.heard), list(state.differed)
        self._price = max(state.price, cost)
        self._seen, self._sent = state.seen, state.sent
        self._fitted: list[float] | None = None

    @property
    def state(self) -> AgreementState:
        """What has been learned, to go on from."""
        return AgreementState(
            heard=tuple(self._heard),
            differed=tuple(self._differed),
            price=self._price,
            seen=self._seen,
            sent=self._sent,
        )

    @property
    def threshold(self) -> float:
        """The confidence from which on the device does not ask, at the price of now."""
        for step in range(1, 1000):
            confidence = step / 1000
            if self.gain(confidence) <= self._price:
                return confidence
        return 1.0

    def choose(self, confidence: float, draw: float) -> Choice:
        """Whether to ask about a window; `draw` is uniform in [0, 1).

        Only for windows that could be asked about: the price shall not fall while the link is
        away, to be paid for in a flood when it is back.
        """
        choice: Choice = "stay"
        if self._sent + 1 <= self._share * (self._seen + SLACK):
            if self.gain(confidence) > self._price:
                choice = "ask"
            elif draw < self._explore:
                choice = "explore"
        is_sent = choice != "stay"
        self._seen += 1
        self._sent += is_sent
        moved = self._price + PRICE_STEP * (is_sent - self._share)
        self._price = min(1.0, max(self._cost, moved))
        return choice

    def hear(self, confidence: float, *, agreed: bool) -> None:
        """The hub has answered about a window of this confidence."""
        place = _bin(1.0 - confidence)
        fade = 1.0 - 1.0 / MEMORY
        self._heard[place] = self._heard[place] * fade + 1.0
        self._differed[place] = self._differed[place] * fade + (not agreed)
        self._fitted = None

    def gain(self, confidence: float) -> float:
        """How likely the hub is to say something else (0 to 1); falls with confidence."""
        if self._fitted is None:
            self._fitted = self._fit()
        doubt = 1.0 - confidence
        at = min(max(_position(doubt) - 0.5, 0.0), BINS - 1.0)
        low = min(int(at), BINS - 2)
        return self._fitted[low] + (at - low) * (self._fitted[low + 1] - self._fitted[low])

    def _fit(self) -> list[float]:
        """The share that differs in each bin, never rising; the device's doubt is its prior.

        How far doubt overstates is learned over all bins together, so that one in which nothing
        was heard yet follows the others.
        """
        expected = sum(heard * doubt for heard, doubt in zip(self._heard, _DOUBTS, strict=True))
        ratio = (sum(self._differed) + PRIOR_WEIGHT) / (expected + PRIOR_WEIGHT)
        weights = [heard + PRIOR_WEIGHT for heard in self._heard]
        means = [
            (differed + PRIOR_WEIGHT * min(1.0, ratio * doubt)) / weight
            for doubt, differed, weight in zip(_DOUBTS, self._differed, weights, strict=True)
        ]
        return _falling(means, weights)


def _position(doubt: float) -> float:
    """Where a doubt lies on the bins' scale, 0 to BINS; halved twice as far as the next bin."""
    return min(float(BINS), -2.0 * math.log2(min(1.0, max(doubt, 1e-9))))


def _bin(doubt: float) -> int:
    return min(BINS - 1, int(_position(doubt)))


def _falling(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The nearest values in weighted squares that never rise: pool adjacent violators."""
    pools: list[tuple[float, float, int]] = []
    for value, weight in zip(values, weights, strict=True):
        pool = (value, weight, 1)
        while pools and pools[-1][0] < pool[0]:
            mean, mass, count = pools.pop()
            total = mass + pool[1]
            pool = ((mean * mass + pool[0] * pool[1]) / total, total, count + pool[2])
        pools.append(pool)
    return [mean for mean, _, count in pools for _ in range(count)]
