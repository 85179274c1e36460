"""What is wrong with a problem is said at the door, and what is only unusual is planned."""

import math
from dataclasses import replace

import numpy as np
import pytest

from federation.errors import Infeasible, InvalidProblem
from optimizer import core
from optimizer.allocation import plan
from optimizer.diagnosis import diagnose
from optimizer.fleets import Setting, draw
from optimizer.problem import Gateway, PowerMode, Problem, Student, Teacher, User, Weights
from tests.plans import check_plan


def fleet(users: int = 12, seed: int = 0, **how: object) -> Problem:
    return draw(Setting(users=users, **how), np.random.default_rng(seed))  # type: ignore[arg-type]


def with_user(problem: Problem, **changes: object) -> Problem:
    first = replace(problem.users[0], **changes)  # type: ignore[arg-type]
    return replace(problem, users=(first, *problem.users[1:]))


def faults_of(problem: Problem) -> str:
    with pytest.raises(InvalidProblem) as refused:
        plan(problem)
    return "\n".join(refused.value.faults)


def test_a_fleet_of_nobody_has_an_empty_plan() -> None:
    """Without users the plan is empty and costs nothing; with a teacher, its time alone."""
    nobody = replace(fleet(), users=())
    teaching = replace(nobody, teacher=Teacher(unit_seconds=40.0, choices=(1, 2, 4)))

    alone, taught = plan(nobody), plan(teaching)

    assert (alone.choices, alone.objective, alone.gap) == ((), 0.0, 0.0)
    assert taught.makespan_s == pytest.approx(10.0)
    check_plan(teaching, taught)


@pytest.mark.parametrize("seed", range(4))
def test_one_user_is_planned(seed: int) -> None:
    """A fleet of one gets its best plan."""
    problem = fleet(1, seed)

    found = plan(problem, tolerance=0.0)

    check_plan(problem, found)
    assert found.why_stopped == "optimal"


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
@pytest.mark.parametrize(
    "field", ["samples", "radio_watts", "overhead_s", "battery_price_per_j", "availability"]
)
def test_a_number_out_of_range_is_refused(field: str, value: float) -> None:
    """NaN, infinity and negative numbers are refused with user, field, value and range."""
    said = faults_of(with_user(fleet(), **{field: value}))

    assert said.startswith(f"user device-0: {field} is {value!r}; expected ")


def test_goodput_cycles_and_power_out_of_range_are_refused() -> None:
    """Channel, seconds for each sample, watts and bytes are checked like everything else."""
    problem = fleet()
    rates = (math.nan, *problem.users[0].goodput_bytes_per_s[1:])
    modes = (PowerMode("odd", {"resnet8": -0.5, "resnet20": math.inf}, watts=math.nan),)
    server = replace(problem.server, units=-2, watts_per_unit=math.inf)
    gateways = (Gateway("gateway-0", -5),)
    students = (replace(problem.students[0], update_bytes=math.nan), *problem.students[1:])
    bad = replace(problem, server=server, gateways=gateways, students=students)

    said = faults_of(with_user(bad, goodput_bytes_per_s=rates, modes=modes))

    for fault in (
        "user device-0: goodput_bytes_per_s at 1 units is nan",
        "user device-0: modes[odd].seconds_per_sample[resnet8] is -0.5",
        "user device-0: modes[odd].seconds_per_sample[resnet20] is inf",
        "user device-0: modes[odd].watts is nan",
        "server: units is -2",
        "server: watts_per_unit is inf",
        "gateway gateway-0: uplink_units is -5",
        "student resnet8: update_bytes is nan",
    ):
        assert fault in said


def test_all_faults_are_named_at_once() -> None:
    """Five faults of four users are five faults in one refusal."""
    problem = fleet()
    users = list(problem.users)
    users[1] = replace(users[1], samples=-3, gateway="gatewy-0")
    users[4] = replace(users[4], absent_accuracy=1.5)
    users[7] = replace(users[7], goodput_bytes_per_s=(1.0,))
    users[9] = replace(users[9], energy_budget_j=math.nan)

    said = faults_of(replace(problem, users=tuple(users)))

    assert len(said.splitlines()) == 5
    assert "user device-7: goodput_bytes_per_s has 1 entries; expected 8" in said


def test_an_unknown_name_comes_with_the_nearest() -> None:
    """An unknown gateway or student is refused with the known names and the nearest."""
    problem = fleet()
    accuracy = {**problem.users[0].accuracy, "resnet65": 0.7}

    said = faults_of(with_user(problem, gateway="gatewy-0", accuracy=accuracy))

    assert "gateway 'gatewy-0'; expected one of gateway-0 (did you mean 'gateway-0'?)" in said
    assert "accuracy names student 'resnet65'; expected one of resnet20" in said
    assert "did you mean 'resnet56'?" in said


@pytest.mark.parametrize("kind", ["users", "gateways", "students"])
def test_a_name_twice_is_refused(kind: str) -> None:
    """Two of one name are refused, with the name."""
    problem = fleet()
    twice = getattr(problem, kind)
    name = twice[0].name

    said = faults_of(replace(problem, **{kind: (*twice, twice[0])}))  # type: ignore[arg-type]

    assert f"{kind[:-1]} {name}: the name stands 2 times; expected once" in said


@pytest.mark.parametrize(
    ("weights", "field"),
    [
        (Weights(makespan=0.0, energy=0.0, accuracy=0.0), "are all 0"),
        (Weights(makespan=-1.0), "makespan is -1.0"),
        (Weights(energy=math.nan), "energy is nan"),
        (Weights(time_ref_s=0.0), "time_ref_s is 0.0"),
        (Weights(accuracy_ref=-0.1), "accuracy_ref is -0.1"),
    ],
)
def test_weights_that_say_nothing_are_refused(weights: Weights, field: str) -> None:
    """All weights zero, or one negative, are refused with the field's name."""
    assert f"weights: {field}" in faults_of(replace(fleet(), weights=weights)).replace(
        "weights: makespan, energy and accuracy are", "weights: are"
    )


def test_idle_gateways_and_plenty_of_units_are_in_order() -> None:
    """A gateway without users, and units beyond what all could take, change nothing."""
    problem = fleet()
    wide = (Gateway("gateway-0", 10_000), Gateway("idle", 7))

    found = plan(replace(problem, gateways=wide), tolerance=0.0)

    check_plan(replace(problem, gateways=wide), found)
    assert found.prices.uplink == {"gateway-0": 0.0, "idle": 0.0}


def test_without_bandwidth_users_sit_out() -> None:
    """At a gateway without units its users sit out; those of another are planned."""
    problem = fleet(12, per_gateway=6)
    cut = replace(problem, gateways=(Gateway("gateway-0", 0), problem.gateways[1]))

    found = plan(cut)

    check_plan(cut, found)
    assert {choice.place for choice in found.choices[:6]} == {"out"}
    assert {choice.place for choice in found.choices[6:]} != {"out"}


def test_without_bandwidth_who_must_take_part_is_named() -> None:
    """Who must take part over a gateway without units makes the plan infeasible, by name."""
    problem = with_user(fleet(), is_required=True)

    with pytest.raises(Infeasible, match=r"user device-0 .* gateway gateway-0 has 0"):
        plan(replace(problem, gateways=(Gateway("gateway-0", 0),)))


@pytest.mark.parametrize(
    ("changes", "reason", "text"),
    [
        ({"memory_bytes": 0.0, "twin": None}, "memory", r"resnet8 takes 1 bytes of memory"),
        ({"energy_budget_j": 1e-6}, "energy", r"it takes \S+ J, its budget is 1e-06 J"),
        ({"min_accuracy": 0.99}, "accuracy", r"best accuracy is 0\.\d+, asked is 0.99"),
        ({"overhead_s": 500.0, "twin": None}, "deadline",
         r"fastest way takes 50\d\.?\d* s, the deadline is 120 s; \S+ s of it are upload with 16"),
        ({"goodput_bytes_per_s": (0.0,) * 8}, "not offered", r"goodput over \S+ gateway-0 is 0"),
        ({"modes": (PowerMode("none", {}, 0.0),), "twin": None}, "not offered",
         r"its owner keeps the data on the device; the twin would do"),
    ],
)  # fmt: skip
def test_the_last_reason_is_named(changes: dict[str, object], reason: str, text: str) -> None:
    """A user without options is named with the rule that took the last, and what would do."""
    problem = with_user(fleet(), **changes)
    required = with_user(problem, is_required=True)

    barred = diagnose(problem).barred

    assert [each.user for each in barred] == ["device-0"]
    assert barred[0].reason == reason
    assert plan(problem).choices[0].place == "out"
    with pytest.raises(Infeasible, match=text):
        plan(required)


def test_privacy_bars_the_twin_and_is_said() -> None:
    """A device too small, whose owner keeps the data, is told that the twin would do."""
    problem = with_user(fleet(), memory_bytes=0.0, twin=None)

    text = diagnose(problem).barred[0].text

    assert "resnet8 takes 1 bytes of memory, there are 0" in text
    assert "its owner keeps the data on the device; the twin would do" in text


def crowded(units: int, deadline_s: float) -> Problem:
    """Four devices that must train 5 s and send 8,000 bytes at 1,000 bytes a second and unit."""
    users = tuple(
        User(
            f"d{place}", "g", samples=5, modes=(PowerMode("only", {"s": 1.0}, 1.0),),
            goodput_bytes_per_s=(1000.0, 2000.0, 4000.0), accuracy={"s": 0.9}, is_required=True,
        )
        for place in range(4)
    )  # fmt: skip
    server = replace(fleet(1).server, seconds_per_sample={})
    return Problem(
        users, (Gateway("g", units),), (Student("s", 8000.0),), server,
        uplink_choices=(1, 2, 4), deadline_s=deadline_s,
    )  # fmt: skip


def test_capacities_short_together_are_counted() -> None:
    """Units short for all together are counted, with whom to drop and the deadline that does."""
    # By 9 s each takes 2 units (9 s), so 8 of 6 are missing 2; with 6 two send at 1 unit, 13 s.
    problem = crowded(6, 9.0)

    with pytest.raises(Infeasible) as refused:
        plan(problem)

    said = str(refused.value)
    assert "gateway g is 2 uplink units short" in said
    assert "dropping any of d0, d1, d2, d3 is enough" in said
    assert "a deadline of 13 s would do" in said
    relaxed = replace(problem, deadline_s=13.0)
    check_plan(relaxed, plan(relaxed))
    wider = replace(problem, gateways=(Gateway("g", 8),))
    check_plan(wider, plan(wider))
    dropped = with_user(problem, is_required=False)
    assert plan(dropped).choices[0].place == "out"


def test_a_deadline_below_the_teachers_time_is_said() -> None:
    """A deadline the teacher cannot meet is said with the units that it would need."""
    teacher = Teacher(unit_seconds=100.0, choices=(1, 2, 4))

    for is_sequential in (False, True):
        how = replace(teacher, is_sequential=is_sequential)
        with pytest.raises(Infeasible, match=r"the teacher takes 25 s .* 20 s; 5 would be"):
            plan(fleet(deadline_s=20.0, teacher=how))


def test_a_floor_that_nobody_reaches_is_said() -> None:
    """A floor above what the fleet can reach is infeasible, with what it can reach."""
    with pytest.raises(Infeasible, match=r"mean accuracy can reach 0\.\d+ at most, the floor is 0"):
        plan(fleet(accuracy_floor=0.9))


def test_a_solver_that_fails_is_not_the_plans_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """When the solver breaks, the sweep's plan stands with its gap, and a warning is logged."""

    def broken(*_: object) -> None:
        raise RuntimeError("no licence")

    problem = fleet(40, 2)
    monkeypatch.setattr(core, "_solve", broken)

    found = plan(problem, tolerance=0.0)

    check_plan(problem, found)
    assert found.why_stopped in ("no solver", "optimal")
    assert found.why_stopped == "optimal" or "solver failed: error=no licence" in caplog.text
