import numpy as np
import pytest

from optimizer.allocation import Effort, allocate
from optimizer.battery import (
    SAMPLE_BYTES,
    BatteryFleet,
    Conditions,
    Harvest,
    battery_price_per_j,
    unpriced_objective,
)
from optimizer.columns import tabulate
from optimizer.environment import FederatedRound
from optimizer.fleets import Setting

QUICK = Effort(tolerance=5e-2, with_solver=False)


def lived(conditions, rounds, users=8, seed=0):
    """The mean objective of so many rounds, and the charges on the way."""
    rng, world = np.random.default_rng(seed), BatteryFleet(conditions, small(users))
    problem, costs, charges = world.begin(rng), [], []
    for _ in range(rounds):
        plan = allocate(tabulate(problem), effort=QUICK)
        for choice, user in zip(plan.choices, problem.users, strict=True):
            assert choice.energy_j <= user.energy_budget_j * (1 + 1e-9)
        costs.append(unpriced_objective(problem, plan))
        problem = world.after(plan, rng)
        charges.append(world.charge_j.copy())
    return np.mean(costs), np.array(charges)


def small(users):
    fleet = BatteryFleet().setting
    return Setting(users=users, weights=fleet.weights, absent_accuracy=0.0)


def test_an_emptier_battery_is_dearer():
    """The price falls in a straight line from an empty battery's to nothing."""
    prices = [battery_price_per_j(charge, 12.0, 6.0) for charge in (-1.0, 0.0, 6.0, 12.0, 13.0)]

    assert prices == [2.0, 2.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize(("day_rounds", "better"), [(0, 0.1), (24, 0.15)])
def test_priced_batteries_last_longer(day_rounds, better):
    """Over two days the priced plans cost less than the myopic ones, and leave more charge."""
    harvest = Harvest(mean_j=0.3, day_rounds=day_rounds)
    myopic, drained = lived(Conditions(harvest=harvest), 48)
    priced, kept = lived(Conditions(harvest=harvest, price_weight=12.0), 48)

    assert priced < (1 - better) * myopic
    assert kept[-1].mean() > drained[-1].mean()
    assert drained.min() >= 0
    assert kept.max() <= 12.0


def test_the_unpriced_objective_is_the_objective_without_prices():
    """Without battery prices the two are equal; with them the priced one is higher."""
    for weight in (0.0, 12.0):
        rng, world = np.random.default_rng(1), BatteryFleet(Conditions(price_weight=weight))
        problem = world.begin(rng)
        plan = allocate(tabulate(problem), effort=QUICK)
        plain = unpriced_objective(problem, plan)

        assert plan.objective >= plain - 1e-9
        assert (plan.objective == pytest.approx(plain)) == (weight == 0.0)


def test_a_fed_twin_is_fresh():
    """Users whose twin trained owe it one round's data, the others one more than before."""
    rng, world = np.random.default_rng(2), BatteryFleet()
    problem = world.begin(rng)
    first = allocate(tabulate(problem), effort=QUICK)
    second = world.after(first, rng)

    seen = set()
    for choice, user in zip(first.choices, second.users, strict=True):
        if user.twin is not None:
            rounds = 1 if choice.place == "twin" else 2
            expected = rounds * 0.15 * user.samples * SAMPLE_BYTES
            assert user.twin.unseen_bytes == pytest.approx(expected)
            seen.add(rounds)
    assert seen == {1, 2}


def test_night_brings_nothing():
    """By day twice the mean comes in, by night nothing, and over days it is the same as steady."""
    harvest, rng = Harvest(mean_j=0.5, day_rounds=10), np.random.default_rng(3)
    joules = np.array([harvest.joules(r, 4000, rng).mean() for r in range(20)])

    assert (joules[[5, 9, 15, 19]] == 0).all()
    assert joules.mean() == pytest.approx(0.5, rel=0.05)


def test_an_episode_ends_when_all_is_spent():
    """In the environment a fleet goes on over rounds, and ends when no battery holds anything."""
    conditions = Conditions(capacity_j=1.0, harvest=Harvest(mean_j=0.0))
    environment = FederatedRound(BatteryFleet(conditions, small(4)), most_users=4)
    environment.reset(seed=0)
    names = [user.name for user in environment.table.problem.users]
    environment.step(np.zeros(4, dtype=np.int64))
    assert [user.name for user in environment.table.problem.users] == names

    environment.world.charge_j = np.zeros(4)
    _, _, is_over, is_cut, info = environment.step(np.full(4, 8))
    assert (is_over, is_cut, info["users"]) == (True, False, 0)
