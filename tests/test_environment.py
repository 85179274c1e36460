import dataclasses
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from federation.errors import ConfigError
from optimizer.allocation import Effort, Shortlist, allocate
from optimizer.columns import BIG, tabulate
from optimizer.environment import (
    ENVIRONMENT,
    DrawnFleets,
    FederatedRound,
    register_environments,
)
from optimizer.fleets import Setting, draw
from optimizer.observation import costs_at, observe, pair_costs, priced_columns, scale_of
from optimizer.problem import Weights

SMALL = DrawnFleets(users=(3, 8))


def small():
    return FederatedRound(SMALL, most_users=8)


def played(environment, seed, steps=4):
    actions = np.random.default_rng(seed)
    seen, info = environment.reset(seed=seed)
    found = [(seen, 0.0, info["action_mask"])]
    for _ in range(steps):
        action = actions.integers(0, 9, size=8)
        seen, reward, _, _, info = environment.step(action)
        found.append((seen, reward, info["action_mask"]))
    return found


def test_it_is_an_environment_of_gymnasium():
    """Made by name it passes Gymnasium's own checks; registering twice does no harm."""
    register_environments()
    register_environments()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*alternative render modes.*")
        made = gymnasium.make(ENVIRONMENT, world=SMALL, most_users=8)
        check_env(made.unwrapped)
    assert made.spec is not None
    assert made.spec.max_episode_steps == 100


def test_equal_seeds_play_equal_rounds():
    """Two environments with one seed see, pay and allow the same, and another seed does not."""
    first, second, other = played(small(), 1), played(small(), 1), played(small(), 2)

    for ours, theirs in zip(first, second, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a, b)
    assert any(ours[1] != theirs[1] for ours, theirs in zip(first, other, strict=True))


def test_the_mask_is_what_may_be_chosen():
    """A pair is masked if the user has no legal column of it; who is not there sits out."""
    environment = small()
    _, info = environment.reset(seed=3)
    mask, users = info["action_mask"], info["users"]
    table = environment.table

    for user in range(users):
        for pair in range(9):
            columns = table.layout.pair_R == pair
            assert mask[user, pair] == (table.cost_NR[user, columns] < BIG).any()
    assert mask[:users, -1].all()
    assert (mask[users:] == np.eye(9)[-1]).all()


def test_a_step_pays_the_plan_and_proves_its_bound():
    """Reward is the negative objective; users do what was named or sit out; the bound is below."""
    environment = small()
    environment.reset(seed=4, options={"with_bound": True})
    table, seen = environment.table, environment.seen
    pairs = np.random.default_rng(0).integers(0, 9, size=8)

    _, reward, is_over, is_cut, info = environment.step(pairs)

    plan = info["plan"]
    assert (is_over, is_cut) == (False, False)
    assert reward == -plan.objective
    assert info["bound"] <= plan.objective * (1 + 1e-12)
    assert info["terms"]["makespan_s"] == plan.makespan_s
    students = [student.name for student in table.problem.students]
    for user, choice in enumerate(plan.choices):
        if choice.place != "out":
            place = students.index(choice.student) + (4 if choice.place == "twin" else 0)
            assert place == pairs[user]
            assert seen.legal_NP[user, place]


def test_vector_environments_begin_anew_by_the_next_step():
    """Many at once work, and say that the step after an end plans nothing."""
    register_environments()
    many = gymnasium.make_vec(
        ENVIRONMENT, num_envs=2, vectorization_mode="sync", world=SMALL, most_users=8
    )
    seen, info = many.reset(seed=0)

    _, rewards, _, _, _ = many.step(many.action_space.sample())

    assert many.metadata["autoreset_mode"] is gymnasium.vector.AutoresetMode.NEXT_STEP
    assert seen.shape == (2, 8, 87)
    assert info["action_mask"].shape == (2, 8, 9)
    assert (rewards < 0).all()


def test_pair_costs_are_those_of_a_lone_deviation():
    """With enough of everything, moving one user costs what its pairs' costs differ by."""
    setting = Setting(users=4, blocks_per_user=100.0, server_units_per_user=100.0)
    table = tabulate(draw(setting, np.random.default_rng(6)))
    effort = Effort(tolerance=0.0, with_solver=True)
    best = allocate(table, effort=effort)
    costs_NP, scale = costs_at(table, scale_of(table), best.prices), scale_of(table)
    chosen = costs_NP.argmin(axis=1)

    for pair in np.flatnonzero(observe(table)[0].legal_NP[0][:8]):
        pairs_NP = np.eye(9, dtype=bool)[chosen]
        pairs_NP[0] = np.eye(9, dtype=bool)[pair]
        moved = allocate(table, Shortlist(pairs_NP), effort=effort)
        apart = (costs_NP[0, pair] - costs_NP[0, chosen[0]]) * scale.spread / 4
        if costs_NP[0, pair] < 1.9 and "out" not in {c.place for c in moved.choices}:
            # Others may use a later makespan too, so a deviation costs at most what is said.
            assert moved.objective <= best.objective + apart + 1e-6


def test_what_is_seen_has_no_units():
    """Dearer seconds, joules and errors by one factor leave all that is seen as it was."""
    rng = np.random.default_rng(7)
    problem = draw(Setting(users=6), rng)
    weights = Weights(makespan=7.0, energy=7.0, accuracy=7.0)
    once, scale = observe(tabulate(problem))
    again, scaled = observe(tabulate(dataclasses.replace(problem, weights=weights)))

    np.testing.assert_allclose(again.features_NF, once.features_NF, atol=1e-9)
    assert scaled.spread == pytest.approx(7 * scale.spread)


def test_dear_uplink_makes_nothing_cheaper():
    """No pair's cost falls when uplink or server rises in price, or the makespan is cut."""
    table = tabulate(draw(Setting(users=10), np.random.default_rng(8)))
    scale, free_N = scale_of(table), np.zeros(10)
    base_NP = pair_costs(table, scale, priced_columns(table, free_N, 0.0, 10.0))

    for uplink, server, makespan_s in ((0.1, 0.0, 10.0), (0.0, 0.3, 10.0), (0.0, 0.0, 5.0)):
        priced_NR = priced_columns(table, free_N + uplink, server, makespan_s)
        dearer_NP = pair_costs(table, scale, priced_NR)
        assert (dearer_NP >= base_NP - 1e-12).all()
        assert (dearer_NP > base_NP).any()


def test_what_has_no_room_is_refused():
    """A fleet beyond the room, another number of students, a step too early: errors in words."""
    with pytest.raises(ConfigError, match="has room for 2"):
        FederatedRound(SMALL, most_users=2).reset(seed=0)
    with pytest.raises(ConfigError, match="give most_users and students"):
        FederatedRound(SMALL, most_users=8, students=3).reset(seed=0)
    with pytest.raises(gymnasium.error.ResetNeeded):
        small().step(np.zeros(8, dtype=np.int64))


def test_a_fleet_of_nobody_is_seen():
    """No users give no rows, and sitting out alone is no error."""
    environment = FederatedRound(DrawnFleets(users=(0, 0)), most_users=2)
    _, info = environment.reset(seed=0)

    assert info["users"] == 0
    assert environment.seen.legal_NP.shape == (0, 9)
    assert environment.step(np.zeros(2, dtype=np.int64))[4]["plan"].choices == ()
