"""When a device is there: two states, with rates of leaving and returning by hour of the week.

A continuous-time Markov chain whose rates are constant within an hour. What is seen in one hour
of the week is seldom enough, so that hour's rate leans on the rate of all hours together: a gamma
posterior whose prior is the overall rate, worth `LEAN_S` of observation.
"""

import math
from collections.abc import Iterator

import msgspec

HOURS = 168
HOUR_S = 3600.0
WEEK_S = HOURS * HOUR_S

LEAN_S = 6 * HOUR_S

PRIOR_LEAVES, PRIOR_S = 0.5, 12 * HOUR_S
"""A device of which nothing is known leaves once a day, and is back in half an hour."""

PRIOR_RETURNS, PRIOR_AWAY_S = 0.5, 0.25 * HOUR_S


class Hour(msgspec.Struct, frozen=True, kw_only=True):
    """What was seen in one hour of the week: seconds in either state, and their ends."""

    there_s: float = 0.0
    away_s: float = 0.0
    leaves: int = 0
    returns: int = 0


class Availability(msgspec.Struct, frozen=True, kw_only=True):
    """All that was seen, by hour of the week from Monday 0 h (UTC); and the state since when."""

    hours: dict[int, Hour] = {}
    is_there: bool = False
    since: float | None = None


def hour_of_week(at: float) -> int:
    """The hour of the week, 0 to 167, of a moment in seconds since 1970 (a Thursday)."""
    return int(at // HOUR_S + 72) % HOURS


def observed(seen: Availability, at: float, *, is_there: bool) -> Availability:
    """Gives what is known after the device was seen, or seen to be gone, at a moment."""
    if seen.since is None:
        return Availability(is_there=is_there, since=at)
    hours = dict(seen.hours)
    # A log may have its moments slightly out of order; time does not run backwards for that.
    for hour, lasted_s in _spans(seen.since, max(at, seen.since)):
        known = hours.get(hour, Hour())
        hours[hour] = msgspec.structs.replace(
            known,
            there_s=known.there_s + lasted_s * seen.is_there,
            away_s=known.away_s + lasted_s * (not seen.is_there),
        )
    if is_there != seen.is_there:
        hour = hour_of_week(at)
        known = hours.get(hour, Hour())
        hours[hour] = msgspec.structs.replace(
            known, leaves=known.leaves + (not is_there), returns=known.returns + is_there
        )
    return Availability(hours=hours, is_there=is_there, since=max(at, seen.since))


def rates(seen: Availability, hour: int) -> tuple[float, float]:
    """How often a second a device leaves while there, and returns while away, in this hour."""
    known = seen.hours.get(hour, Hour())
    leave = _overall(seen, "leaves", "there_s", PRIOR_LEAVES, PRIOR_S)
    back = _overall(seen, "returns", "away_s", PRIOR_RETURNS, PRIOR_AWAY_S)
    return (
        (known.leaves + leave * LEAN_S) / (known.there_s + LEAN_S),
        (known.returns + back * LEAN_S) / (known.away_s + LEAN_S),
    )


def chance_there(seen: Availability, now: float, later: float, *, is_there: bool) -> float:
    """The probability that a device is there at a later moment, from how it is now."""
    chance = float(is_there)
    for hour, lasted_s in _spans(now, later):
        leave, back = rates(seen, hour)
        settled = back / (leave + back)
        chance = settled + (chance - settled) * math.exp(-(leave + back) * lasted_s)
    return chance


def chance_stays(seen: Availability, now: float, later: float) -> float:
    """The probability that a device that is there does not leave before a later moment."""
    exposure = sum(rates(seen, hour)[0] * lasted_s for hour, lasted_s in _spans(now, later))
    return math.exp(-exposure)


def _overall(
    seen: Availability, ends: str, seconds: str, prior_ends: float, prior_s: float
) -> float:
    counted = sum(getattr(hour, ends) for hour in seen.hours.values())
    lasted_s = sum(getattr(hour, seconds) for hour in seen.hours.values())
    return float((counted + prior_ends) / (lasted_s + prior_s))


def _spans(begin: float, end: float) -> Iterator[tuple[int, float]]:
    """The hours of the week between two moments, each with its seconds; whole weeks at once."""
    weeks = int((end - begin) // WEEK_S)
    if weeks > 0:
        for hour in range(HOURS):
            yield hour, weeks * HOUR_S
        begin += weeks * WEEK_S
    while begin < end:
        until = min((math.floor(begin / HOUR_S) + 1) * HOUR_S, end)
        yield hour_of_week(begin), until - begin
        begin = until
