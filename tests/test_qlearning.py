import dataclasses
import itertools

import numpy as np
import pytest

from federation.errors import ConfigError, StoreError
from optimizer.allocation import Effort, Shortlist, allocate
from optimizer.columns import tabulate
from optimizer.environment import DrawnFleets, FederatedRound
from optimizer.fleets import Setting, draw
from optimizer.heuristics import AllAt, FedCS, Greedy, Oort, Random
from optimizer.observation import observe
from optimizer.qlearning import (
    FairPrices,
    LinearValues,
    QPlanner,
    TableValues,
    cheapest_pairs,
    safe_pairs,
)
from optimizer.qlearning_file import load_values, save_values
from optimizer.qlearning_neural import NeuralValues
from optimizer.qlearning_training import Training, train

STUDENTS = ("resnet8", "resnet20", "resnet32", "resnet56")
QUICK = Effort(tolerance=5e-3, with_solver=False)


def fleet(users, seed, **setting):
    return tabulate(draw(Setting(users=users, **setting), np.random.default_rng(seed)))


@pytest.fixture(scope="module")
def trained():
    """Trained for 60 rounds on fleets of 10 to 30, and never shown an optimum."""
    environment = FederatedRound(DrawnFleets(users=(10, 30)), most_users=30)
    return train(environment, np.random.default_rng(0), Training(rounds=60))


def test_a_short_training_beats_every_baseline(trained):
    """On larger fleets it has not seen, Q's plans cost less than those of all known planners."""
    rng = np.random.default_rng(1)
    planners = {
        "q": QPlanner(trained, 1),
        "q2": QPlanner(trained, 2),
        "random": Random(rng),
        "all on devices": AllAt("device"),
        "smallest on devices": AllAt("device", "smallest"),
        "all at twins": AllAt("twin"),
        "greedy": Greedy(),
        "fedcs": FedCS(round_s=30.0),
        "oort": Oort(rng),
    }
    costs = {name: [] for name in planners}
    bounds = []
    for seed in (11, 12, 13):
        table = fleet(60, seed)
        bounds.append(allocate(table, effort=QUICK).bound)
        for name, planner in planners.items():
            costs[name].append(allocate(table, planner.choose(table), effort=QUICK).objective)

    for name in set(planners) - {"q", "q2"}:
        assert (np.array(costs["q"]) < np.array(costs[name])).all(), name
    assert np.sum(costs["q2"]) <= np.sum(costs["q"])
    assert np.mean(np.divide(costs["q"], bounds)) < 1.07
    assert np.mean(np.divide(costs["q2"], bounds)) < 1.02


def test_a_longer_shortlist_never_hurts(trained):
    """What a shorter list keeps, a longer one keeps too."""
    table = fleet(25, 3)
    lists = [QPlanner(trained, k).choose(table).pairs_NP for k in (1, 2, 3, 9)]

    for shorter, longer in itertools.pairwise(lists):
        assert not (shorter & ~longer).any()
    legal_NP = observe(table)[0].legal_NP
    assert (lists[-1] == legal_NP).all()


def test_the_safe_pair_is_the_least_to_serve():
    """It is the smallest student that the device may train; without one, the least at the twin."""
    table = fleet(40, 4)
    legal_NP = observe(table)[0].legal_NP
    safe_NP = safe_pairs(table, legal_NP)

    for user in range(40):
        legal = np.flatnonzero(legal_NP[user, :8])
        assert np.flatnonzero(safe_NP[user]).tolist() == legal[:1].tolist()
    without = legal_NP.copy()
    without[:, :4] = False
    for user in range(40):
        legal = np.flatnonzero(without[user, :8])
        assert np.flatnonzero(safe_pairs(table, without)[user]).tolist() == legal[:1].tolist()


def test_the_safe_pair_saves_a_wrong_q():
    """A Q that puts everybody at the twin loses less of the round with the safe pair kept."""

    @dataclasses.dataclass(frozen=True)
    class TwinsOnly:
        def costs(self, seen):
            costs_NP = np.ones(seen.legal_NP.shape)
            costs_NP[:, 7] = 0.0
            costs_NP[:, 8] = 0.5
            return costs_NP

        def learned(self, _seen, _costs_NP, _weights_NP):
            return self

    table = fleet(40, 5)
    kept, bare = (
        allocate(table, QPlanner(TwinsOnly(), 1, safe).choose(table), effort=QUICK).objective
        for safe in (True, False)
    )
    assert kept < 0.8 * bare


def test_only_legal_pairs_stay():
    """Illegal pairs are not kept however cheap they look, and of equal ones the first is kept."""
    costs_NP = np.array([[0.0, 1.0, 2.0, 3.0], [1.0, 1.0, 1.0, 1.0]])
    legal_NP = np.array([[False, True, True, True], [True, True, True, True]])

    assert cheapest_pairs(costs_NP, legal_NP, 2).tolist() == [
        [False, True, True, False],
        [True, True, False, False],
    ]


def test_least_squares_is_least_squares():
    """Without forgetting, learning in steps gives the ridge solution over all that was seen."""
    rng = np.random.default_rng(6)
    seen = [observe(fleet(12, seed))[0] for seed in range(3)]
    values = LinearValues.blank(9, forgetting=1.0)
    targets = [rng.uniform(0, 2, each.legal_NP.shape) for each in seen]
    weights = [rng.uniform(0, 1, each.legal_NP.shape) for each in seen]
    for each, target_NP, weight_NP in zip(seen, targets, weights, strict=True):
        values = values.learned(each, target_NP, weight_NP)

    for pair in (0, 4, 8):
        rows = []
        for each in seen:
            costs = np.hstack([each.costs_NPL[:, pair], np.ones((12, 1))])
            around = np.hstack([np.ones((12, 1)), each.around_NC - [0.7, -0.5, 0.3, 0.8, 0.0, 0.0]])
            rows.append((around[:, :, None] * costs[:, None, :]).reshape(12, -1))
        x, y = np.vstack(rows), np.concatenate([each[:, pair] for each in targets])
        w = np.concatenate([each[:, pair] for each in weights])
        prior = np.eye(x.shape[1])[0]
        gram = (x.T * w) @ x + (1e-2 + 1e-3) * np.eye(x.shape[1])
        expected = np.linalg.solve(gram, (x.T * w) @ y + 1e-2 * prior)
        np.testing.assert_allclose(values.weights_PF[pair], expected, rtol=1e-6, atol=1e-8)


def test_a_table_learns_means():
    """A cell holds the mean of what it has seen, and says fair prices of what it has not."""
    seen, _ = observe(fleet(30, 7))
    blank = TableValues.blank(9)
    taught = blank.learned(seen, np.full((30, 9), 0.5), np.ones((30, 9)))
    again = taught.learned(seen, np.full((30, 9), 1.5), np.ones((30, 9)))

    np.testing.assert_array_equal(blank.costs(seen), FairPrices().costs(seen))
    np.testing.assert_allclose(taught.costs(seen), 0.5)
    np.testing.assert_allclose(again.costs(seen), 1.0)


def test_a_network_learns_what_it_is_told():
    """The small network begins at fair prices, and comes to what it is told again and again."""
    seen, _ = observe(fleet(30, 12))
    values = NeuralValues(9, np.random.default_rng(0), steps=20)
    np.testing.assert_array_equal(values.costs(seen), FairPrices().costs(seen))
    told_NP = seen.costs_NPL[:, :, 6]
    before = np.abs(values.costs(seen) - told_NP).mean()

    for _ in range(10):
        values = values.learned(seen, told_NP, np.ones((30, 9)))

    assert np.abs(values.costs(seen) - told_NP).mean() < before / 3


@pytest.mark.parametrize("is_counterfactual", [True, False])
def test_equal_seeds_train_equal_values(is_counterfactual):
    """The same generator gives the same Q, for both ways to learn."""
    settings = Training(rounds=5, is_counterfactual=is_counterfactual)
    first, second = (
        train(
            FederatedRound(DrawnFleets(users=(3, 8)), most_users=8),
            np.random.default_rng(3),
            settings,
        )
        for _ in range(2)
    )
    np.testing.assert_array_equal(first.weights_PF, second.weights_PF)


def test_who_comes_first_does_not_matter(trained):
    """Users in another order keep the same pairs."""
    problem = draw(Setting(users=20), np.random.default_rng(8))
    turned = dataclasses.replace(problem, users=problem.users[::-1])

    kept, kept_turned = (
        QPlanner(trained).choose(tabulate(each)).pairs_NP for each in (problem, turned)
    )
    np.testing.assert_array_equal(kept, kept_turned[::-1])


def test_q_plans_without_legal_work():
    """Users that may do nothing sit out, and a fleet of nobody has an empty shortlist."""
    problem = draw(Setting(users=3), np.random.default_rng(9))
    idle = tuple(dataclasses.replace(user, modes=(), twin=None) for user in problem.users)
    table = tabulate(dataclasses.replace(problem, users=idle))
    plan = allocate(table, QPlanner(FairPrices()).choose(table))
    assert [choice.place for choice in plan.choices] == ["out"] * 3

    nobody = tabulate(dataclasses.replace(problem, users=()))
    assert isinstance(QPlanner(FairPrices()).choose(nobody), Shortlist)


@pytest.mark.parametrize("blank", [LinearValues.blank(9), TableValues.blank(9)])
def test_a_file_gives_the_same_plans(tmp_path, blank):
    """A Q that was saved and loaded says the same costs and goes on learning the same."""
    seen, _ = observe(fleet(10, 10))
    values = blank.learned(seen, seen.costs_NPL[:, :, 3], np.ones((10, 9)))
    save_values(values, STUDENTS, tmp_path / "deep" / "q.safetensors")

    loaded = load_values(tmp_path / "deep" / "q.safetensors", STUDENTS)

    np.testing.assert_array_equal(loaded.costs(seen), values.costs(seen))
    more = [
        each.learned(seen, seen.costs_NPL[:, :, 1], np.ones((10, 9))) for each in (values, loaded)
    ]
    np.testing.assert_array_equal(more[0].costs(seen), more[1].costs(seen))


def test_what_is_no_learned_q_is_refused(tmp_path):
    """Missing or broken files, other students, another catalogue, bad settings: errors in words."""
    path = tmp_path / "q.safetensors"
    with pytest.raises(StoreError, match="not a learned Q"):
        load_values(path, STUDENTS)
    path.write_bytes(b"\x80\x04nonsense")
    with pytest.raises(StoreError, match="not a learned Q"):
        load_values(path, STUDENTS)
    save_values(LinearValues.blank(9), STUDENTS, path)
    with pytest.raises(StoreError, match="resnet56"):
        load_values(path, STUDENTS[:3])
    bad = dataclasses.replace(LinearValues.blank(9), weights_PF=np.full((9, 70), np.nan))
    save_values(bad, STUDENTS, path)
    with pytest.raises(StoreError, match="not finite"):
        load_values(path, STUDENTS)
    with pytest.raises(ConfigError, match="train one for this catalogue"):
        QPlanner(LinearValues.blank(7)).choose(fleet(3, 0))
    with pytest.raises(ConfigError, match="at least 1"):
        QPlanner(FairPrices(), 0)
    with pytest.raises(ConfigError, match="at least 1 round"):
        Training(rounds=0)
