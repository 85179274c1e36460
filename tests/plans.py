"""Tiny fleets of every kind, and a check of plans that knows nothing of columns."""

from dataclasses import replace

import numpy as np
import pytest

from optimizer.fleets import Setting, draw
from optimizer.plan import Choice, Plan
from optimizer.problem import Problem, Teacher, User, Weights


def tiny(seed: int) -> Problem:
    """A fleet of one to six users with whatever a problem may hold."""
    rng = np.random.default_rng(seed)
    weights = Weights(
        makespan=float(rng.choice([0.0, 0.3, 1.0, 4.0])),
        energy=float(rng.choice([0.0, 1.0])),
        accuracy=float(rng.choice([0.3, 1.0])),
    )
    teachers = [None, None, None, Teacher(20.0), Teacher(20.0, is_sequential=True)]
    setting = Setting(
        users=int(rng.integers(1, 7)),
        per_gateway=int(rng.integers(1, 4)),
        students=int(rng.integers(1, 4)),
        steps=int(rng.integers(1, 4)),
        blocks_per_user=float(rng.choice([0, 1, 1, 2, 2, 4])),
        server_units_per_user=float(rng.choice([0.0, 0.6, 0.6, 1.0, 2.0])),
        absent_accuracy=float(rng.choice([0.2, 0.45, 0.6])),
        uplink_choices=(1, 2, 4),
        server_choices=(1, 2),
        weights=weights,
        deadline_s=float(rng.choice([15.0, 30.0, 120.0])),
        teacher=teachers[int(rng.integers(5))],
        accuracy_floor=float(rng.choice([0.5, 0.6])) if rng.random() < 0.3 else None,
    )
    problem = draw(setting, rng)
    if rng.random() < 0.3:
        required = [bool(rng.random() < 0.4) for _ in problem.users]
        users = zip(problem.users, required, strict=True)
        problem = replace(problem, users=tuple(replace(u, is_required=r) for u, r in users))
    return problem


def check_plan(problem: Problem, plan: Plan) -> None:
    """Recompute everything a plan says from the records, and hold it to every rule."""
    assert [choice.user for choice in plan.choices] == [user.name for user in problem.users]
    for user, choice in zip(problem.users, plan.choices, strict=True):
        seconds, joules, server_joules, accuracy = recompute(problem, user, choice)
        assert choice.seconds == pytest.approx(seconds)
        assert choice.energy_j == pytest.approx(joules)
        assert choice.server_energy_j == pytest.approx(server_joules)
        assert choice.accuracy == pytest.approx(accuracy)
        assert choice.energy_j <= user.energy_budget_j
        assert not (user.is_required and choice.place == "out")
        assert choice.place == "out" or choice.accuracy >= user.min_accuracy
    _check_capacities(problem, plan)
    _check_totals(problem, plan)


def recompute(problem: Problem, user: User, choice: Choice) -> tuple[float, float, float, float]:
    """Seconds, the device's joules, the server's joules, accuracy."""
    if choice.place == "out":
        return 0.0, 0.0, 0.0, user.absent_accuracy
    assert choice.student is not None
    goodput = 0.0
    if choice.uplink_units:
        place = problem.uplink_choices.index(choice.uplink_units)
        goodput = user.goodput_bytes_per_s[place]
    samples = user.samples * problem.epochs
    student = next(each for each in problem.students if each.name == choice.student)
    if choice.place == "device":
        mode = next(each for each in user.modes if each.name == choice.mode)
        train = samples * mode.seconds_per_sample[student.name]
        upload = student.update_bytes / goodput
        assert student.memory_bytes <= user.memory_bytes
        assert choice.bytes_up == student.update_bytes
        own, absent = user.accuracy[student.name], user.absent_accuracy
        accuracy = user.availability * own + (1.0 - user.availability) * absent
        joules = train * mode.watts + upload * user.radio_watts
        return user.overhead_s + train + upload, joules, 0.0, accuracy
    assert user.twin is not None
    assert choice.server_units in problem.server.choices
    work = samples * problem.server.seconds_per_sample[student.name]
    upload = user.twin.unseen_bytes / goodput if user.twin.unseen_bytes else 0.0
    seconds = upload + work / choice.server_units
    server_joules = work * problem.server.watts_per_unit
    return seconds, upload * user.radio_watts, server_joules, user.twin.accuracy[student.name]


def _check_capacities(problem: Problem, plan: Plan) -> None:
    for gateway in problem.gateways:
        users = [user.gateway == gateway.name for user in problem.users]
        taken = sum(
            choice.uplink_units
            for choice, is_own in zip(plan.choices, users, strict=True)
            if is_own
        )
        assert taken <= gateway.uplink_units
    taken = sum(choice.server_units for choice in plan.choices)
    if problem.teacher is not None and not problem.teacher.is_sequential:
        taken += plan.teacher_units
    assert taken <= problem.server.units


def _check_totals(problem: Problem, plan: Plan) -> None:
    weights, teacher, count = problem.weights, problem.teacher, max(1, len(problem.users))
    slowest = max((choice.seconds for choice in plan.choices), default=0.0)
    server_joules = sum(choice.server_energy_j for choice in plan.choices)
    makespan = slowest
    if teacher is not None:
        assert plan.teacher_s == pytest.approx(teacher.unit_seconds / plan.teacher_units)
        both = plan.teacher_s + slowest if teacher.is_sequential else max(plan.teacher_s, slowest)
        makespan = both
        server_joules += teacher.unit_seconds * problem.server.watts_per_unit
    gaps = [problem.teacher_accuracy - choice.accuracy for choice in plan.choices]
    paid = [
        choice.energy_j * user.battery_price_per_j
        for user, choice in zip(problem.users, plan.choices, strict=True)
    ]
    joules = plan.energy_j + weights.server_energy * server_joules
    mean = weights.energy * joules / weights.energy_ref_j
    mean += weights.accuracy * sum(gaps) / weights.accuracy_ref + sum(paid)
    objective = weights.makespan * makespan / weights.time_ref_s + mean / count
    assert plan.makespan_s == pytest.approx(makespan)
    assert plan.makespan_s <= problem.deadline_s * (1.0 + 1e-9)
    assert plan.objective == pytest.approx(objective)
    assert plan.energy_j == pytest.approx(sum(choice.energy_j for choice in plan.choices))
    assert plan.server_energy_j == pytest.approx(server_joules)
    assert plan.bound <= plan.objective
    if problem.accuracy_floor is not None and problem.users:
        reached = sum(choice.accuracy for choice in plan.choices) / count
        assert reached >= problem.accuracy_floor - 1e-9
