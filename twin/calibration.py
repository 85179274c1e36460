"""How good a twin's forecasts were: predicted against observed, of the last rounds.

Errors of times are relative to what was observed. Probabilities are judged by Brier's score
(G. W. Brier, Monthly Weather Review 78, 1950), the mean squared distance from what came, beside
that of the base rate: of always saying how often the fleet had finished until then.
"""

import statistics

import msgspec

from twin.estimates import Estimate, LogNormal, learned

REMEMBERED = 32
"""A twin is judged by at most so many of its forecasts, the newest."""

HALF_ERROR = 0.3
"""A median error of 30 % halves a twin's weight."""

HALF_BIAS = 0.2
"""So does saying a probability that is off by 0.2 on average."""

FEW = 3
"""A twin of so many judged forecasts has half the weight that its errors allow."""

CORRECTION_LEAN = 1.0
"""A correction is believed by half after so many forecasts, and later nearly in full."""


class Said(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """A probability that was said, what came, and what the base rate would have said."""

    chance: float
    came: bool
    base_rate: float


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """A twin's record. `errors` are signed: above 0 where it took longer than predicted.

    `correction` is what the observed time was over the one its parts summed up to: what every
    forecast of this device leaves out, such as a hub that is busy when it answers.
    """

    errors: tuple[float, ...] = ()
    bytes_errors: tuple[float, ...] = ()
    said: tuple[Said, ...] = ()
    correction: Estimate | None = None

    @property
    def bias(self) -> float | None:
        """The mean of the relative errors of time; None before the first."""
        return statistics.fmean(self.errors) if self.errors else None

    @property
    def median_error(self) -> float | None:
        """The median size of the relative errors of time; None before the first."""
        return statistics.median(map(abs, self.errors)) if self.errors else None

    @property
    def brier(self) -> float | None:
        """Brier's score of the probabilities said: 0 is perfect, 0.25 a coin's."""
        if not self.said:
            return None
        return statistics.fmean((each.chance - each.came) ** 2 for each in self.said)

    @property
    def base_brier(self) -> float | None:
        """Brier's score of the base rate on the same parts."""
        if not self.said:
            return None
        return statistics.fmean((each.base_rate - each.came) ** 2 for each in self.said)

    @property
    def weight(self) -> float:
        """How far a selection shall rely on this twin, 0 to 1.

        Few forecasts weigh little, and so do times that were off and probabilities that were
        too high or too low on average. Chance itself is no fault: a device that finishes every
        other time, and of which that was said, weighs as much as any.
        """
        if not self.said:
            return 0.0
        bias = abs(statistics.fmean(each.chance - each.came for each in self.said))
        known = len(self.said) / (len(self.said) + FEW)
        times = 1.0 / (1.0 + ((self.median_error or 0.0) / HALF_ERROR) ** 2)
        return known * times / (1.0 + (bias / HALF_BIAS) ** 2)


def judged_time(
    known: Calibration, *, raw_s: float, said_s: float, observed_s: float
) -> Calibration:
    """Gives the record after a part that finished.

    Args:
        known: The record so far.
        raw_s: The median that the parts of the forecast summed up to.
        said_s: The median that was said, corrected.
        observed_s: What it took.
    """
    error = (observed_s - said_s) / observed_s if observed_s > 0 else 0.0
    return msgspec.structs.replace(
        known,
        errors=_last(known.errors, error),
        correction=learned(known.correction, observed_s / max(raw_s, 1e-9)),
    )


def judged_bytes(known: Calibration, *, said: int, observed: int) -> Calibration:
    """Gives the record after the bytes of an update were seen."""
    error = (observed - said) / observed if observed > 0 else 0.0
    return msgspec.structs.replace(known, bytes_errors=_last(known.bytes_errors, error))


def judged_unfinished(known: Calibration, *, raw_s: float, longer_s: float) -> Calibration:
    """Gives the record after a part was given up at a time when it would have taken longer.

    That is half an observation: of the time only a bound is known, and of that a guess is made.
    """
    correction = learned(known.correction, longer_s / max(raw_s, 1e-9), 0.5)
    return msgspec.structs.replace(known, correction=correction)


def judged_chance(
    known: Calibration, *, chance: float, came: bool, base_rate: float
) -> Calibration:
    """Gives the record after it was seen whether a part finished in time."""
    said = Said(chance=chance, came=came, base_rate=base_rate)
    return msgspec.structs.replace(known, said=(*known.said, said)[-REMEMBERED:])


def corrected(raw: LogNormal, known: Calibration) -> LogNormal:
    """Gives a forecast of time with what all earlier ones of this device were off by.

    The spread of past errors replaces the parts' own as they grow in number.
    """
    correction = known.correction
    if correction is None:
        return raw
    share = correction.count / (correction.count + CORRECTION_LEAN)
    variance = (1 - share) * raw.sigma**2 + share * correction.next().sigma ** 2
    return LogNormal(mu=raw.mu + share * correction.mu, sigma=variance**0.5)


def _last(known: tuple[float, ...], value: float) -> tuple[float, ...]:
    return (*known, value)[-REMEMBERED:]
