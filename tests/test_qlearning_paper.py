import dataclasses
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from federation.errors import ConfigError, InvalidProblem
from optimizer.paper import finish_plan
from optimizer.paper_environment import Discretisation, PaperRound
from optimizer.paper_profile import draw_users, paper_profile
from optimizer.paper_qlearning import PaperLearning, learn, plan_by_table
from optimizer.paper_search import enumerate_plans


@pytest.mark.parametrize("levels", [0, 5])
def test_the_papers_round_is_an_environment(levels):
    """Gymnasium's own checks pass, with shares by the convex step and by levels."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*alternative render modes.*")
        check_env(PaperRound(discretisation=Discretisation(share_levels=levels)))


def test_the_reward_is_the_objective_of_the_plan():
    """A step pays the negative objective of the actions, and the episode is over."""
    users = draw_users(np.random.default_rng(0))
    environment = PaperRound()
    state, _ = environment.reset(options={"users": users})

    _, reward, is_over, is_cut, info = environment.step(np.array([0, 3, 4, 7]))

    assert environment.observation_space.contains(state)
    assert (is_over, is_cut) == (True, False)
    assert reward == -finish_plan(paper_profile(), users, [0, 3, 4, 7]).objective
    assert info["plan"].actions == (0, 3, 4, 7)


def test_no_levels_ask_for_more_than_there_is():
    """With levels of CPU and bandwidth each plan spends what there is, and is never the better."""
    users = draw_users(np.random.default_rng(1))
    environment = PaperRound(discretisation=Discretisation(share_levels=5))
    environment.action_space.seed(0)
    for _ in range(50):
        environment.reset(options={"users": users})
        plan = environment.step(environment.action_space.sample())[4]["plan"]

        assert sum(plan.server_ghz) == pytest.approx(10.0)
        assert sum(plan.bandwidth_mhz) == pytest.approx(10.0)
        assert plan.objective >= finish_plan(paper_profile(), users, plan.actions).objective - 1e-12


def test_learning_comes_near_the_enumerated_optimum():
    """Over five draws of users the table's plan is within 0.01 of the optimum, at worst 0.03."""
    profile, rng = paper_profile(), np.random.default_rng(0)
    environment = PaperRound(profile)
    gaps = []
    for _ in range(5):
        users = draw_users(rng)
        plan = plan_by_table(learn(environment, rng, users=users), environment, users)
        gaps.append(plan.objective - enumerate_plans(profile, users).objective)

    assert min(gaps) >= -1e-12
    assert np.mean(gaps) <= 0.01
    assert max(gaps) <= 0.03


def test_equal_seeds_learn_equal_tables():
    """The same generator gives the same table, for rows of users and for one joint row."""
    users = draw_users(np.random.default_rng(2))
    for is_joint in (False, True):
        settings = PaperLearning(episodes=50, is_joint=is_joint)
        tables = [learn(PaperRound(), np.random.default_rng(5), settings, users) for _ in range(2)]
        for state, row in tables[0].rows.items():
            for ours, theirs in zip(row, tables[1].rows[state], strict=True):
                np.testing.assert_array_equal(ours, theirs)


def test_one_table_serves_many_states():
    """Learned over drawn users, a table plans users it never saw better than chance does."""
    rng = np.random.default_rng(0)
    environment = PaperRound(discretisation=Discretisation(device_bins=2, channel_bins=1))
    table = learn(environment, rng, PaperLearning(episodes=2_000))
    ours, chance = [], []
    for _ in range(30):
        users = draw_users(rng)
        ours.append(plan_by_table(table, environment, users).objective)
        chance.append(finish_plan(environment.profile, users, rng.integers(8, size=4)).objective)

    assert len(table.rows) == 16
    assert np.mean(ours) < np.mean(chance) - 0.02


def test_what_cannot_be_is_refused():
    """Steps before a reset, other numbers of users, and unsound settings are errors in words."""
    with pytest.raises(gymnasium.error.ResetNeeded):
        PaperRound().step(np.zeros(4, dtype=np.int64))
    with pytest.raises(ConfigError, match="this environment has 4"):
        PaperRound().reset(options={"users": draw_users(np.random.default_rng(0), 3)})
    with pytest.raises(ConfigError, match="at least one"):
        PaperRound(users=0)
    with pytest.raises(ConfigError, match="learning rate"):
        PaperLearning(learning_rate=0.0)
    with pytest.raises(InvalidProblem, match="server_ghz"):
        dataclasses.replace(paper_profile(), server_ghz=-1.0)
