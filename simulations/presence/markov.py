# ruff: noqa: ARG002 - each model looks at what decides it: the round, the time, or neither
"""Devices that come and go like people: two states, with rates by the hour of the week.

A continuous-time Markov chain for each device, whose mean times on and off depend on the hour
(as in the availability that Bonawitz et al., arXiv:1902.01046, section 9, see: four times as many
devices at night as at noon). Thirteen bytes a device.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from simulations.draws import key_of, uniforms
from simulations.presence.model import Mask

HOURS = 168
"""Of a week, from Monday at midnight."""

_HOUR_S = 3600.0
_WEEK_S = HOURS * _HOUR_S
_EDGES_S = np.arange(HOURS + 1) * _HOUR_S

Times = npt.NDArray[np.float64]


class _Hazard:
    """How the chance to change adds up over a week: piecewise linear, for ever repeated."""

    def __init__(self, mean_s: Sequence[float]) -> None:
        self.rates = 1.0 / np.resize(np.asarray(mean_s, np.float64), HOURS)
        self._sum = np.concatenate([[0.0], np.cumsum(self.rates * _HOUR_S)])

    def reaches(self, since_s: Times, more: Times) -> Times:
        """When the hazard since these times comes to these amounts."""
        week = self._sum[-1]
        if week == 0.0:
            return np.full(len(since_s), np.inf)
        weeks, rest_s = np.divmod(since_s, _WEEK_S)
        turns, rest = np.divmod(np.interp(rest_s, _EDGES_S, self._sum) + more, week)
        at_s: Times = (weeks + turns) * _WEEK_S + np.interp(rest, self._sum, _EDGES_S)
        return np.maximum(at_s, since_s)


class Markov:
    """Two-state chains of a whole fleet, which are let run as far as they are asked about.

    Args:
        devices: How many.
        on_s: Mean time on, in seconds: one, or by the hour of the day (24) or week (168).
        off_s: Mean time off, the same way.
        seed: Decides the chains.
        starts_hour: The hour of the week at time 0, from Monday at midnight.
    """

    def __init__(
        self,
        devices: int,
        on_s: Sequence[float],
        off_s: Sequence[float],
        seed: int,
        starts_hour: float = 0.0,
    ) -> None:
        self._leave, self._return = _Hazard(on_s), _Hazard(off_s)
        self._key = key_of(seed, "presence/markov")
        self._devices, self._starts_s = devices, starts_hour * _HOUR_S
        self._now = 0.0
        self._is_on: Mask
        self._until: Times
        self._flips: npt.NDArray[np.uint32]
        self._begin()

    def on(self, number: int, now: float) -> Mask:
        """Those that are on at this time."""
        if now < self._now:
            self._begin()
        self._now = now
        due = np.flatnonzero(self._until <= now)
        while len(due):
            is_on, until, flips = self._flipped(
                due, self._is_on[due], self._until[due], self._flips[due]
            )
            self._is_on[due], self._until[due], self._flips[due] = is_on, until, flips
            due = due[until <= now]
        return self._is_on.copy()

    def is_on(self, place: int, number: int, now: float) -> bool:
        """Whether it is on at this time."""
        return self._at(place, now)[0]

    def leaves_at(self, place: int, number: int, now: float) -> float:
        """The end of its time on."""
        is_on, until = self._at(place, now)
        return until if is_on else now

    def returns_at(self, place: int, number: int, now: float) -> float:
        """Now, or the end of its time off."""
        is_on, until = self._at(place, now)
        return now if is_on else until

    def _begin(self) -> None:
        places = np.arange(self._devices)
        share = _stationary(self._leave.rates, self._return.rates, self._starts_s)
        self._now = 0.0
        self._is_on = uniforms(self._key, places) < share
        self._flips = np.zeros(self._devices, np.uint32)
        self._until = self._next(places, self._is_on, np.zeros(self._devices), self._flips)

    def _at(self, place: int, now: float) -> tuple[bool, float]:
        """Its state at a time, and until when; what is kept of it stays as it is."""
        if now < self._now:
            self._begin()
        is_on, until = bool(self._is_on[place]), float(self._until[place])
        if until > now:
            return is_on, until
        whose = np.array([place])
        state = (self._is_on[whose], self._until[whose], self._flips[whose])
        while state[1][0] <= now:
            state = self._flipped(whose, *state)
        return bool(state[0][0]), float(state[1][0])

    def _flipped(
        self,
        places: npt.NDArray[np.int64],
        is_on: Mask,
        until: Times,
        flips: npt.NDArray[np.uint32],
    ) -> tuple[Mask, Times, npt.NDArray[np.uint32]]:
        is_on, flips = ~is_on, flips + np.uint32(1)
        return is_on, self._next(places, is_on, until, flips), flips

    def _next(
        self,
        places: npt.NDArray[np.int64],
        is_on: Mask,
        since: Times,
        flips: npt.NDArray[np.uint32],
    ) -> Times:
        more = -np.log(uniforms(self._key, places, flips.astype(np.int64) + 1))
        until = np.empty(len(places))
        for hazard, whose in ((self._leave, is_on), (self._return, ~is_on)):
            begun = since[whose] + self._starts_s
            until[whose] = hazard.reaches(begun, more[whose]) - self._starts_s
        return until


def _stationary(leave: Times, back: Times, at_s: float) -> float:
    """The share of devices that are on at a time of the week, week after week alike.

    Over an hour the share goes to back / (leave + back) exponentially, so over a week it is a
    linear function of itself.
    """
    slope, offset = _over_hours(leave, back, HOURS)
    # With chains that never change there is no share that all go to.
    share = offset / (1.0 - slope) if slope < 1.0 else 0.5
    slope, offset = _over_hours(leave, back, at_s / _HOUR_S % HOURS)
    return slope * share + offset


def _over_hours(leave: Times, back: Times, hours: float) -> tuple[float, float]:
    slope, offset = 1.0, 0.0
    for hour in range(math.ceil(hours)):
        rate = float(leave[hour] + back[hour])
        if rate > 0.0:
            fades = math.exp(-rate * _HOUR_S * min(1.0, hours - hour))
            goal = float(back[hour]) / rate
            slope, offset = slope * fades, (offset - goal) * fades + goal
    return slope, offset
