"""Online estimates of what is never below 0, and of chances: each with mean, variance and count.

Times, rates and costs of devices differ by factors, not by amounts, and are skewed: a figure is
estimated through its logarithm, whose mean and variance have a normal-inverse-gamma posterior
(K. Murphy, "Conjugate Bayesian analysis of the Gaussian distribution", 2007, section 6). Beside
Welford's sums that gives from the first observation on how unsure a forecast is, and a forecast
of logarithms never comes out below 0. A plain EWMA would know no count.

Two rules are ours. What is older than `MEMORY` observations fades: a device that is throttled is
soon known as slow. And one observation counts as at most `OUTLIER` deviations away: a single
hiccup moves little, a change that lasts widens the deviation and is let in.
"""

import math
from typing import Self

import msgspec

MEMORY = 15.0
"""An estimate stands on at most so many observations."""

CHANCE_MEMORY = 40.0
"""A chance stands on at most so many: each says less."""

OUTLIER = 4.0
"""From the `TRUSTED`th observation on, none lies further off than so many deviations."""

TRUSTED = 4

FIRST_SPREAD = 0.15
"""The deviation of a logarithm that one observation is taken to have: 15 % up or down."""

WIDEST = 1.5
"""No deviation is larger: a sum would be all tail. Twice it is a factor of 20 up or down."""

TINY = 1e-9
"""What is measured as 0 is taken for this."""


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """A quantity in its own unit: its median, mean and variance, and how often it was seen."""

    median: float
    mean: float
    variance: float
    count: int


class LogNormal(msgspec.Struct, frozen=True, kw_only=True):
    """What a quantity above 0 will be next: the logarithm's mean and deviation."""

    mu: float
    sigma: float

    @property
    def median(self) -> float:
        """As likely above as below."""
        return math.exp(self.mu)

    @property
    def mean(self) -> float:
        """The mean in the quantity's unit."""
        return math.exp(self.mu + self.sigma**2 / 2)

    @property
    def variance(self) -> float:
        """The variance in the quantity's unit squared."""
        return math.expm1(self.sigma**2) * self.mean**2

    def below(self, value: float) -> float:
        """The probability that it is at most this."""
        if value <= 0.0:
            return 0.0
        if self.sigma == 0.0:
            return float(math.log(value) >= self.mu)
        return _normal_cdf((math.log(value) - self.mu) / self.sigma)

    def quantile(self, share: float) -> float:
        """Gives what it stays below with this probability, above 0 and below 1."""
        from statistics import NormalDist

        return math.exp(self.mu + self.sigma * NormalDist().inv_cdf(share))

    def times(self, factor: float) -> "LogNormal":
        """Gives the distribution of so many times the quantity."""
        return LogNormal(mu=self.mu + math.log(max(factor, TINY)), sigma=self.sigma)


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """The posterior of a logarithm's mean (`mu`, worth `weight` observations) and variance.

    The variance is inverse-gamma with `shape` and `scale`. `count` is of all observations.
    """

    mu: float
    weight: float
    shape: float
    scale: float
    count: int

    @classmethod
    def first(cls, value: float, spread: float = FIRST_SPREAD) -> Self:
        """Begin from one observation."""
        mu = math.log(max(value, TINY))
        return cls(mu=mu, weight=1.0, shape=2.0, scale=spread**2, count=1)

    def after(self, value: float, share: float = 1.0) -> "Estimate":
        """Gives the estimate after one more observation, worth `share` of a full one."""
        kept = min(1.0, MEMORY / (self.weight + share))
        weight = self.weight * kept
        # Shape and scale fade together: what is forgotten is how sure, not how far it spreads.
        shape = 2.0 + (self.shape - 2.0) * kept
        scale = self.scale * (shape - 1.0) / (self.shape - 1.0)
        off = math.log(max(value, TINY)) - self.mu
        if self.count >= TRUSTED:
            most = OUTLIER * self.next().sigma
            off = min(max(off, -most), most)
        return Estimate(
            mu=self.mu + share * off / (weight + share),
            weight=weight + share,
            shape=shape + share / 2,
            scale=scale + weight * share * off**2 / (2 * (weight + share)),
            count=self.count + 1,
        )

    def next(self) -> LogNormal:
        """What the next observation will be: Student's t, by its first two moments."""
        variance = self.scale / (self.shape - 1.0) * (1.0 + 1.0 / self.weight)
        return LogNormal(mu=self.mu, sigma=min(math.sqrt(variance), WIDEST))

    @property
    def figure(self) -> Figure:
        """The quantity in its own unit."""
        ahead = self.next()
        return Figure(
            median=ahead.median, mean=ahead.mean, variance=ahead.variance, count=self.count
        )


class Chance(msgspec.Struct, frozen=True, kw_only=True):
    """The posterior of a probability: `yes` and `no` were seen, older ones for less."""

    yes: float = 0.0
    no: float = 0.0
    count: int = 0

    def after(self, happened: bool) -> "Chance":
        """Gives the chance after one more trial."""
        kept = min(1.0, CHANCE_MEMORY / (self.yes + self.no + 1.0))
        return Chance(
            yes=self.yes * kept + happened, no=self.no * kept + (not happened), count=self.count + 1
        )

    def mean(self, before: float = 0.5, worth: float = 2.0) -> float:
        """The probability of the next trial; `before` is what one would say without any."""
        return (self.yes + worth * before) / (self.yes + self.no + worth)

    def variance(self, before: float = 0.5, worth: float = 2.0) -> float:
        """The variance of that probability."""
        mean, total = self.mean(before, worth), self.yes + self.no + worth
        return mean * (1.0 - mean) / (total + 1.0)


def learned(known: Estimate | None, value: float, share: float = 1.0) -> Estimate:
    """The estimate after an observation, which may be the first."""
    return Estimate.first(value) if known is None else known.after(value, share)


def total(parts: list[LogNormal]) -> LogNormal:
    """The sum of independent quantities, as the lognormal of the same mean and variance.

    Fenton and Wilkinson (L. F. Fenton, IRE Trans. Comm. Systems 8, 1960): exact in both moments,
    and close in the middle of the distribution, which is what rounds ask about.
    """
    mean = sum(part.mean for part in parts)
    variance = sum(part.variance for part in parts)
    if mean <= 0.0:
        return LogNormal(mu=math.log(TINY), sigma=0.0)
    sigma_squared = math.log1p(variance / mean**2)
    return LogNormal(mu=math.log(mean) - sigma_squared / 2, sigma=math.sqrt(sigma_squared))


def beyond(ahead: LogNormal, value: float) -> float:
    """What a quantity that is known to exceed a value is expected to be, by its logarithm.

    The mean of a normal distribution cut off below (the inverse Mills ratio).
    """
    if ahead.sigma == 0.0:
        return max(ahead.median, value)
    cut = (math.log(max(value, TINY)) - ahead.mu) / ahead.sigma
    left = 1.0 - _normal_cdf(cut)
    # Far out the ratio is the cut itself and a little; the quotient would be 0 over 0.
    ratio = _normal_pdf(cut) / left if left > 1e-12 else cut + 1.0 / max(cut, 1.0)
    return math.exp(ahead.mu + ahead.sigma * ratio)


def _normal_cdf(at: float) -> float:
    return 0.5 * math.erfc(-at / math.sqrt(2.0))


def _normal_pdf(at: float) -> float:
    return math.exp(-(at**2) / 2) / math.sqrt(2.0 * math.pi)
