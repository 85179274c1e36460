"""A plan is the best there is, or as near to it as it says."""

import numpy as np
import pytest

from federation.errors import Infeasible
from optimizer import core
from optimizer.allocation import Effort, allocate, plan
from optimizer.columns import Columns, tabulate
from optimizer.fleets import Setting, draw
from optimizer.heuristics import AllAt, Everything, FedCS, Greedy, Oort, Random
from optimizer.problem import Problem, Weights
from optimizer.textbook import solve_textbook
from tests.plans import check_plan, tiny

BEST = Effort(tolerance=0.0, time_limit_s=60.0)


def whole_model(table: Columns) -> float | None:
    """The optimum of HiGHS on all columns; None where no plan keeps every rule."""
    rows_can = np.isfinite(table.seconds_NR).any(axis=1).all()
    if not rows_can or not table.seconds_offset <= table.problem.deadline_s:
        return None
    answer = core.solve(table, core.whole(table), core.Limits(60.0, 0.0))
    assert answer is not None
    if answer.selected is None:
        return None
    out = len(table.layout.student_R) - 1
    taken = zip(table.problem.users, answer.selected.raw_N.tolist(), strict=False)
    if any(user.is_required and raw == out for user, raw in taken):
        return None
    return answer.selected.objective + table.cost_offset


def check_against_the_whole_model(seed: int) -> bool:
    problem = tiny(seed)
    table = tabulate(problem)
    best = whole_model(table)
    if best is None:
        with pytest.raises(Infeasible, match=r"\d"):
            allocate(table, effort=BEST)
        return False
    found = allocate(table, effort=BEST)
    assert found.objective == pytest.approx(best, rel=1e-7, abs=1e-9)
    assert found.why_stopped == "optimal"
    check_plan(problem, found)
    return True


def test_plans_of_tiny_fleets_are_those_of_the_whole_model() -> None:
    """On 40 random tiny fleets the plan has the optimum of HiGHS on every column, or none has."""
    feasible = [check_against_the_whole_model(seed) for seed in range(40)]

    assert sum(feasible) >= 25


@pytest.mark.slow
def test_plans_of_two_hundred_tiny_fleets_are_those_of_the_whole_model() -> None:
    """On 200 more random tiny fleets the plan has the optimum of HiGHS on every column."""
    feasible = [check_against_the_whole_model(seed) for seed in range(1000, 1200)]

    assert sum(feasible) >= 120


@pytest.mark.parametrize("seed", range(6))
def test_the_textbook_model_agrees(seed: int) -> None:
    """A model built from the records, without columns, has the same optimum."""
    rng = np.random.default_rng(seed)
    setting = Setting(
        users=2, students=2, steps=2, uplink_choices=(1, 2), server_choices=(1, 2),
        blocks_per_user=1.5,
    )  # fmt: skip
    table = tabulate(draw(setting, rng))

    taught = solve_textbook(table, time_limit_s=30.0)

    assert taught.selected is not None
    assert allocate(table, effort=BEST).objective == pytest.approx(taught.selected.objective)
    assert taught.bound == pytest.approx(taught.selected.objective, rel=1e-5)


def fleet(users: int, seed: int = 0, **how: object) -> Problem:
    return draw(Setting(users=users, **how), np.random.default_rng(seed))  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(3))
def test_no_planner_beats_the_bound(seed: int) -> None:
    """Bound <= optimum <= every baseline's plan, and each plan keeps every rule."""
    problem = fleet(30, seed, per_gateway=15)
    table, rng = tabulate(problem), np.random.default_rng(seed)
    loose = plan(problem, tolerance=0.01)
    best = allocate(table, Everything().choose(table), effort=BEST)
    planners = [
        Random(rng), AllAt("device"), AllAt("device", "smallest"), AllAt("twin"), Greedy(),
        FedCS(30.0), Oort(rng),
    ]  # fmt: skip

    found = [allocate(table, planner.choose(table)) for planner in planners]

    assert best.gap == 0.0
    assert loose.bound <= best.objective <= loose.objective
    assert loose.gap <= 0.01
    for each in found:
        check_plan(problem, each)
        assert each.objective > best.objective
        assert each.gap <= 1e-3


def test_a_hundred_users_are_proven_optimal() -> None:
    """A hundred users over two gateways get a plan that is proven best, in a moment."""
    problem = fleet(100)

    found = plan(problem, tolerance=0.0, time_limit_s=60.0)

    assert found.why_stopped == "optimal"
    assert found.gap <= 1e-7
    check_plan(problem, found)


def test_a_heavy_makespan_is_planned_within_the_tolerance() -> None:
    """When the makespan weighs most, the plan is still proven within the tolerance."""
    problem = fleet(60, weights=Weights(time_ref_s=8.0))

    found = plan(problem, tolerance=1e-3, time_limit_s=60.0)

    assert found.gap <= 1e-3
    check_plan(problem, found)


def test_without_a_solver_the_sweeps_plan_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a solver the plan is the sweep's own with its proven gap, and says so."""
    problem = fleet(40)
    best = plan(problem, tolerance=0.0, time_limit_s=60.0)
    monkeypatch.setattr(core, "solve", lambda *_, **__: None)

    found = plan(problem, tolerance=0.0)

    check_plan(problem, found)
    assert found.bound <= best.objective <= found.objective
    assert found.why_stopped in ("no solver", "optimal")
    assert found.gap < 0.01


def test_no_time_still_gives_a_plan() -> None:
    """With no time at all there is a plan that keeps every rule, and an honest bound."""
    problem = fleet(100, 2)
    best = plan(problem, tolerance=0.0, time_limit_s=60.0)

    found = plan(problem, tolerance=0.0, time_limit_s=0.0)

    check_plan(problem, found)
    assert found.bound <= best.objective <= found.objective
    assert found.why_stopped in ("time limit", "optimal")


def test_last_rounds_prices_start_the_next() -> None:
    """Prices of the last round give the same optimum, and a good bound before any are found."""
    problem = fleet(60)
    last = plan(problem, tolerance=0.0, time_limit_s=60.0)

    again = plan(problem, tolerance=0.0, time_limit_s=60.0, near=last.prices)
    hurried = plan(problem, tolerance=0.0, time_limit_s=0.0, near=last.prices)
    unaided = plan(problem, tolerance=0.0, time_limit_s=0.0)

    assert again.objective == pytest.approx(last.objective)
    assert unaided.bound <= hurried.bound <= last.objective
    assert hurried.gap < 0.01
