"""One future of the forked twins: what each would be like, and when it would be there.

What is not known of a device is drawn once a future (its link); what differs from part to part
is drawn each time (training, and what a part takes beside it). All draws follow from the seed,
the device and what they are for, so that two questions see the same luck.
"""

import math
import random
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from federation.protocol.messages import LocalPlan
from simulations.bus import LinkQuality
from simulations.presence.model import Mask
from simulations.what_if.forking import Twin
from twin.availability import HOUR_S, hour_of_week, rates
from twin.estimates import LogNormal

_NORMAL = NormalDist()
_LIKELY = (0.25, 0.75)
"""A letter's way lies between these quantiles of what it was: the world draws evenly."""


def draw(what: LogNormal, rng: random.Random) -> float:
    """One value of a lognormal quantity."""
    return math.exp(what.mu + what.sigma * _NORMAL.inv_cdf(min(max(rng.random(), 1e-9), 1 - 1e-9)))


def link_of(twin: Twin, seed: int) -> LinkQuality:
    """A device's link in one future, in bits a second; 0 where no transfer was ever seen."""
    rng = _luck(seed, twin.device, "link")
    up, down = twin.up_bytes_per_s, twin.down_bytes_per_s
    low, high = (twin.delay_s.quantile(share) for share in _LIKELY)
    return LinkQuality(
        delay_s=(low, high),
        up_bps=0.0 if up is None else 8.0 * draw(up, rng),
        down_bps=0.0 if down is None else 8.0 * draw(down, rng),
    )


class TwinBody:
    """The physical side of a twin: a `simulations.device_model.Body` without a battery."""

    def __init__(self, twin: Twin, seed: int) -> None:
        self._twin, self._seed = twin, seed

    def training_s(self, plan: LocalPlan, steps: int, samples: int) -> float:
        """How long a part takes beside letters and transfers; the same when asked again."""
        rng = _luck(self._seed, self._twin.device, f"part/{plan.seed}")
        seen = min(plan.epochs * samples, steps * plan.batch_size)
        return seen * draw(self._twin.sample_s, rng) + draw(self._twin.beside_s, rng)

    def training_j(self, plan: LocalPlan, steps: int, samples: int) -> float:
        """Nothing is drawn of what it takes; the forecasts tell joules."""
        del plan, steps, samples
        return 0.0

    def transfer_j(self, up_bytes: int, down_bytes: int) -> float:
        """As above."""
        del up_bytes, down_bytes
        return 0.0

    def spend(self, joules: float, now: float) -> bool:
        """It is on mains."""
        del joules, now
        return True

    def back_at(self, now: float) -> float:
        """It is never empty."""
        return now

    def fits(self, plan: LocalPlan) -> bool:
        """It trained this model before, or one like it did."""
        del plan
        return True

    def shows(self, now: float) -> float:
        """Its clock is right."""
        return now


class TwinPresence:
    """When devices are there, by their own rates of leaving and returning in each hour.

    `begins` is the moment of the fork, in seconds since 1970; time 0 of the world. Devices are
    there at time 0: whoever asks, asks about a fleet that is up.
    """

    def __init__(self, twins: Sequence[Twin], begins: float, seed: int) -> None:
        self._twins, self._begins = twins, begins
        self._luck = [_luck(seed, twin.device, "presence") for twin in twins]
        self._switches: list[list[float]] = [[0.0] for _ in twins]

    def on(self, number: int, now: float) -> Mask:
        """All devices at the opening of a round."""
        places = range(len(self._twins))
        return np.array([self.is_on(place, number, now) for place in places], np.bool_)

    def is_on(self, place: int, number: int, now: float) -> bool:
        """One device, at any time."""
        del number
        return self._passed(place, now) % 2 == 1

    def leaves_at(self, place: int, number: int, now: float) -> float:
        """When a device that is on goes off."""
        return now if not self.is_on(place, number, now) else self._next(place, now)

    def returns_at(self, place: int, number: int, now: float) -> float:
        """When it is on again."""
        return now if self.is_on(place, number, now) else self._next(place, now)

    def _passed(self, place: int, now: float) -> int:
        """How many times it has switched up to now; the first is to there, at time 0."""
        return sum(at <= now for at in self._switches_until(place, now))

    def _next(self, place: int, now: float) -> float:
        return next(at for at in self._switches_until(place, now) if at > now)

    def _switches_until(self, place: int, now: float) -> list[float]:
        switches = self._switches[place]
        while switches[-1] <= now:
            switches.append(self._switch_after(place, switches[-1], len(switches) % 2 == 1))
        return switches

    def _switch_after(self, place: int, since: float, is_there: bool) -> float:
        """The end of a stay that began at `since`: unit exponential over the hours' rates."""
        left = -math.log(max(self._luck[place].random(), 1e-300))
        at = self._begins + since
        while True:
            leave, back = rates(self._twins[place].model.availability, hour_of_week(at))
            rate = leave if is_there else back
            until = (math.floor(at / HOUR_S) + 1) * HOUR_S
            if left <= rate * (until - at):
                return at + left / rate - self._begins
            left -= rate * (until - at)
            at = until


def _luck(seed: int, device: str, what: str) -> random.Random:
    return random.Random(f"{seed}/{device}/{what}")  # noqa: S311 - nothing secret is drawn
