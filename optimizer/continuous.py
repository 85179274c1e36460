# ruff: noqa: N803, N806, N815 - capitals at the end of a name are the shape of its array
"""What whole units cost: the same places and students with shares that may be any number.

With student and place of each user fixed, upload times, compute times and joules are convex in
uplink shares, frequencies and server shares (as in Yang et al., arXiv:1911.02417, section III): one
price for each gateway, one for the server, and the best makespan by golden section. By duality
no division of the resources, however fine, gives these places less than the value found.

Shapes: N users who take part, X uplink shares, about 1 % apart, that stand for all.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from optimizer.layout import Booleans, Floats, Integers
from optimizer.plan import Choice, Plan
from optimizer.problem import Problem, User

_SHARES = 512
_GOLDEN = (5.0**0.5 - 1.0) / 2.0
_STEPS = 28
_BIG = 1e9


@dataclass(frozen=True, slots=True)
class Relaxed:
    """The least objective of these places with divisible resources, and its makespan."""

    objective: float
    makespan_s: float


@dataclass(frozen=True, slots=True, eq=False)
class _Parts:
    """What each user pays for a share of uplink, by compute time that is left."""

    users: list[User]
    is_device_N: Booleans
    gateway_N: Integers
    capacity_G: Floats
    server_units: float
    units_X: Floats
    upload_NX: Floats
    radio_cost_NX: Floats
    samples_N: Floats
    work_N: Floats
    overhead_N: Floats
    students: list[str]
    joule_cost_N: Floats
    modes: list[tuple[Floats, Floats]]


def relax(problem: Problem, plan: Plan, goodput: Callable[[Floats], Floats]) -> Relaxed:
    """Divide the resources freely among the plan's students and places.

    Args:
        problem: As it was planned, without a teacher.
        plan: Who trains what where.
        goodput: Bytes for each second of all the problem's users, [users, X], at shares [X] of
            the uplink in units.
    """
    taking = [(n, each) for n, each in enumerate(plan.choices) if each.place != "out"]
    weights = problem.weights
    price = weights.makespan / weights.time_ref_s
    constant = _constant(problem, plan)
    if not taking:
        return Relaxed(constant, 0.0)
    parts = _gather(problem, taking, goodput)

    def value(makespan_s: float) -> float:
        return price * makespan_s + _dual(parts, makespan_s)

    low, high = 1e-3 * plan.makespan_s, min(problem.deadline_s, 4.0 * plan.makespan_s)
    makespan_s = _golden(value, low, high)
    return Relaxed(value(makespan_s) + constant, makespan_s)


def _golden(value: Callable[[float], float], low: float, high: float) -> float:
    inner, outer = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_inner, at_outer = value(inner), value(outer)
    for _ in range(_STEPS):
        if at_inner <= at_outer:
            high, outer, at_outer = outer, inner, at_inner
            inner = high - _GOLDEN * (high - low)
            at_inner = value(inner)
        else:
            low, inner, at_inner = inner, outer, at_outer
            outer = low + _GOLDEN * (high - low)
            at_outer = value(outer)
    return inner if at_inner <= at_outer else outer


def _constant(problem: Problem, plan: Plan) -> float:
    """Accuracy and the server's joules, which no share changes."""
    weights = problem.weights
    per_server_j = weights.energy * weights.server_energy / weights.energy_ref_j
    gaps = sum(problem.teacher_accuracy - each.accuracy for each in plan.choices)
    joules = sum(each.server_energy_j for each in plan.choices)
    total = weights.accuracy / weights.accuracy_ref * gaps + per_server_j * joules
    return total / max(1, len(plan.choices))


def _gather(
    problem: Problem, taking: list[tuple[int, Choice]], goodput: Callable[[Floats], Floats]
) -> _Parts:
    places = {gateway.name: place for place, gateway in enumerate(problem.gateways)}
    bytes_of = {student.name: student.update_bytes for student in problem.students}
    users = [problem.users[n] for n, _ in taking]
    is_device = np.array([choice.place == "device" for _, choice in taking], bool)
    students = [choice.student or "" for _, choice in taking]
    sent_N = np.array(
        [
            bytes_of[name] if here else (user.twin.unseen_bytes if user.twin is not None else 0.0)
            for user, name, here in zip(users, students, is_device.tolist(), strict=True)
        ]
    )
    units_X = np.geomspace(0.05, max(problem.uplink_choices), _SHARES)
    upload_NX = sent_N[:, None] / goodput(units_X)[[n for n, _ in taking]]
    weights, count = problem.weights, len(problem.users)
    per_joule = [weights.energy / weights.energy_ref_j + user.battery_price_per_j for user in users]
    joule_cost_N = np.array(per_joule) / count
    radio_N = np.array([user.radio_watts for user in users]) * joule_cost_N
    samples_N = np.array([user.samples for user in users], float) * problem.epochs
    server = problem.server.seconds_per_sample
    return _Parts(
        users=users,
        is_device_N=is_device,
        gateway_N=np.array([places[user.gateway] for user in users], np.int64),
        capacity_G=np.array([gateway.uplink_units for gateway in problem.gateways], float),
        server_units=float(problem.server.units),
        units_X=units_X,
        upload_NX=upload_NX,
        radio_cost_NX=upload_NX * radio_N[:, None],
        samples_N=samples_N,
        work_N=samples_N * np.array([server.get(name, 0.0) for name in students]),
        overhead_N=np.where(is_device, [user.overhead_s for user in users], 0.0),
        students=students,
        joule_cost_N=joule_cost_N,
        modes=[_modes(user, name) for user, name in zip(users, students, strict=True)],
    )


def _modes(user: User, student: str) -> tuple[Floats, Floats]:
    """Logarithms of seconds for each sample and watts, fastest first."""
    known = [
        (mode.seconds_per_sample[student], max(mode.watts, 1e-12))
        for mode in user.modes
        if student in mode.seconds_per_sample
    ]
    table = np.log(np.array(sorted(known) or [(1.0, 1.0)]))
    return table[:, 0], table[:, 1]


def _dual(parts: _Parts, makespan_s: float) -> float:
    """What the users pay at least, together, if all have ended by a time."""
    cost_NX, server_NX = _tables(parts, makespan_s)

    def at(server_price: float) -> tuple[float, float]:
        paid_NX = cost_NX + server_price * server_NX
        price_G, place_N = _uplink_prices(parts, paid_NX)
        rows = np.arange(len(place_N))
        value = paid_NX[rows, place_N].sum()
        value += (price_G[parts.gateway_N] * parts.units_X[place_N]).sum()
        value -= price_G @ parts.capacity_G + server_price * parts.server_units
        return float(value), float(server_NX[rows, place_N].sum() - parts.server_units)

    best, excess = at(0.0)
    if excess <= 0.0 or best >= _BIG:
        return best
    low, high = 0.0, 1.0 / len(parts.users)
    while at(high)[1] > 0.0 and high < 1e3:
        low, high = high, 4.0 * high
    for _ in range(_STEPS):
        middle = 0.5 * (low + high)
        value, excess = at(middle)
        best = max(best, value)
        low, high = (middle, high) if excess > 0.0 else (low, middle)
    return best


def _tables(parts: _Parts, makespan_s: float) -> tuple[Floats, Floats]:
    """Cost and server units of each user at every share of the uplink; _BIG: too late."""
    left_NX = makespan_s - parts.upload_NX - parts.overhead_N[:, None]
    is_late_NX = left_NX <= 0.0
    left_NX = np.where(is_late_NX, 1.0, left_NX)
    cost_NX = parts.radio_cost_NX.copy()
    server_NX = np.where(parts.is_device_N[:, None], 0.0, parts.work_N[:, None] / left_NX)
    for n in np.flatnonzero(parts.is_device_N).tolist():
        log_s, log_watts = parts.modes[n]
        wanted_X = np.log(left_NX[n] / max(parts.samples_N[n], 1e-12))
        # Slower than the slowest mode it cannot run: it ends early instead.
        log_X = np.minimum(wanted_X, log_s[-1])
        joules_X = np.exp(np.interp(log_X, log_s, log_watts) + log_X) * parts.samples_N[n]
        cost_NX[n] += parts.joule_cost_N[n] * joules_X
        is_late_NX[n] |= wanted_X < log_s[0]
    return np.where(is_late_NX, _BIG, cost_NX), server_NX


def _uplink_prices(parts: _Parts, paid_NX: Floats) -> tuple[Floats, Integers]:
    """All gateways' prices by bisection together, and the share that each user takes."""
    gateways = len(parts.capacity_G)

    def take(price_G: Floats) -> tuple[Integers, Floats]:
        priced_NX = paid_NX + price_G[parts.gateway_N][:, None] * parts.units_X
        place_N = priced_NX.argmin(axis=1)
        used_G = np.bincount(parts.gateway_N, parts.units_X[place_N], gateways)
        return place_N, used_G - parts.capacity_G

    low_G, high_G = np.zeros(gateways), np.full(gateways, 8.0 / len(parts.users))
    place_N, excess_G = take(low_G)
    if (excess_G <= 0.0).all():
        return low_G, place_N
    is_short_G = excess_G > 0.0
    for _ in range(_STEPS):
        middle_G = np.where(is_short_G, 0.5 * (low_G + high_G), 0.0)
        _, excess_G = take(middle_G)
        low_G = np.where(excess_G > 0.0, middle_G, low_G)
        high_G = np.where(excess_G > 0.0, high_G, middle_G)
    return high_G, take(high_G)[0]
