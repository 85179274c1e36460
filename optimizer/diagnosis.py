"""Why a user cannot take part, or no plan keeps every rule; and what would be enough.

First each user alone: which rule took the last option, and the least relaxation that admits the
user. Then everybody together: which capacity is short by how much, whom to drop, and the
earliest deadline at which all fit.
"""

import logging
import math
from dataclasses import dataclass, replace

import numpy as np

from optimizer.columns import Columns, tabulate
from optimizer.elastic import Shortage, least_deadline, shortage
from optimizer.figures import Figures, figure, gather, rules
from optimizer.layout import Booleans, Layout, lay_out
from optimizer.problem import Problem, Student, User, Weights
from optimizer.sweep import sweep

logger = logging.getLogger(__name__)

_MOST_NAMED = 5


@dataclass(frozen=True, slots=True)
class Barred:
    """A user without any option but to sit out: the rule that took the last, and what would do."""

    user: str
    reason: str
    text: str
    is_required: bool


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What stands in the way. `conflicts` are why no plan keeps every rule; empty: one may."""

    barred: tuple[Barred, ...]
    conflicts: tuple[str, ...]


def diagnose(problem: Problem) -> Diagnosis:
    """What stands in the way of users, and of a plan.

    `problem` has passed `optimizer.validation.check`.
    """
    barred = tuple(found for user in problem.users if (found := _screen(problem, user)) is not None)
    conflicts = _shortened([each.text for each in barred if each.is_required])
    conflicts += _teacher_conflicts(problem)
    if not conflicts:
        conflicts += _capacity_conflicts(problem)
    if not conflicts and problem.accuracy_floor is not None:
        conflicts += _floor_conflicts(problem, problem.accuracy_floor)
    return Diagnosis(barred, tuple(conflicts))


def _shortened(texts: list[str]) -> list[str]:
    if len(texts) <= _MOST_NAMED:
        return texts
    return [
        *texts[:_MOST_NAMED],
        f"so is it for {len(texts) - _MOST_NAMED} more who must take part",
    ]


def _screen(problem: Problem, user: User) -> Barred | None:
    alone = replace(problem, users=(user,), teacher=None)
    layout = lay_out(alone)
    facts = gather(alone, layout)
    figures = figure(alone, layout, facts)
    broken = {
        reason: mask[0, :-1]
        for reason, mask in rules(
            alone, layout, facts, figures, problem.deadline_s - _sequential_s(problem)
        ).items()
    }
    times = np.sum(list(broken.values()), axis=0)
    if len(times) and times.min() == 0:
        return None
    reason = _last_reason(broken)
    text = f"user {user.name} can only sit out: {_relaxation(alone, layout, figures, broken)}"
    return Barred(user.name, reason, text, user.is_required)


def _last_reason(broken: dict[str, Booleans]) -> str:
    left = np.ones(len(next(iter(broken.values()))), bool)
    for reason, mask in broken.items():
        left &= ~mask
        if not left.any():
            return reason
    return "not offered"


def _relaxation(
    problem: Problem, layout: Layout, figures: Figures, broken: dict[str, Booleans]
) -> str:
    """The least changes that admit the user: one rule if one is enough, else the fewest."""
    offered = ~broken["not offered"]
    if not offered.any():
        return _nothing_offered(problem)
    times = np.where(offered, np.sum(list(broken.values()), axis=0), len(broken) + 1)
    nearest = np.flatnonzero(times == times.min())
    texts: dict[str, None] = {}
    for reasons in _combinations(broken, nearest):
        among = np.array([raw for raw in nearest if all(broken[reason][raw] for reason in reasons)])
        said = [_amount(problem, layout, figures, reason, among) for reason in reasons]
        texts.setdefault(" and ".join(said))
    return ", or ".join(texts)


def _combinations(broken: dict[str, Booleans], nearest: np.ndarray) -> list[tuple[str, ...]]:
    found = {
        tuple(reason for reason, mask in broken.items() if mask[raw]): None
        for raw in nearest.tolist()
    }
    return list(found)


def _nothing_offered(problem: Problem) -> str:
    user = problem.users[0]
    if not any(user.goodput_bytes_per_s):
        return f"its goodput over gateway {user.gateway} is 0 at any number of units"
    return "no student has both a time and an accuracy, in any mode or at the twin"


def _amount(
    problem: Problem, layout: Layout, figures: Figures, reason: str, among: np.ndarray
) -> str:
    user = problem.users[0]
    match reason:
        case "memory":
            students = [problem.students[int(layout.student_R[raw])] for raw in among]
            return _memory(user, students)
        case "privacy":
            return "its owner keeps the data on the device; the twin would do"
        case "accuracy":
            best = float(figures.accuracy[0, among].max())
            return f"its best accuracy is {best:.3g}, asked is {user.min_accuracy:.3g}"
        case "energy":
            least_j = float(figures.energy[0, among].min())
            return f"it takes {least_j:.3g} J, its budget is {user.energy_budget_j:.3g} J"
        case "deadline":
            return _deadline(problem, layout, figures, among)
        case _:
            return _units(problem, layout, reason, among)


def _units(problem: Problem, layout: Layout, reason: str, among: np.ndarray) -> str:
    if reason == "server units":
        least = int(layout.server_R[among].min())
        return f"the twin takes {least} server units, the server has {problem.server.units}"
    least = int(layout.uplink_R[among].min())
    name = problem.users[0].gateway
    units = next(each.uplink_units for each in problem.gateways if each.name == name)
    return f"it takes {least} uplink units, gateway {name} has {units}"


def _memory(user: User, students: list[Student]) -> str:
    least = min(students, key=lambda student: student.memory_bytes)
    return (
        f"{least.name} takes {least.memory_bytes:.4g} bytes of memory, "
        f"there are {user.memory_bytes:.4g}"
    )


def _deadline(problem: Problem, layout: Layout, figures: Figures, among: np.ndarray) -> str:
    user = problem.users[0]
    raw = int(among[figures.seconds[0, among].argmin()])
    fastest_s, units = float(figures.seconds[0, raw]), int(layout.uplink_R[raw])
    text = f"its fastest way takes {fastest_s:.4g} s, the deadline is {problem.deadline_s:.4g} s"
    if units == 0:
        return text
    place = problem.uplink_choices.index(units)
    sent = problem.students[int(layout.student_R[raw])].update_bytes
    if layout.place_of(raw) == "twin" and user.twin is not None:
        sent = user.twin.unseen_bytes
    upload_s = sent / user.goodput_bytes_per_s[place] if sent else 0.0
    return f"{text}; {upload_s:.3g} s of it are upload with {units} units"


def _sequential_s(problem: Problem) -> float:
    teacher = problem.teacher
    if teacher is None or not teacher.is_sequential:
        return 0.0
    units = max((each for each in teacher.choices if each <= problem.server.units), default=0)
    return teacher.unit_seconds / units if units else 0.0


def _teacher_conflicts(problem: Problem) -> list[str]:
    teacher, server = problem.teacher, problem.server
    if teacher is None:
        return []
    units = max((each for each in teacher.choices if each <= server.units), default=0)
    if units == 0:
        least = min(teacher.choices, default=1)
        return [f"the teacher takes {least} server units, the server has {server.units}"]
    fastest_s = teacher.unit_seconds / units
    if fastest_s <= problem.deadline_s:
        return []
    needed = math.ceil(teacher.unit_seconds / problem.deadline_s) if problem.deadline_s else None
    enough = f"; {needed} would be in time" if needed is not None else ""
    return [
        f"the teacher takes {fastest_s:.4g} s with {units} server units, "
        f"the deadline is {problem.deadline_s:.4g} s{enough}"
    ]


def _capacity_conflicts(problem: Problem) -> list[str]:
    if not any(user.is_required for user in problem.users) and problem.teacher is None:
        return []
    table = tabulate(problem)
    try:
        found = shortage(table, problem.deadline_s - table.seconds_offset)
        if found.is_none:
            return []
        relaxed = least_deadline(tabulate(replace(problem, deadline_s=math.inf)))
    except ImportError:
        logger.warning("no solver: what capacities lack together is not known")
        return []
    until = f"; a deadline of {relaxed + table.seconds_offset:.4g} s would do" if relaxed else ""
    texts = [
        f"gateway {problem.gateways[place].name} is {units} uplink units short"
        f"{_droppable(table, found, place, units)}"
        for place, units in found.uplink.items()
    ]
    if found.server:
        texts.append(f"the server is {found.server} units short")
    return [f"{text} for those who must take part{until}" for text in texts]


def _droppable(table: Columns, found: Shortage, place: int, units: int) -> str:
    """Users who each free enough when they may sit out."""
    enough = [
        table.problem.users[row].name
        for row, (uplink_units, _) in found.taken.items()
        if row < table.users and table.gateway_N[row] == place and uplink_units >= units
    ]
    named = ", ".join(enough[:_MOST_NAMED])
    return f" (dropping any of {named} is enough)" if named else ""


def _floor_conflicts(problem: Problem, floor: float) -> list[str]:
    weights = Weights(makespan=0.0, energy=0.0, accuracy=1.0)
    users = tuple(replace(user, battery_price_per_j=0.0) for user in problem.users)
    free = tabulate(replace(problem, users=users, weights=weights, accuracy_floor=None))
    state = sweep(free, 1e-6, lambda: False)
    if not problem.users or not np.isfinite(state.best.objective):
        return []
    # With accuracy alone in the objective, the bound on the mean gap bounds the mean accuracy.
    most = problem.teacher_accuracy - state.lower * weights.accuracy_ref
    if most >= floor:
        return []
    return [f"the mean accuracy can reach {most:.4g} at most, the floor is {floor:.4g}"]
