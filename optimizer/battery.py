"""Rounds that hang together: batteries that are drained and charged, twins that grow stale.

The best plan of a round empties the batteries that it likes best. A price for each joule, higher
the emptier the battery, keeps plans good over days: drift-plus-penalty (Neely, "Stochastic
Network Optimization", 2010, chapter 4) with half the squared missing charge as the Lyapunov
function.
"""

from dataclasses import dataclass, replace

import numpy as np

from optimizer.columns import Floats
from optimizer.fleets import Setting, draw
from optimizer.plan import Plan
from optimizer.problem import Problem, User, Weights

SERVER_ENERGY_ONLY = Weights(energy=1e-6, server_energy=1e5)
"""The default weights, but a device's joules cost nothing: its battery is the limit."""


def battery_price_per_j(
    charge_j: float, capacity_j: float, weight: float, energy_ref_j: float = 3.0
) -> float:
    """The price of a joule: `weight` / `energy_ref_j` with an empty battery, 0 with a full one.

    A `weight` of 1 makes a joule of an empty battery as dear as one is in `Weights` with
    `energy` at 1. To be given as `User.battery_price_per_j`.
    """
    missing = min(1.0, max(0.0, 1.0 - charge_j / capacity_j))
    return weight * missing / energy_ref_j


@dataclass(frozen=True, slots=True)
class Harvest:
    """Energy that comes in: exponential with this mean, for each device and round.

    With `day_rounds` above 0 it comes only in the first half of each day of so many rounds,
    twice as much: the mean over days is the same.
    """

    mean_j: float = 0.3
    day_rounds: int = 0

    def joules(self, round_number: int, users: int, rng: np.random.Generator) -> Floats:
        """What each device gets in a round."""
        mean_j = self.mean_j
        if self.day_rounds:
            is_day = round_number % self.day_rounds < self.day_rounds / 2
            mean_j = 2.0 * mean_j if is_day else 0.0
        return rng.exponential(1.0, users) * mean_j


@dataclass(frozen=True, slots=True)
class Conditions:
    """What the batteries, links and twins of a fleet are like.

    Each round a share `new_data` of a user's samples is new to its twin, until the twin is fed;
    goodputs fade by a log-normal factor with `fading` as its deviation.
    """

    capacity_j: float = 12.0
    harvest: Harvest = Harvest()
    new_data: float = 0.15
    fading: float = 0.25
    price_weight: float = 0.0


class BatteryFleet:
    """A world of one fleet over many rounds, for `FederatedRound` and for plain loops.

    With `price_weight` above 0 each round's problem carries the price of every battery. Unless
    the setting says otherwise, who sits a round out counts as knowing nothing in it.
    """

    def __init__(
        self, conditions: Conditions | None = None, setting: Setting | None = None
    ) -> None:
        self.conditions = conditions or Conditions()
        self.setting = setting or Setting(users=50, weights=SERVER_ENERGY_ONLY, absent_accuracy=0.0)
        self._fleet: Problem | None = None
        self.charge_j: Floats = np.zeros(0)
        self._unseen: Floats = np.zeros(0)
        self._round = 0

    def begin(self, rng: np.random.Generator) -> Problem:
        """A fleet whose batteries are between half full and full."""
        self._fleet = draw(self.setting, rng)
        users, self._round = len(self._fleet.users), 0
        self.charge_j = self.conditions.capacity_j * rng.uniform(0.5, 1.0, users)
        self._unseen = np.full(users, self.conditions.new_data)
        return self._open(self._fleet, rng)

    def after(self, plan: Plan, rng: np.random.Generator) -> Problem | None:
        """The same fleet when it has spent, harvested and gathered data; None: all is spent."""
        if self._fleet is None:
            return None
        conditions, users = self.conditions, len(self._fleet.users)
        spent_j = np.array([choice.energy_j for choice in plan.choices])
        fed = np.array([choice.place == "twin" for choice in plan.choices], bool)
        harvest_j = conditions.harvest.joules(self._round, users, rng)
        left_j = np.maximum(0.0, self.charge_j - spent_j)
        self.charge_j = np.minimum(conditions.capacity_j, left_j + harvest_j)
        self._unseen = np.where(fed, 0.0, self._unseen) + conditions.new_data
        self._unseen = np.minimum(1.0, self._unseen)
        self._round += 1
        if conditions.harvest.mean_j == 0.0 and not self.charge_j.any():
            return None
        return self._open(self._fleet, rng)

    def _open(self, fleet: Problem, rng: np.random.Generator) -> Problem:
        fading = np.exp(self.conditions.fading * rng.standard_normal(len(fleet.users)))
        users = (
            self._user(user, *state)
            for user, *state in zip(fleet.users, self.charge_j, self._unseen, fading, strict=True)
        )
        return replace(fleet, users=tuple(users))

    def _user(self, user: User, charge_j: float, unseen: float, fading: float) -> User:
        conditions, twin = self.conditions, user.twin
        if twin is not None:
            # `draw` made the whole of unseen_bytes of a share; here the share changes.
            twin = replace(twin, unseen_bytes=unseen * user.samples * SAMPLE_BYTES)
        return replace(
            user,
            twin=twin,
            energy_budget_j=float(charge_j),
            goodput_bytes_per_s=tuple(float(fading) * each for each in user.goodput_bytes_per_s),
            battery_price_per_j=battery_price_per_j(
                float(charge_j), conditions.capacity_j, conditions.price_weight
            ),
        )


SAMPLE_BYTES = 3075.0
"""A sample on its way to the twin: a picture of 32 x 32 pixels and its label."""


def unpriced_objective(problem: Problem, plan: Plan) -> float:
    """A plan's objective without what the batteries' prices added."""
    weights, users = problem.weights, max(1, len(problem.users))
    joules = plan.energy_j + weights.server_energy * plan.server_energy_j
    return (
        weights.makespan * plan.makespan_s / weights.time_ref_s
        + weights.energy * joules / (weights.energy_ref_j * users)
        + weights.accuracy * (problem.teacher_accuracy - plan.accuracy) / weights.accuracy_ref
    )
