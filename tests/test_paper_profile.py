import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from federation.errors import InvalidProblem
from optimizer.paper import divide_resources, finish_plan, shared_cost, tabulate
from optimizer.paper_profile import PaperUsers, draw_users, paper_profile
from optimizer.paper_search import descend, enumerate_plans, plan_with_student

SEEDS = st.integers(0, 2**32 - 1)
DELTAS = st.sampled_from([0.0, 1e-3, 0.02, 1.0])


def some_fleet(seed, delta=0.0, users=4):
    rng = np.random.default_rng(seed)
    profile = dataclasses.replace(paper_profile(), bandwidth_weight=delta)
    return profile, draw_users(rng, users), rng.integers(profile.actions, size=users)


def amounts(profile, users, actions):
    table, of_all = tabulate(profile, users), np.arange(len(users))
    return table.server_work[of_all, actions], table.upload[of_all, actions]


def cost_of_shares(profile, work, upload, ghz, mhz):
    delays = (work / ghz + upload / mhz).sum()
    return profile.delay_weight * delays + profile.bandwidth_weight * mhz.sum()


@given(SEEDS, DELTAS, st.integers(1, 12))
@settings(max_examples=100, deadline=None)
def test_the_convex_step_meets_its_conditions(seed, delta, count):
    """CPU is spent whole, bandwidth when it is free or scarce, and all users gain alike at last."""
    profile, users, actions = some_fleet(seed, delta, count)
    work, upload = amounts(profile, users, actions)

    ghz, mhz = divide_resources(profile, work, upload)

    assert ghz.sum() == pytest.approx(profile.server_ghz, rel=1e-12)
    assert mhz.sum() <= profile.bandwidth_mhz * (1 + 1e-12)
    cpu_gains = profile.delay_weight * work / ghz**2
    np.testing.assert_allclose(cpu_gains, cpu_gains[0], rtol=1e-9)
    band_gains = profile.delay_weight * upload / mhz**2
    np.testing.assert_allclose(band_gains, band_gains[0], rtol=1e-9)
    scarcity = band_gains[0] - delta
    assert scarcity >= -1e-9
    assert scarcity * (profile.bandwidth_mhz - mhz.sum()) == pytest.approx(0, abs=1e-6)


def slopes_of_shares(profile, work, upload, ghz, mhz):
    ours = [-profile.delay_weight * work / ghz**2, -profile.delay_weight * upload / mhz**2]
    ours[1] = ours[1] + profile.bandwidth_weight
    return np.concatenate(ours)


def test_the_closed_form_is_what_a_solver_finds():
    """On 100 fleets SLSQP finds no better division, and the same where it converges."""
    for seed in range(100):
        profile, users, actions = some_fleet(seed, [0.0, 0.02][seed % 2])
        work, upload = amounts(profile, users, actions)
        ours = cost_of_shares(profile, work, upload, *divide_resources(profile, work, upload))

        found = minimize(
            lambda x, p=profile, w=work, u=upload: cost_of_shares(p, w, u, x[:4], x[4:]),
            np.full(8, 2.0),
            jac=lambda x, p=profile, w=work, u=upload: slopes_of_shares(p, w, u, x[:4], x[4:]),
            method="SLSQP",
            bounds=[(0.05, 10.0)] * 8,
            constraints=[
                {"type": "ineq", "fun": lambda x, u=used: 10.0 - u @ x, "jac": lambda _, u=used: -u}
                for used in np.repeat(np.eye(2), 4, axis=1)
            ],
            options={"ftol": 1e-12, "maxiter": 200},
        )

        assert ours == pytest.approx(found.fun, abs=1e-9)
        assert ours <= found.fun + 1e-9


@given(SEEDS, DELTAS)
@settings(max_examples=50, deadline=None)
def test_the_two_sums_give_the_whole_objective(seed, delta):
    """A plan's objective is its separable part and a function of two sums over users."""
    profile, users, actions = some_fleet(seed, delta)
    table, of_all = tabulate(profile, users), np.arange(4)
    work, upload = amounts(profile, users, actions)

    plan = finish_plan(profile, users, actions)

    shared = shared_cost(profile, np.sqrt(work).sum(), np.sqrt(upload).sum())
    expected = (shared + table.separable[of_all, actions].sum()) / 4
    assert plan.objective == pytest.approx(expected, rel=1e-9)


def test_a_plan_by_hand():
    """One user on its device: teacher at 10 GHz, student at 1 GHz, model and labels at 10 MHz."""
    profile = paper_profile()
    users = PaperUsers(np.array([1.0]), np.array([1e-8]))
    bits_per_hz = np.log2(1 + 0.1 * 1e-8 / 4e-14)

    plan = finish_plan(profile, users, [3])

    delay_s = 14 / 10 + 8.75 / 1.0 + (1.234 * 32 + 102.4) / (10 * bits_per_hz)
    assert plan.delay_s == pytest.approx(delay_s)
    assert plan.objective_unpriced == pytest.approx(0.01 * delay_s - 0.8946 - 0.2581)
    assert plan.objective == pytest.approx(plan.objective_unpriced + 0.008 * 14)
    assert (plan.students.tolist(), plan.is_local.tolist()) == ([1], [True])


def test_enumeration_finds_the_least_objective():
    """No plan that is drawn, and none of a small fleet, is better than the enumerated one."""
    profile, users, _ = some_fleet(3, users=2)
    best = enumerate_plans(profile, users)

    values = [finish_plan(profile, users, [a, b]).objective for a in range(8) for b in range(8)]

    assert best.evaluations == 64
    assert best.objective == pytest.approx(min(values), rel=1e-12)


@pytest.mark.parametrize("split", ["non_iid", "iid"])
def test_coordinate_descent_comes_to_the_optimum(split):
    """On 100 draws descent is within 0.001 of the enumerated optimum, and mostly there."""
    profile, rng = paper_profile(split), np.random.default_rng(0)
    gaps, evaluations = [], []
    for _ in range(100):
        users = draw_users(rng)
        plan = descend(profile, users)
        gaps.append(plan.objective - enumerate_plans(profile, users).objective)
        evaluations.append(plan.evaluations)

    assert min(gaps) >= -1e-12
    assert max(gaps) <= 1e-3
    assert sum(gap < 1e-12 for gap in gaps) >= 97
    assert np.mean(evaluations) < 4096 / 20


def chosen_shares(profile, draws=100):
    rng, chosen, plans = np.random.default_rng(0), np.zeros(4), []
    for _ in range(draws):
        plans.append(enumerate_plans(profile, draw_users(rng)))
        chosen += np.bincount(plans[-1].students, minlength=4) / (4 * draws)
    return chosen, plans


def test_the_calibrated_profile_gives_table_3():
    """Students 8x4 and 14x4 share the fleet; objective, delay and FL-Max are as printed."""
    profile = paper_profile("non_iid")
    shares, plans = chosen_shares(profile)
    rng = np.random.default_rng(0)
    largest = [plan_with_student(profile, draw_users(rng), 3).delay_s for _ in range(100)]

    assert shares[1] + shares[2] >= 0.95
    assert 0.35 <= shares[1] <= 0.65
    assert 0.35 <= shares[2] <= 0.65
    assert np.mean([p.objective_unpriced for p in plans]) == pytest.approx(-1.03, abs=0.02)
    delay_s = np.mean([p.delay_s for p in plans])
    assert delay_s == pytest.approx(14.4, abs=1.0)
    assert np.mean(largest) >= 1.6 * delay_s


def test_the_calibrated_profile_picks_the_students_of_table_4():
    """With equal quarters ResNet-14x4 is chosen at least eight times in ten; objective -1.27."""
    shares, plans = chosen_shares(paper_profile("iid"))

    assert shares[2] >= 0.8
    assert np.mean([p.objective_unpriced for p in plans]) == pytest.approx(-1.27, abs=0.02)


@given(SEEDS, st.integers(0, 3), st.floats(1.0, 5.0))
@settings(max_examples=60, deadline=None)
def test_a_faster_device_keeps_its_training(seed, user, factor):
    """A user that trains on its device does so too when the device alone becomes faster."""
    profile, users, _ = some_fleet(seed)
    faster = users.device_ghz.copy()
    faster[user] *= factor

    before = enumerate_plans(profile, users)
    after = enumerate_plans(profile, PaperUsers(faster, users.gain))

    assert after.is_local[user] >= before.is_local[user]
    assert after.objective <= before.objective + 1e-12


@given(SEEDS, st.floats(0.0, 0.05), st.floats(0.0, 0.05))
@settings(max_examples=60, deadline=None)
def test_a_higher_price_buys_no_more_of_the_server(seed, low, more):
    """The work bought at the server never rises with its price."""
    _, users, _ = some_fleet(seed)
    bought = []
    for price in (low, low + more):
        profile = dataclasses.replace(paper_profile(), price_weight=price)
        plan = enumerate_plans(profile, users)
        bought.append(amounts(profile, users, np.asarray(plan.actions))[0].sum())

    assert bought[1] <= bought[0] + 1e-9


def test_devices_train_more_when_dear_and_less_when_far():
    """Over draws, places move to the device with the price of CPU, and to the server with noise."""
    profile = paper_profile()

    def local_share(**changes):
        _, plans = chosen_shares(dataclasses.replace(profile, **changes), draws=40)
        return np.mean([plan.is_local.mean() for plan in plans])

    by_price = [local_share(price_weight=price) for price in (0.004, 0.008, 0.016)]
    by_noise = [local_share(noise_w=noise) for noise in (4e-14, 4e-12, 4e-10)]
    assert by_price == sorted(by_price)
    assert by_price[0] < by_price[-1]
    assert by_noise == sorted(by_noise, reverse=True)
    assert by_noise[0] > by_noise[-1]


def test_hundreds_of_users_are_planned_by_descent():
    """Where enumeration refuses, descent gives a plan that beats one student for all."""
    profile, users, _ = some_fleet(0, users=300)

    with pytest.raises(InvalidProblem, match="coordinate descent"):
        enumerate_plans(profile, users)
    plan = descend(profile, users)

    for action in range(profile.actions):
        assert plan.objective < finish_plan(profile, users, [action] * 300).objective


def test_bad_figures_are_all_named():
    """A profile and users with several faults name each of them, with the value and the range."""
    with pytest.raises(InvalidProblem) as refused:
        dataclasses.replace(paper_profile(), noise_w=float("nan"), server_ghz=0, price_weight=-1.0)
    assert len(refused.value.faults) == 3
    assert "noise_w is nan" in str(refused.value)

    with pytest.raises(InvalidProblem) as refused:
        PaperUsers(np.array([1.0, -1.0, np.inf]), np.array([1e-9, 1e-9, 0.0]))
    assert len(refused.value.faults) == 3
    with pytest.raises(InvalidProblem, match="none"):
        PaperUsers(np.array([]), np.array([]))
    with pytest.raises(InvalidProblem, match="shapes"):
        PaperUsers(np.ones(2), np.ones(3))
