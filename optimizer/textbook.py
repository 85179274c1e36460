"""The model as a textbook writes it: one decision for each thing, products made linear.

For each user one-hot choices of student, place, power mode, uplink units and server units; binary
products w <= a, w <= b, w >= a + b - 1 (McCormick 1976) join them wherever seconds, joules or
accuracy depend on two or three at once. It is built from the users' records, without the column
table, says the same as the column model, and is kept for teaching and for cross-checks: its
relaxation is weak, and beyond some ten users HiGHS does not close it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from optimizer.columns import Columns
from optimizer.problem import Problem, User
from optimizer.sweep import Selected, checked


@dataclass(frozen=True, slots=True, eq=False)
class Textbook:
    """What HiGHS made of the textbook model: the plan it has, if any, and its bound."""

    selected: Selected | None
    bound: float
    variables: int


@dataclass(frozen=True, slots=True)
class _Axes:
    """One-hot choices of one user, by name of the choice and value."""

    student: dict[int, Any]
    place: dict[str, Any]
    mode: dict[int, Any]
    uplink: dict[int, Any]
    server: dict[int, Any]


def solve_textbook(table: Columns, time_limit_s: float, tolerance: float = 1e-6) -> Textbook:
    """Solve the textbook model by Pyomo and HiGHS, one thread.

    A teacher beside the students and an accuracy floor are not part of it.

    Raises:
        ValueError: the problem has a teacher beside its students, or a floor.
        ImportError: Pyomo or HiGHS is not installed.
    """
    import pyomo.environ as pyo
    from pyomo.contrib.solver.solvers.highs import Highs

    if table.rows > table.users or table.is_floored:
        raise ValueError("the textbook model knows no teacher and no floor; leave them out")
    scale = float(max(1, table.users))
    model = pyo.ConcreteModel()
    model.binaries = pyo.VarList(domain=pyo.Binary)
    model.makespan = pyo.Var(domain=pyo.NonNegativeReals)
    model.rules = pyo.ConstraintList()
    axes = [_one_hot(table, model, row) for row in range(table.users)]
    parts = [
        _user(table.problem, model, user, own)
        for user, own in zip(table.problem.users, axes, strict=True)
    ]
    for part in parts:
        model.rules.add(part.seconds <= model.makespan)
    _capacities(table, model, axes)
    cost = sum(_cost(table.problem, part) for part in parts)
    model.total = pyo.Objective(expr=scale * table.time_price * model.makespan + cost)
    solver = Highs()
    solver.config.load_solutions = False
    solver.config.raise_exception_on_nonoptimal_result = False
    solver.config.threads = 1
    solver.config.time_limit = time_limit_s
    solver.config.rel_gap = tolerance
    solver.config.abs_gap = 1e-9 * scale
    results = solver.solve(model)
    selected = None
    if results.solution_loader.get_number_of_solutions():
        results.solution_loader.load_vars()
        raw = [_raw_of(table, each) for each in axes]
        selected = checked(table, np.array(raw, np.int64))
    bound = -np.inf if results.objective_bound is None else results.objective_bound / scale
    return Textbook(selected, float(bound), len(model.binaries))


def _one_hot(table: Columns, model: Any, row: int) -> _Axes:
    layout, user = table.layout, table.problem.users[row]

    def choose(values: Sequence[Any]) -> dict[Any, Any]:
        made = {value: model.binaries.add() for value in values}
        model.rules.add(sum(made.values()) == 1)
        return made

    return _Axes(
        student=choose(range(len(table.problem.students))),
        place=choose(["device", "twin", "out"]),
        mode=choose(range(len(user.modes))),
        uplink=choose(layout.uplink_levels.tolist()),
        server=choose([0, *sorted(table.problem.server.choices)]),
    )


def _product(model: Any, factors: list[Any]) -> Any:
    """A variable that is 1 exactly where all factors are."""
    made = model.binaries.add()
    for factor in factors:
        model.rules.add(made <= factor)
    model.rules.add(made >= reduce(_add, factors) - (len(factors) - 1))
    return made


def _add(left: Any, right: Any) -> Any:
    return left + right


@dataclass(slots=True)
class _Part:
    """A user's seconds, joules and accuracy, as sums of products of its choices."""

    user: User
    seconds: Any = 0.0
    energy: Any = 0.0
    server_energy: Any = 0.0
    accuracy: Any = 0.0


def _user(problem: Problem, model: Any, user: User, axes: _Axes) -> _Part:
    part = _Part(user)
    _on_device(problem, model, axes, part)
    _at_twin(problem, model, axes, part)
    part.accuracy = part.accuracy + user.absent_accuracy * axes.place["out"]
    here = 1 - axes.place["out"]
    if user.min_accuracy > 0.0:
        model.rules.add(part.accuracy >= user.min_accuracy * here)
    if math.isfinite(user.energy_budget_j):
        model.rules.add(part.energy <= user.energy_budget_j)
    if math.isfinite(problem.deadline_s):
        model.rules.add(part.seconds <= problem.deadline_s)
    if user.is_required:
        model.rules.add(here == 1)
    model.rules.add(axes.server[0] >= 1 - axes.place["twin"])
    model.rules.add(axes.uplink[0] >= axes.place["out"])
    return part


def _on_device(problem: Problem, model: Any, axes: _Axes, part: _Part) -> None:
    user, here = part.user, axes.place["device"]
    part.seconds = part.seconds + user.overhead_s * here
    goodput = {0: 0.0, **dict(zip(problem.uplink_choices, user.goodput_bytes_per_s, strict=True))}
    for m, student in enumerate(problem.students):
        chosen = _product(model, [axes.student[m], here])
        expected = user.availability * user.accuracy.get(student.name, 0.0)
        expected += (1.0 - user.availability) * user.absent_accuracy
        part.accuracy = part.accuracy + expected * chosen
        if student.name not in user.accuracy or student.memory_bytes > user.memory_bytes:
            model.rules.add(chosen == 0)
        for k, mode in enumerate(user.modes):
            product = _product(model, [chosen, axes.mode[k]])
            if student.name not in mode.seconds_per_sample:
                model.rules.add(product == 0)
                continue
            train_s = mode.seconds_per_sample[student.name] * user.samples * problem.epochs
            part.seconds = part.seconds + train_s * product
            part.energy = part.energy + train_s * mode.watts * product
        _upload(model, axes, part, chosen, (student.update_bytes, goodput))


def _at_twin(problem: Problem, model: Any, axes: _Axes, part: _Part) -> None:
    user, here, server = part.user, axes.place["twin"], problem.server
    if user.twin is None:
        model.rules.add(here == 0)
        return
    goodput = {0: 0.0, **dict(zip(problem.uplink_choices, user.goodput_bytes_per_s, strict=True))}
    model.rules.add(axes.server[0] <= 1 - here)
    for m, student in enumerate(problem.students):
        chosen = _product(model, [axes.student[m], here])
        if student.name not in user.twin.accuracy or student.name not in server.seconds_per_sample:
            model.rules.add(chosen == 0)
            continue
        part.accuracy = part.accuracy + user.twin.accuracy[student.name] * chosen
        work_s = server.seconds_per_sample[student.name] * user.samples * problem.epochs
        part.server_energy = part.server_energy + work_s * server.watts_per_unit * chosen
        for units in server.choices:
            product = _product(model, [chosen, axes.server[units]])
            part.seconds = part.seconds + work_s / units * product
    _upload(model, axes, part, here, (user.twin.unseen_bytes, goodput))


def _upload(
    model: Any, axes: _Axes, part: _Part, chosen: Any, sent: tuple[float, dict[int, float]]
) -> None:
    size_bytes, goodput = sent
    if size_bytes == 0.0:
        return
    for units, rate in goodput.items():
        product = _product(model, [chosen, axes.uplink[units]])
        if rate <= 0.0:
            model.rules.add(product == 0)
            continue
        part.seconds = part.seconds + size_bytes / rate * product
        part.energy = part.energy + size_bytes / rate * part.user.radio_watts * product


def _cost(problem: Problem, part: _Part) -> Any:
    weights = problem.weights
    per_joule = weights.energy / weights.energy_ref_j
    gap = problem.teacher_accuracy - part.accuracy
    return (
        (per_joule + part.user.battery_price_per_j) * part.energy
        + per_joule * weights.server_energy * part.server_energy
        + weights.accuracy / weights.accuracy_ref * gap
    )


def _capacities(table: Columns, model: Any, axes: list[_Axes]) -> None:
    for place, capacity in enumerate(table.capacity_G[:-1].tolist()):
        rows = np.flatnonzero(table.gateway_N == place).tolist()
        if rows:
            used = sum(units * each for row in rows for units, each in axes[row].uplink.items())
            model.rules.add(used <= capacity)
    if axes:
        used = sum(units * each for own in axes for units, each in own.server.items())
        model.rules.add(used <= table.problem.server.units)


def _raw_of(table: Columns, axes: _Axes) -> int:
    layout = table.layout

    def held(choice: dict[Any, Any]) -> Any:
        return max(choice, key=lambda value: choice[value].value or 0.0)

    place, student = held(axes.place), held(axes.student)
    if place == "out":
        return len(layout.student_R) - 1
    same = (layout.student_R == student) & (layout.uplink_R == held(axes.uplink))
    if place == "device":
        same &= layout.mode_R == held(axes.mode)
    else:
        same &= (layout.server_R == held(axes.server)) & (layout.pair_R >= layout.device[0])
    return int(np.flatnonzero(same)[0])
