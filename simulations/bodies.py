"""The physical side of a whole fleet: what each device is, in arrays by place.

A device's place is its index in the fleet's order. What a class fixes is kept once; what each
device draws is drawn once, from the seed. An idle device costs a few bytes, and on mains one.
"""

import functools
import math
from collections.abc import Callable

import msgspec
import numpy as np
import numpy.typing as npt

from federation.protocol.messages import LocalPlan, ModelSpec
from simulations.bus import LinkQuality
from simulations.draws import key_of, uniforms
from simulations.tables import DevicePlan, FleetPlan, LinkPlan, Range
from twin.physics import (
    Physics,
    charge_after,
    charged_at,
    training_bytes,
    training_j,
    training_s,
    transfer_j,
)

_HOUR_S = 3600.0

Floats = npt.NDArray[np.float64]


class Bodies:
    """All devices of a fleet. Only `spend` changes anything.

    Args:
        fleet: How many, and of which levels.
        link: Of all of them.
        device: Their classes, pace, batteries and clocks.
        seed: Decides who is of which class, and what each draws.
        starts_hour: The hour of the week at time 0; batteries charge by the hour of the day.
    """

    def __init__(
        self,
        fleet: FleetPlan,
        link: LinkPlan,
        device: DevicePlan,
        *,
        seed: int,
        starts_hour: float = 0.0,
    ) -> None:
        self.devices = fleet.devices
        self.classes: tuple[Physics, ...] = tuple(kind.physics() for kind in device.classes) or (
            Physics(step_s=device.seconds_per_step),
        )
        self.class_of = _dealt([kind.share for kind in device.classes], fleet.devices, seed)
        self._link = link
        self._levels = levels_of(fleet)
        self._class_levels = [kind.level for kind in device.classes] or [0]
        self._starts_s = starts_hour * _HOUR_S
        draw = functools.partial(_drawn, devices=fleet.devices, seed=seed)
        spread = math.log1p(device.spread)
        self._log_pace = draw("pace", (-spread, spread))
        self._offset_s = draw("clock-offset", (-device.clock_offset_s, device.clock_offset_s))
        drift = device.clock_drift_ppm / 1e6
        self._drift = draw("clock-drift", (-drift, drift))
        self._charge = _Charge(self.classes, self.class_of, draw("charge", device.initial_charge))

    # What it is ---------------------------------------------------------------------------

    def physics(self, place: int) -> Physics:
        """The figures of its class."""
        return self.classes[int(self.class_of[place])]

    def pace(self, place: int) -> float:
        """How many times slower than its class it trains."""
        return math.exp(self._log_pace[place])

    def level(self, place: int) -> int:
        """How much of a model with levels it can train; 0 is all of it."""
        own = self._class_levels[int(self.class_of[place])]
        return own or int(self._levels[place % len(self._levels)])

    def quality(self, place: int) -> LinkQuality:
        """Its link: one object for a whole class."""
        return self._qualities[int(self.class_of[place])]

    def memory_bytes(self, place: int) -> int:
        """What training may use; 0 for no limit."""
        return self.physics(place).memory_bytes

    def fits(self, place: int, plan: LocalPlan) -> bool:
        """Whether its memory is enough for weights, gradients and momentum of this plan."""
        limit = self.memory_bytes(place)
        if limit == 0:
            return True
        parameters = self._cost(plan.model)[0]
        return training_bytes(parameters, has_momentum=plan.momentum > 0.0) <= limit

    def clock_of(self, place: int) -> tuple[float, float]:
        """What its clock shows at time 0, in seconds, and its rate less 1."""
        return float(self._offset_s[place]), float(self._drift[place])

    # What it does -------------------------------------------------------------------------

    def training_s(
        self, place: int, plan: LocalPlan, steps: int, samples: int | None = None
    ) -> float:
        """How long it trains.

        Args:
            place: Of the device.
            plan: What it trains.
            steps: Batches.
            samples: How many it holds; full batches are assumed where this is not said.
        """
        return self._training(training_s, place, plan, steps, samples)

    def training_j(
        self, place: int, plan: LocalPlan, steps: int, samples: int | None = None
    ) -> float:
        """The energy that takes, above idle; the arguments are those of `training_s`."""
        return self._training(training_j, place, plan, steps, samples)

    def step_s(self, place: int) -> float:
        """How long it takes for a step, without what its samples cost."""
        return self.physics(place).step_s * self.pace(place)

    def transfer_j(self, place: int, up_bytes: int, down_bytes: int) -> float:
        """The energy to send and receive so many bytes."""
        return transfer_j(self.physics(place), up_bytes, down_bytes)

    # Its battery --------------------------------------------------------------------------

    def spend(self, place: int, joules: float, now: float) -> bool:
        """Take energy from its battery; False: that is empty, and it goes off.

        An empty one is back when it has charged to `restart_share`: see `back_at`.
        """
        return self._charge.spend(place, joules, now + self._starts_s)

    def back_at(self, place: int, now: float) -> float:
        """When it is on again after it ran empty: `now` if it did not; inf for never."""
        return max(self._charge.off_until(place) - self._starts_s, now)

    def charge_of(self, place: int, now: float) -> float:
        """How full its battery is, from 0 to 1; 1 on mains."""
        return self._charge.share(place, now + self._starts_s)

    def powered(self, now: float) -> npt.NDArray[np.bool_]:
        """Which devices are not off for an empty battery, all at once.

        An idle device drains, too, but is found empty only when it is next asked to spend.
        """
        return self._charge.powered(now + self._starts_s)

    # --------------------------------------------------------------------------------------

    @functools.cached_property
    def _qualities(self) -> list[LinkQuality]:
        link = self._link
        return [
            LinkQuality(
                delay_s=link.delay_s,
                loss=link.loss,
                duplicates=link.duplicates,
                up_bps=_lower(link.up_bps, kind.up_bps),
                down_bps=_lower(link.down_bps, kind.down_bps),
            )
            for kind in self.classes
        ]

    def _training(
        self,
        measure: Callable[..., float],
        place: int,
        plan: LocalPlan,
        steps: int,
        samples: int | None,
    ) -> float:
        physics = self.physics(place)
        # Not counted where nothing depends on it: counting builds the model.
        macs = self._cost(plan.model)[1] if physics.macs_per_s < math.inf else 0
        seen = steps * plan.batch_size if samples is None else _seen(plan, steps, samples)
        return measure(physics, steps=steps, samples=seen, macs=macs, pace=self.pace(place))

    @functools.cached_property
    def _costs(self) -> dict[bytes, tuple[int, int]]:
        return {}

    def _cost(self, model: ModelSpec) -> tuple[int, int]:
        """The parameters of a model, and its multiply-adds for a sample."""
        key = msgspec.msgpack.encode(model)
        if (cost := self._costs.get(key)) is None:
            from federation.learning.costs import count_macs, count_parameters

            cost = self._costs[key] = (count_parameters(model), count_macs(model))
        return cost


class _Charge:
    """The batteries of a fleet, brought up to date when they are looked at.

    Times are since a Monday at midnight. Fleets on mains keep nothing.
    """

    def __init__(
        self, classes: tuple[Physics, ...], class_of: npt.NDArray[np.uint8], shares: Floats
    ) -> None:
        self._classes, self._class_of = classes, class_of
        capacity = np.array([kind.battery_j for kind in classes])
        self._has_any = bool(capacity.any())
        if self._has_any:
            self._charge_j = capacity[class_of] * shares
            self._since_s = np.full(len(class_of), -1.0)
            self._off_until_s = np.full(len(class_of), -np.inf)

    def spend(self, place: int, joules: float, at_s: float) -> bool:
        kind = self._classes[int(self._class_of[place])]
        if kind.battery_j <= 0.0:
            return True
        if at_s < self._off_until_s[place]:
            return False
        left_j = self._now_j(place, kind, at_s) - joules
        self._since_s[place] = at_s
        self._charge_j[place] = max(left_j, 0.0)
        if left_j > 0.0:
            return True
        enough_j = kind.restart_share * kind.battery_j
        self._off_until_s[place] = charged_at(kind, 0.0, at_s, enough_j)
        return False

    def share(self, place: int, at_s: float) -> float:
        kind = self._classes[int(self._class_of[place])]
        return self._now_j(place, kind, at_s) / kind.battery_j if kind.battery_j > 0.0 else 1.0

    def off_until(self, place: int) -> float:
        return float(self._off_until_s[place]) if self._has_any else -math.inf

    def powered(self, at_s: float) -> npt.NDArray[np.bool_]:
        if not self._has_any:
            return np.ones(len(self._class_of), np.bool_)
        on: npt.NDArray[np.bool_] = self._off_until_s <= at_s
        return on

    def _now_j(self, place: int, kind: Physics, at_s: float) -> float:
        since_s, charge_j = float(self._since_s[place]), float(self._charge_j[place])
        if since_s < 0.0:  # Never asked before: what it began with is what it has.
            return charge_j
        if (back_s := float(self._off_until_s[place])) > since_s:
            if at_s < back_s:
                return 0.0
            since_s, charge_j = back_s, kind.restart_share * kind.battery_j
        return charge_after(kind, charge_j, since_s, at_s)


def levels_of(plan: FleetPlan) -> npt.NDArray[np.int64]:
    """Gives how much of a model each device can train, over and over; 0 is all of it."""
    if plan.level_shares:
        rng = np.random.default_rng([plan.seed, 3])
        shares = np.array(plan.level_shares) / sum(plan.level_shares)
        return 1 + rng.choice(len(shares), size=plan.devices, p=shares)
    return np.array(plan.levels or (0,))


def _dealt(shares: list[float], devices: int, seed: int) -> npt.NDArray[np.uint8]:
    """The class of each device: as many of each as its share says, in an order that is drawn."""
    if len(shares) < 2:
        return np.zeros(devices, np.uint8)
    ends = np.rint(np.cumsum(shares) / sum(shares) * devices).astype(np.int64)
    classes = np.searchsorted(ends, np.arange(devices), "right").astype(np.uint8)
    return np.random.default_rng([seed, 4]).permutation(classes)


def _drawn(what: str, among: Range, *, devices: int, seed: int) -> Floats:
    """A number for each device, uniform in a range; one that all share where that is a point."""
    low, high = among
    if low == high:
        return np.broadcast_to(np.float64(low), devices)
    return low + (high - low) * uniforms(key_of(seed, f"bodies/{what}"), np.arange(devices))


def _seen(plan: LocalPlan, steps: int, samples: int) -> int:
    """How many samples so many steps see: the last batch of an epoch may be smaller."""
    each = math.ceil(samples / plan.batch_size)
    if each == 0:
        return 0
    epochs, rest = divmod(steps, each)
    return epochs * samples + rest * plan.batch_size


def _lower(one: float, other: float) -> float:
    """The lower of two rates, of which 0 is no limit."""
    return min(one, other) if one > 0.0 < other else one + other
