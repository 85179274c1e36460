"""What may be wrong with a planning problem: every fault at once, before any solver sees it.

Solvers are no door-keepers: an infinite coefficient can make HiGHS lose a constraint without
a word. So each number is checked here, with its owner, field, value and range.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from itertools import chain

from federation.errors import InvalidProblem
from optimizer.problem import Problem, Student, User

_FINITE = "a finite number of at least 0"
_POSITIVE = "a finite number above 0"
_SHARE = "a number from 0 to 1"
_UNBOUNDED = "a number of at least 0"


def check(problem: Problem) -> None:
    """Refuse a problem that has faults.

    A fleet without users, gateways without users, and capacities beyond what all users could
    take are in order.

    Raises:
        InvalidProblem: naming every fault.
    """
    faults = list(
        chain(
            _names("user", (user.name for user in problem.users)),
            _names("gateway", (gateway.name for gateway in problem.gateways)),
            _names("student", (student.name for student in problem.students)),
            _problem_faults(problem),
            _supply_faults(problem),
            *(_user_faults(problem, user) for user in problem.users),
            _link_faults(problem),
        )
    )
    if faults:
        raise InvalidProblem(faults)


def _problem_faults(problem: Problem) -> Iterator[str]:
    weights = problem.weights
    for name in ("makespan", "energy", "accuracy", "server_energy"):
        yield from _number("weights", name, getattr(weights, name), _FINITE)
    for name in ("time_ref_s", "energy_ref_j", "accuracy_ref"):
        yield from _number("weights", name, getattr(weights, name), _POSITIVE)
    if not any((weights.makespan, weights.energy, weights.accuracy)):
        yield "weights: makespan, energy and accuracy are all 0; expected one above 0"
    yield from _number("problem", "deadline_s", problem.deadline_s, _UNBOUNDED)
    yield from _number("problem", "epochs", problem.epochs, _POSITIVE)
    yield from _number("problem", "teacher_accuracy", problem.teacher_accuracy, _SHARE)
    if problem.accuracy_floor is not None:
        yield from _number("problem", "accuracy_floor", problem.accuracy_floor, _SHARE)
    yield from _choices("problem", "uplink_choices", problem.uplink_choices)
    if not problem.students and problem.users:
        yield "problem: students is empty; expected at least one model"


def _supply_faults(problem: Problem) -> Iterator[str]:
    server, teacher = problem.server, problem.teacher
    for gateway in problem.gateways:
        yield from _count(f"gateway {gateway.name}", "uplink_units", gateway.uplink_units)
    for student in problem.students:
        owner = f"student {student.name}"
        yield from _number(owner, "update_bytes", student.update_bytes, _FINITE)
        yield from _number(owner, "memory_bytes", student.memory_bytes, _FINITE)
    yield from _count("server", "units", server.units)
    yield from _number("server", "watts_per_unit", server.watts_per_unit, _FINITE)
    yield from _choices("server", "choices", server.choices)
    yield from _numbers("server", "seconds_per_sample", server.seconds_per_sample, _POSITIVE)
    yield from _unknown("server", "seconds_per_sample", server.seconds_per_sample, problem.students)
    if teacher is not None:
        yield from _number("teacher", "unit_seconds", teacher.unit_seconds, _FINITE)
        yield from _choices("teacher", "choices", teacher.choices)


def _user_faults(problem: Problem, user: User) -> Iterator[str]:
    # The common case, a user in order, is decided without building any text.
    if not _is_user_in_order(problem, user):
        owner = f"user {user.name}"
        yield from _count(owner, "samples", user.samples)
        for name in ("radio_watts", "battery_price_per_j", "overhead_s"):
            yield from _number(owner, name, getattr(user, name), _FINITE)
        for name in ("absent_accuracy", "min_accuracy", "availability"):
            yield from _number(owner, name, getattr(user, name), _SHARE)
        for name in ("memory_bytes", "energy_budget_j"):
            yield from _number(owner, name, getattr(user, name), _UNBOUNDED)
        yield from _offer_faults(problem, user, owner)


def _offer_faults(problem: Problem, user: User, owner: str) -> Iterator[str]:
    if len(user.goodput_bytes_per_s) != len(problem.uplink_choices):
        yield (
            f"{owner}: goodput_bytes_per_s has {len(user.goodput_bytes_per_s)} entries; expected "
            f"{len(problem.uplink_choices)}, one for each of uplink_choices"
        )
    for units, goodput in zip(problem.uplink_choices, user.goodput_bytes_per_s, strict=False):
        yield from _number(owner, f"goodput_bytes_per_s at {units} units", goodput, _FINITE)
    tables = [("accuracy", user.accuracy, _SHARE)]
    if user.twin is not None:
        tables.append(("twin.accuracy", user.twin.accuracy, _SHARE))
        yield from _number(owner, "twin.unseen_bytes", user.twin.unseen_bytes, _FINITE)
    for mode in user.modes:
        name = f"modes[{mode.name}]"
        tables.append((f"{name}.seconds_per_sample", mode.seconds_per_sample, _POSITIVE))
        yield from _number(owner, f"{name}.watts", mode.watts, _FINITE)
    for name, table, wanted in tables:
        yield from _numbers(owner, name, table, wanted)
        yield from _unknown(owner, name, table, problem.students)


def _is_user_in_order(problem: Problem, user: User) -> bool:
    known = {student.name for student in problem.students}
    shares = [user.absent_accuracy, user.min_accuracy, user.availability, *user.accuracy.values()]
    finite = [user.radio_watts, user.battery_price_per_j, user.overhead_s]
    finite += user.goodput_bytes_per_s
    positive: list[float] = []
    tables: list[Mapping[str, float]] = [user.accuracy]
    for mode in user.modes:
        positive += mode.seconds_per_sample.values()
        finite.append(mode.watts)
        tables.append(mode.seconds_per_sample)
    if user.twin is not None:
        shares += user.twin.accuracy.values()
        finite.append(user.twin.unseen_bytes)
        tables.append(user.twin.accuracy)
    return (
        not list(_count("", "", user.samples))
        and len(user.goodput_bytes_per_s) == len(problem.uplink_choices)
        and all(0.0 <= value <= 1.0 for value in shares)
        and all(0.0 <= value < math.inf for value in finite)
        and all(0.0 < value < math.inf for value in positive)
        and user.memory_bytes >= 0.0
        and user.energy_budget_j >= 0.0
        and all(known.issuperset(table) for table in tables)
    )


def _link_faults(problem: Problem) -> Iterator[str]:
    known = {gateway.name for gateway in problem.gateways}
    for user in problem.users:
        if user.gateway not in known:
            yield _not_known(f"user {user.name}: gateway", user.gateway, known)


def _unknown(
    owner: str, field: str, table: Mapping[str, float], students: tuple[Student, ...]
) -> Iterator[str]:
    known = {student.name for student in students}
    for name in table:
        if name not in known:
            yield _not_known(f"{owner}: {field} names student", name, known)


def _not_known(what: str, name: str, known: set[str]) -> str:
    near = get_close_matches(name, known, n=1)
    meant = f" (did you mean {near[0]!r}?)" if near else ""
    shown = ", ".join(sorted(known)[:10]) + (", ..." if len(known) > 10 else "")
    return f"{what} {name!r}; expected one of {shown or 'none, there are none'}{meant}"


def _names(kind: str, names: Iterable[str]) -> Iterator[str]:
    for name, times in Counter(names).items():
        if times > 1:
            yield f"{kind} {name}: the name stands {times} times; expected once"


def _numbers(owner: str, field: str, table: Mapping[str, float], wanted: str) -> Iterator[str]:
    for name, value in table.items():
        yield from _number(owner, f"{field}[{name}]", value, wanted)


def _number(owner: str, field: str, value: object, wanted: str) -> Iterator[str]:
    if not _is_within(value, wanted):
        yield f"{owner}: {field} is {value!r}; expected {wanted}"


def _is_within(value: object, wanted: str) -> bool:
    if not isinstance(value, int | float) or math.isnan(value):
        return False
    if wanted == _SHARE:
        return 0.0 <= value <= 1.0
    if wanted == _UNBOUNDED:
        return value >= 0.0
    least = 0.0 if wanted == _FINITE else math.ulp(0.0)
    return least <= value < math.inf


def _count(owner: str, field: str, value: object) -> Iterator[str]:
    if not isinstance(value, int) or value < 0:
        yield f"{owner}: {field} is {value!r}; expected a whole number of at least 0"


def _choices(owner: str, field: str, choices: Iterable[object]) -> Iterator[str]:
    held = list(choices)
    for each in held:
        if not isinstance(each, int) or each < 1:
            yield f"{owner}: {field} holds {each!r}; expected whole numbers of at least 1"
    if len(set(held)) < len(held):
        yield f"{owner}: {field} holds a number twice; expected each once"
