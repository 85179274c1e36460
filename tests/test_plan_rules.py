"""Plans answer to what the world can do, and to nothing else."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimizer.allocation import Effort, allocate, plan
from optimizer.alone import decide_alone
from optimizer.columns import BIG, tabulate
from optimizer.fleets import Setting, draw
from optimizer.plan import Plan
from optimizer.pricing import Duals, bound_curve
from optimizer.problem import Gateway, PowerMode, Problem, Student, Teacher, User, Weights
from tests.plans import check_plan, tiny

BEST = Effort(tolerance=0.0, time_limit_s=60.0)


def best(problem: Problem) -> Plan:
    return plan(problem, tolerance=0.0, time_limit_s=60.0)


def fleet(users: int, seed: int = 0, **how: object) -> Problem:
    return draw(Setting(users=users, **how), np.random.default_rng(seed))  # type: ignore[arg-type]


def more_uplink(problem: Problem) -> Problem:
    wider = tuple(Gateway(g.name, g.uplink_units + 2) for g in problem.gateways)
    return replace(problem, gateways=wider)


def more_server(problem: Problem) -> Problem:
    return replace(problem, server=replace(problem.server, units=problem.server.units + 2))


def more_time(problem: Problem) -> Problem:
    return replace(problem, deadline_s=problem.deadline_s * 1.5)


@pytest.mark.parametrize("relax", [more_uplink, more_server, more_time])
@pytest.mark.parametrize("seed", range(2))
def test_more_of_anything_never_harms(relax: Callable[[Problem], Problem], seed: int) -> None:
    """More uplink units, server units or time never worsen the optimum."""
    problem = fleet(12, seed, per_gateway=6, deadline_s=9.0)

    assert best(relax(problem)).objective <= best(problem).objective + 1e-9


@settings(max_examples=6, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), order=st.randoms(use_true_random=False))
def test_order_and_names_do_not_matter(seed: int, order: object) -> None:
    """Shuffled users under other names have the same optimum, and the same prices of it."""
    problem = fleet(6, seed, per_gateway=3)
    users = [
        replace(user, name=f"n{place}", gateway=f"other-{user.gateway}")
        for place, user in enumerate(problem.users)
    ]
    order.shuffle(users)  # type: ignore[attr-defined]
    gateways = tuple(Gateway(f"other-{g.name}", g.uplink_units) for g in problem.gateways[::-1])

    found = best(replace(problem, users=tuple(users), gateways=gateways))

    assert found.objective == pytest.approx(best(problem).objective, rel=1e-7)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), factor=st.floats(1e-3, 1e3))
def test_the_units_of_measure_do_not_matter(seed: int, factor: float) -> None:
    """Seconds counted in another unit, everywhere, leave every choice's worth as it was."""
    problem = fleet(5, seed)
    users = tuple(_in_other_seconds(user, factor) for user in problem.users)
    rate = {name: each * factor for name, each in problem.server.seconds_per_sample.items()}
    server = replace(
        problem.server,
        seconds_per_sample=rate,
        watts_per_unit=problem.server.watts_per_unit / factor,
    )
    weights = replace(problem.weights, time_ref_s=problem.weights.time_ref_s * factor)
    scaled = replace(
        problem, users=users, server=server, weights=weights, deadline_s=problem.deadline_s * factor
    )

    assert best(scaled).objective == pytest.approx(best(problem).objective, rel=1e-6)


def _in_other_seconds(user: User, factor: float) -> User:
    modes = tuple(
        PowerMode(
            mode.name,
            {name: each * factor for name, each in mode.seconds_per_sample.items()},
            mode.watts / factor,
        )
        for mode in user.modes
    )
    goodput = tuple(rate / factor for rate in user.goodput_bytes_per_s)
    return replace(
        user, modes=modes, goodput_bytes_per_s=goodput, radio_watts=user.radio_watts / factor
    )


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 200),
    uplink=st.floats(0.0, 0.1),
    server=st.floats(0.0, 0.1),
)
def test_any_prices_bound_every_plan(seed: int, uplink: float, server: float) -> None:
    """At any prices at all the bound is below a plan, at the plan's own makespan too."""
    table = tabulate(fleet(10, seed, per_gateway=5))
    duals = Duals(np.array([uplink, 2.0 * uplink, 0.0]), server, 0.0)

    curve = bound_curve(table, duals)

    found = allocate(table, effort=BEST)
    place = np.searchsorted(curve.times, found.makespan_s * (1.0 - 1e-12))
    assert curve.bound[place] <= found.objective + 1e-9
    assert curve.bound.min() <= curve.bound[place]


def test_dropping_dominated_columns_changes_nothing() -> None:
    """For each dropped column another of the same units is no slower and no dearer."""
    table = tabulate(fleet(5))
    kept = np.zeros(table.cost_NR.shape, bool)
    rows = np.arange(table.rows)[:, None]
    is_real = np.isfinite(table.ranked.seconds_NJ)
    kept[np.broadcast_to(rows, is_real.shape)[is_real], table.ranked.raw_NJ[is_real]] = True
    layout = table.layout
    dropped = list(zip(*np.nonzero((table.cost_NR < BIG) & ~kept), strict=True))

    assert dropped
    for row, raw in dropped:
        better = kept[row] & (layout.uplink_R <= layout.uplink_R[raw])
        better &= layout.server_R <= layout.server_R[raw]
        better &= table.seconds_NR[row] <= table.seconds_NR[row, raw]
        better &= table.cost_NR[row] <= table.cost_NR[row, raw]
        assert better.any()


def one_way(name: str, seconds: float, accuracy: float, absent: float) -> User:
    """A device that trains one sample in so many seconds and sends 1,000 bytes a second."""
    return User(
        name, "g", samples=1, modes=(PowerMode("only", {"s": seconds}, watts=0.0),),
        goodput_bytes_per_s=(1000.0, 2000.0), accuracy={"s": accuracy}, absent_accuracy=absent,
    )  # fmt: skip


def two_by_hand(units: int, absent: float = 0.0, **weights: float) -> Problem:
    server = fleet(1).server
    return Problem(
        users=(one_way("a", 2.0, 0.8, absent), one_way("b", 4.0, 0.6, absent)),
        gateways=(Gateway("g", units),),
        students=(Student("s", update_bytes=1000.0),),
        server=replace(server, units=0, seconds_per_sample={}),
        uplink_choices=(1, 2),
        weights=Weights(time_ref_s=10.0, accuracy_ref=1.0, **weights),
    )


def test_two_users_by_hand() -> None:
    """Two users share three units as arithmetic says: the slower one gets two."""
    found = best(two_by_hand(3))

    # 0.45 for 4 s + 0.5 s of upload; gaps 0.2 and 0.4, on average 0.3.
    assert [choice.uplink_units for choice in found.choices] == [1, 2]
    assert found.makespan_s == pytest.approx(4.5)
    assert found.objective == pytest.approx(0.45 + 0.3)


def test_a_user_not_worth_waiting_for_sits_out() -> None:
    """When seconds weigh more than the slower one's accuracy, it sits out."""
    found = best(two_by_hand(3, absent=0.3, makespan=0.9))

    # Both: 0.405 + 0.3. Nobody: 0.7. Only a, with two units: 0.9 * 0.25 + (0.2 + 0.7) / 2.
    assert [choice.place for choice in found.choices] == ["device", "out"]
    assert found.objective == pytest.approx(0.675)


def test_a_unit_nobody_lacks_is_worth_nothing() -> None:
    """With units for everybody the prices are 0; where they are short, they are not."""
    plenty = best(fleet(20, blocks_per_user=16.0, server_units_per_user=8.0))
    scarce = best(fleet(20))

    assert set(plenty.prices.uplink.values()) == {0.0}
    assert plenty.prices.server == 0.0
    assert min(scarce.prices.uplink.values()) > 0.0
    assert scarce.prices.server > 0.0


def test_a_price_of_battery_spares_the_battery() -> None:
    """A user whose joules have a price uses fewer, and the objective counts the price."""
    problem = fleet(20, 3)
    cheap = best(problem)
    priced = tuple(replace(user, battery_price_per_j=5.0) for user in problem.users)
    spared = replace(problem, users=priced)

    found = plan(spared)

    check_plan(spared, found)
    assert found.energy_j < 0.7 * cheap.energy_j


def test_a_doubtful_device_counts_for_less() -> None:
    """Accuracy counts with the probability of finishing; a device that never does sits out."""
    problem = two_by_hand(3)
    never = tuple(replace(user, availability=0.0) for user in problem.users)
    half = tuple(replace(user, availability=0.5) for user in problem.users)

    assert {choice.place for choice in best(replace(problem, users=never)).choices} == {"out"}
    found = best(replace(problem, users=half, weights=replace(problem.weights, makespan=0.0)))
    assert found.accuracy == pytest.approx(0.35)


def test_the_floor_of_accuracy_holds() -> None:
    """A floor lifts the fleet's mean accuracy above what is cheapest, and has a price."""
    problem = fleet(20, 1)
    free = best(problem)
    floor = free.accuracy + 0.01
    held = replace(problem, accuracy_floor=floor)

    found = plan(held, tolerance=1e-3, time_limit_s=60.0)

    check_plan(held, found)
    assert found.accuracy >= floor
    assert found.objective > free.objective
    assert found.prices.accuracy > 0.0


@pytest.mark.parametrize("is_sequential", [False, True])
def test_the_teacher_takes_its_time_and_units(*, is_sequential: bool) -> None:
    """Beside the students the teacher shares server and makespan; before them its time is added."""
    teacher = Teacher(unit_seconds=60.0, choices=(1, 2, 4), is_sequential=is_sequential)
    problem = fleet(10, teacher=teacher)

    found = best(problem)

    check_plan(problem, found)
    assert found.teacher_units == 4
    assert found.makespan_s >= 15.0
    assert (found.makespan_s > 16.0) == is_sequential


@pytest.mark.parametrize("seed", range(0, 60, 6))
def test_every_plan_keeps_every_rule(seed: int) -> None:
    """Whatever the fleet, a plan made in a hurry keeps every rule, and adds up."""
    problem = tiny(seed)
    table = tabulate(problem)
    relaxed = replace(
        problem, users=tuple(replace(user, is_required=False) for user in problem.users),
        accuracy_floor=None, teacher=None,
    )  # fmt: skip

    found = allocate(tabulate(relaxed), effort=Effort(with_solver=False))

    check_plan(relaxed, found)
    assert table.users == len(problem.users)


def test_devices_alone_do_nearly_what_the_plan_says() -> None:
    """With the plan's prices at least nine devices in ten choose their part by themselves."""
    problem = fleet(60, 4)
    found = best(problem)

    alone = [
        decide_alone(problem, user.name, found.prices, with_twin=True) for user in problem.users
    ]
    cut_off = [decide_alone(problem, user.name, found.prices) for user in problem.users]

    assert sum(own == told for own, told in zip(alone, found.choices, strict=True)) >= 54
    assert "twin" not in {choice.place for choice in cut_off}
