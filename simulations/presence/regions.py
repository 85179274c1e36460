"""Regional outages: all devices of a region are gone at once, whatever each would do."""

import bisect
import math

import numpy as np

from simulations.draws import key_of, uniform, uniforms
from simulations.presence.model import Mask, Presence


class Regional:
    """Devices that come and go as `inner` says, while their region has no outage.

    Each device belongs to one of `regions`, drawn. A region is well for a time drawn from an
    exponential distribution of mean `every_s`, then out for a time drawn from `lasts_s`, and so
    on. Nobody may be on.
    """

    def __init__(
        self,
        inner: Presence,
        devices: int,
        *,
        regions: int,
        every_s: float,
        lasts_s: tuple[float, float],
        seed: int,
    ) -> None:
        self._inner = inner
        self._every_s, self._lasts_s = every_s, lasts_s
        self._key = key_of(seed, "presence/outages")
        drawn = uniforms(key_of(seed, "presence/regions"), np.arange(devices)) * regions
        self.region = np.minimum(drawn.astype(np.uint16), np.uint16(regions - 1))
        self._begins: list[list[float]] = [[] for _ in range(regions)]
        self._ends: list[list[float]] = [[] for _ in range(regions)]

    def on(self, number: int, now: float) -> Mask:
        """Those that are on and whose region is well."""
        well = np.array([self._outage(region, now)[0] > now for region in range(len(self._ends))])
        there: Mask = self._inner.on(number, now) & well[self.region]
        return there

    def is_on(self, place: int, number: int, now: float) -> bool:
        """Whether it is on and its region is well."""
        begins, _ = self._outage(int(self.region[place]), now)
        return begins > now and self._inner.is_on(place, number, now)

    def leaves_at(self, place: int, number: int, now: float) -> float:
        """When it goes off by itself, or its region does."""
        begins, _ = self._outage(int(self.region[place]), now)
        return max(min(begins, self._inner.leaves_at(place, number, now)), now)

    def returns_at(self, place: int, number: int, now: float) -> float:
        """When it is on by itself and its region is well."""
        at = now
        while at < math.inf:
            begins, ends = self._outage(int(self.region[place]), at)
            if begins <= at:
                at = ends
            elif (there := self._inner.returns_at(place, number, at)) > at:
                at = there
            else:
                break
        return at

    def _outage(self, region: int, now: float) -> tuple[float, float]:
        """The outage that is on at this time, or the next one: from when to when."""
        begins, ends = self._begins[region], self._ends[region]
        while not ends or ends[-1] <= now:
            count = 2 * len(ends)
            well_s = -self._every_s * math.log(uniform(self._key, region, count))
            low, high = self._lasts_s
            out_s = low + (high - low) * uniform(self._key, region, count + 1)
            begins.append((ends[-1] if ends else 0.0) + well_s)
            ends.append(begins[-1] + out_s)
        place = bisect.bisect_right(ends, now)
        return begins[place], ends[place]
