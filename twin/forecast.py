"""What a device would do if it were asked now: when it is done, with what bytes and joules.

A forecast is a sum of lognormal parts, one for each leg of the way, each from the device's own
rounds or, where it was never seen, from the fleet's; then corrected by what earlier forecasts of
the device were off by.
"""

import math
from collections.abc import Mapping

import msgspec

from twin.availability import chance_stays
from twin.calibration import corrected
from twin.estimates import Estimate, LogNormal, total
from twin.model import TwinModel, Work

FLEET_WORTH = 1.0
"""What the fleet completes counts for a device as much as so many parts of its own."""

LARGEST = 1e9
"""No device draws so many watts, or joules for 10^6 bytes: one that says so says nothing."""


class Power(msgspec.Struct, frozen=True, kw_only=True):
    """What a device, or its owner, said it draws: watts of training, joules for 10^6 bytes."""

    training_w: float | None = None
    up_j_per_mb: float = 0.0
    down_j_per_mb: float = 0.0


class Forecast(msgspec.Struct, frozen=True, kw_only=True):
    """What a twin says of a part. Times count from the moment of asking.

    `finish_s` is how long it takes where it completes, `raw_s` the median before correction;
    `completes` the probability that it does so at all, however late. `energy_j` is None where
    nobody reported what the device draws.
    """

    finish_s: LogNormal
    raw_s: float
    training_s: LogNormal
    completes: float
    down_bytes: int
    up_bytes: int
    energy_j: float | None = None

    def finishes_before(self, after_s: float) -> float:
        """The probability that the update is in before so many seconds have passed."""
        return self.completes * self.finish_s.below(after_s)


def forecast(
    own: TwinModel,
    fleet: TwinModel,
    work: Work,
    now: float,
    *,
    is_cold: bool | None = False,
    power: Power | None = None,
) -> Forecast | None:
    """Gives the forecast of a part, if it is asked now.

    None where neither this device nor any other of the fleet ever trained such a model: there
    is nothing to say.
    """
    rate = _either(
        own.seconds_per_sample.get(work.family), fleet.seconds_per_sample.get(work.family)
    )
    samples = own.samples or fleet.samples
    if rate is None or not samples:
        return None
    training = rate.times(work.seen(samples))
    up_bytes = _up_bytes(own, fleet, work)
    raw = total([training, *_legs(own, fleet, work, up_bytes, is_cold=bool(is_cold))])
    finish = corrected(raw, own.calibration)
    return Forecast(
        finish_s=finish,
        raw_s=raw.median,
        training_s=training,
        completes=completes(own, fleet, now, now + finish.mean),
        down_bytes=work.down_bytes,
        up_bytes=up_bytes,
        energy_j=_energy_j(work, training, up_bytes, power),
    )


def completes(own: TwinModel, fleet: TwinModel, now: float, until: float) -> float:
    """The probability that a device that is there now sends its update in the end.

    Before its first parts that is what the fleet does, if the device stays; then what it does.
    """
    before = fleet.completes.mean(chance_stays(own.availability, now, until))
    return own.completes.mean(before, FLEET_WORTH)


def _legs(
    own: TwinModel, fleet: TwinModel, work: Work, up_bytes: int, *, is_cold: bool
) -> list[LogNormal]:
    """What a part takes beside its training loop: letters, transfers, the trainer's start."""
    delay = _either(own.delay_s, fleet.delay_s)
    legs = [delay.times(2)] if delay is not None else []
    down = _either(own.down_bytes_per_s, fleet.down_bytes_per_s)
    if down is not None and work.down_bytes:
        legs += [_time_of(work.down_bytes, down)] + ([delay.times(2)] if delay else [])
    up = _either(own.up_bytes_per_s, fleet.up_bytes_per_s)
    if up is not None and up_bytes:
        legs += [_time_of(up_bytes, up)] + ([delay.times(2)] if delay else [])
    warm = _either(own.beside_s, fleet.beside_s)
    cold = _either(own.start_s, fleet.start_s)
    beside = (cold or warm) if is_cold else (warm or cold)
    return [*legs, beside] if beside is not None else legs


def _either(own: Estimate | None, fleet: Estimate | None) -> LogNormal | None:
    known = own or fleet
    return None if known is None else known.next()


def _time_of(size_bytes: int, rate: LogNormal) -> LogNormal:
    """The seconds of a transfer: bytes over a rate, whose logarithm only changes its sign."""
    return LogNormal(mu=math.log(size_bytes) - rate.mu, sigma=rate.sigma)


def _up_bytes(own: TwinModel, fleet: TwinModel, work: Work) -> int:
    known = own.update_bytes.get(work.family) or fleet.update_bytes.get(work.family)
    return known or work.up_bytes


def _energy_j(work: Work, training: LogNormal, up_bytes: int, power: Power | None) -> float | None:
    """Joules above idle: watts times seconds, and what the bytes cost; None where nobody said."""
    if power is None or power.training_w is None:
        return None
    link_j = up_bytes * power.up_j_per_mb + work.down_bytes * power.down_j_per_mb
    return power.training_w * training.mean + link_j / 1e6


def power_of(reported: Mapping[str, object]) -> Power | None:
    """What a device reported under `energy`, as far as it can be; None where it said nothing."""
    said = reported.get("energy")
    if not isinstance(said, dict):
        return None
    try:
        found = msgspec.convert(said, Power)
    except msgspec.ValidationError:
        return None
    values = (found.training_w or 0.0, found.up_j_per_mb, found.down_j_per_mb)
    return found if all(0.0 <= value <= LARGEST for value in values) else None
