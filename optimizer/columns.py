# ruff: noqa: N803, N806, N815 - capitals at the end of a name are the shape of its array
"""Every complete way to serve each user, as arrays: what a plan chooses from.

A column is one (student, device, power mode, uplink units), one (student, twin, server units,
uplink units), or sitting out. Its seconds, joules, accuracy and cost are numbers made here, so
that nothing that follows meets a fraction, a product or a logarithm.

Shapes: N rows (the users in order; a teacher that trains beside them is one row more), R columns
before any is dropped (device: M students x K modes x B unit counts; twin: M x S server choices x
B + 1 unit counts, the first of them 0; sitting out: 1), J columns that are worth a look, by time.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from optimizer.plan import Place
from optimizer.problem import Problem, User

Floats: TypeAlias = npt.NDArray[np.float64]
Integers: TypeAlias = npt.NDArray[np.int64]
Booleans: TypeAlias = npt.NDArray[np.bool_]

BIG = 1e9
"""The cost of a column that may not be chosen: above every real one, and still a number."""

OUT = -1
"""The student and mode of a column that names none."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What column r of R means, the same for every row; `pair_R` numbers (student, place).

    Pairs: M students on the device, the same at the twin, sitting out (2M).
    """

    student_R: Integers
    mode_R: Integers
    uplink_R: Integers
    server_R: Integers
    pair_R: Integers
    uplink_levels: Integers
    server_levels: Integers
    device: tuple[int, int, int]
    twin: tuple[int, int, int]

    def place_of(self, raw: int) -> Place:
        """Where a column trains."""
        if self.student_R[raw] == OUT:
            return "out"
        return "twin" if self.mode_R[raw] == OUT else "device"

    @property
    def pairs(self) -> int:
        """How many (student, place) pairs there are, sitting out being the last."""
        return 2 * self.device[0] + 1


@dataclass(frozen=True, eq=False)
class Columns:
    """The table of one problem. `cost_NR` is in units of the objective, or BIG: not allowed.

    `gateway_N` is a place in `capacity_G`, whose last entry is the teacher's: no units.
    `penalty` is what a required user pays for sitting out: more than any plan that keeps the
    rules costs, so that there always is a plan and an unkept rule shows. `seconds_offset` and
    `cost_offset` are those of a teacher that trains before the students.
    """

    problem: Problem
    layout: Layout
    seconds_NR: Floats
    cost_NR: Floats
    accuracy_NR: Floats
    energy_NR: Floats
    server_energy_NR: Floats
    gateway_N: Integers
    capacity_G: Floats
    time_price: float
    penalty: float
    seconds_offset: float
    cost_offset: float
    teacher_units_before: int

    @property
    def users(self) -> int:
        """How many users there are; a row beyond them is the teacher's."""
        return len(self.problem.users)

    @property
    def rows(self) -> int:
        """How many rows there are, the teacher's included."""
        return len(self.gateway_N)

    @property
    def is_floored(self) -> bool:
        """Whether the fleet's mean accuracy has a floor."""
        return self.problem.accuracy_floor is not None and self.users > 0

    @property
    def accuracy_wanted(self) -> float:
        """The least sum of accuracies over the users."""
        return (self.problem.accuracy_floor or 0.0) * self.users

    @cached_property
    def ranked(self) -> "Ranked":
        """The columns worth a look, those of each row by time."""
        return _rank(self)

    def restrict(self, pairs_NP: Booleans) -> "Columns":
        """The same table with only some (student, place) pairs of each user.

        Sitting out stays, and so do all columns of the teacher.
        """
        keep_NP = pairs_NP.copy()
        keep_NP[:, -1] = True
        cost_NR = self.cost_NR.copy()
        keep_NR = np.take(keep_NP, self.layout.pair_R, axis=1)
        cost_NR[: self.users][~keep_NR] = BIG
        return replace(self, cost_NR=cost_NR)


@dataclass(frozen=True, slots=True, eq=False)
class Ranked:
    """Columns of each row by time, padded with seconds of infinity and costs of BIG.

    `raw_NJ` are their places in R. `order` runs over all real columns (places in the flat [N, J])
    by time, `times` are their seconds; no plan is faster than `fastest_s`.
    """

    raw_NJ: Integers
    seconds_NJ: Floats
    cost_NJ: Floats
    uplink_NJ: Floats
    server_NJ: Floats
    accuracy_NJ: Floats
    order: Integers
    times: Floats
    fastest_s: float


def tabulate(problem: Problem) -> Columns:
    """The columns of a problem that has passed `optimizer.validation.check`."""
    layout = _lay_out(problem)
    facts = _gather(problem, layout)
    sequential_s, units_before = _teacher_before(problem)
    raw = _fill(problem, layout, facts)
    forbid = _forbidden(problem, layout, facts, raw, problem.deadline_s - sequential_s)
    cost_NR = _cost(problem, facts, raw)
    cost_NR[forbid | ~np.isfinite(raw.seconds)] = BIG
    time_price = problem.weights.makespan / problem.weights.time_ref_s
    penalty = _penalty(cost_NR, raw.seconds, time_price)
    cost_NR[facts.is_required_N, -1] = penalty
    known = {gateway.name: place for place, gateway in enumerate(problem.gateways)}
    users = max(1, len(problem.users))
    before_j = problem.server.watts_per_unit * units_before * sequential_s
    table = Columns(
        problem=problem,
        layout=layout,
        seconds_NR=np.where(cost_NR < BIG, raw.seconds, np.inf),
        cost_NR=cost_NR,
        accuracy_NR=raw.accuracy,
        energy_NR=raw.energy,
        server_energy_NR=raw.server_energy,
        gateway_N=np.array([known[user.gateway] for user in problem.users], np.int64),
        capacity_G=np.array([gateway.uplink_units for gateway in problem.gateways] + [0], float),
        time_price=time_price,
        penalty=penalty,
        seconds_offset=sequential_s,
        cost_offset=time_price * sequential_s + _server_cost(problem) * before_j / users,
        teacher_units_before=units_before,
    )
    return _with_teacher(table)


@dataclass(frozen=True, slots=True, eq=False)
class _Facts:
    """What is known of the users, gathered from their records; K modes, padded with infinity."""

    samples_N: Floats
    per_sample_NMK: Floats
    watts_NK: Floats
    goodput_NB: Floats
    radio_watts_N: Floats
    accuracy_NM: Floats
    twin_accuracy_NM: Floats
    unseen_N: Floats
    has_twin_N: Booleans
    absent_N: Floats
    memory_N: Floats
    budget_N: Floats
    min_accuracy_N: Floats
    is_required_N: Booleans
    availability_N: Floats
    battery_N: Floats
    overhead_N: Floats


@dataclass(frozen=True, slots=True, eq=False)
class _Raw:
    """Seconds, joules and accuracy of every column, [N, R]."""

    seconds: Floats
    energy: Floats
    server_energy: Floats
    accuracy: Floats


def _lay_out(problem: Problem) -> Layout:
    students = len(problem.students)
    modes = max((len(user.modes) for user in problem.users), default=0)
    uplink = np.array(sorted(problem.uplink_choices), np.int64)
    beside = problem.teacher is not None and not problem.teacher.is_sequential
    choices = set(problem.server.choices)
    if problem.teacher is not None and beside:
        choices |= set(problem.teacher.choices)
    server = np.array(sorted(choices), np.int64)
    # A teacher without any users still needs a row of columns to stand in.
    device = (max(1, students), modes, len(uplink))
    twin = (max(1, students), len(server), len(uplink) + 1)
    m_dev, k_dev, b_dev = (axis.ravel() for axis in np.indices(device))
    m_twin, s_twin, b_twin = (axis.ravel() for axis in np.indices(twin))
    nothing = np.array([OUT])
    levels = np.concatenate([[0], uplink])
    return Layout(
        student_R=np.concatenate([m_dev, m_twin, nothing]),
        mode_R=np.concatenate([k_dev, np.full_like(m_twin, OUT), nothing]),
        uplink_R=np.concatenate([uplink[b_dev], levels[b_twin], [0]]),
        server_R=np.concatenate([np.zeros_like(m_dev), server[s_twin], [0]]),
        pair_R=np.concatenate([m_dev, device[0] + m_twin, [2 * device[0]]]),
        uplink_levels=levels,
        server_levels=np.concatenate([[0], server]).astype(np.int64),
        device=device,
        twin=twin,
    )


def _gather(problem: Problem, layout: Layout) -> _Facts:
    users = problem.users
    names = [student.name for student in problem.students]
    students, modes, _ = layout.device
    by_choice = np.argsort(np.array(problem.uplink_choices))
    goodput = _array([user.goodput_bytes_per_s for user in users], len(by_choice))
    twins = [user.twin.accuracy if user.twin is not None else {} for user in users]

    def column(field: str) -> Floats:
        return np.array([getattr(user, field) for user in users], float)

    return _Facts(
        samples_N=column("samples") * problem.epochs,
        per_sample_NMK=_seconds_per_sample(users, names, modes, students),
        watts_NK=_watts(users, modes),
        goodput_NB=goodput[:, by_choice],
        radio_watts_N=column("radio_watts"),
        accuracy_NM=_array([[u.accuracy.get(m, np.nan) for m in names] for u in users], students),
        twin_accuracy_NM=_array([[t.get(m, np.nan) for m in names] for t in twins], students),
        unseen_N=np.array([u.twin.unseen_bytes if u.twin is not None else 0.0 for u in users]),
        has_twin_N=np.array([u.twin is not None for u in users], bool),
        absent_N=column("absent_accuracy"),
        memory_N=column("memory_bytes"),
        budget_N=column("energy_budget_j"),
        min_accuracy_N=column("min_accuracy"),
        is_required_N=np.array([u.is_required for u in users], bool),
        availability_N=column("availability"),
        battery_N=column("battery_price_per_j"),
        overhead_N=column("overhead_s"),
    )


def _array(rows: object, width: int) -> Floats:
    return np.array(rows, float).reshape(-1, width)


def _seconds_per_sample(
    users: tuple[User, ...], names: list[str], modes: int, students: int
) -> Floats:
    nothing = [np.inf] * len(names)
    rows = [
        [
            *([mode.seconds_per_sample.get(name, np.inf) for name in names] for mode in user.modes),
            *([nothing] * (modes - len(user.modes))),
        ]
        for user in users
    ]
    return np.array(rows, float).reshape(-1, modes, students).transpose(0, 2, 1)


def _watts(users: tuple[User, ...], modes: int) -> Floats:
    rows = [
        [*(mode.watts for mode in user.modes), *([0.0] * (modes - len(user.modes)))]
        for user in users
    ]
    return np.array(rows, float).reshape(-1, modes)


def _fill(problem: Problem, layout: Layout, facts: _Facts) -> _Raw:
    update_M = np.array([student.update_bytes for student in problem.students] or [0.0])
    upload_NMB = _upload_s(update_M[None, :, None], facts.goodput_NB[:, None, :])
    train_NMK = facts.per_sample_NMK * facts.samples_N[:, None, None]
    busy_NMK = train_NMK + facts.overhead_N[:, None, None]
    device_s = busy_NMK[:, :, :, None] + upload_NMB[:, :, None, :]
    train_j = np.where(np.isfinite(train_NMK), train_NMK, 0.0) * facts.watts_NK[:, None, :]
    radio_NMB = upload_NMB * facts.radio_watts_N[:, None, None]
    device_j = train_j[:, :, :, None] + np.nan_to_num(radio_NMB)[:, :, None, :]

    zero_N1 = np.zeros((len(facts.samples_N), 1))
    goodput_NC = np.concatenate([zero_N1, facts.goodput_NB], axis=1)
    sync_NC = _upload_s(facts.unseen_N[:, None], goodput_NC)
    work_NM = facts.samples_N[:, None] * _server_seconds(problem)
    units_S = layout.server_levels[1:]
    compute_NMS = work_NM[:, :, None] / units_S
    twin_s = compute_NMS[:, :, :, None] + sync_NC[:, None, None, :]
    sync_j = np.nan_to_num(sync_NC * facts.radio_watts_N[:, None])
    twin_j = np.broadcast_to(sync_j[:, None, None, :], twin_s.shape)
    server_j = np.nan_to_num(work_NM * problem.server.watts_per_unit, posinf=0.0)
    server_j = np.broadcast_to(server_j[:, :, None, None], twin_s.shape)

    expected_NM = facts.availability_N[:, None] * facts.accuracy_NM
    expected_NM = expected_NM + ((1.0 - facts.availability_N) * facts.absent_N)[:, None]
    accuracy = [
        np.broadcast_to(expected_NM[:, :, None, None], device_s.shape),
        np.broadcast_to(facts.twin_accuracy_NM[:, :, None, None], twin_s.shape),
        facts.absent_N[:, None],
    ]
    return _Raw(
        seconds=_join([device_s, twin_s, zero_N1]),
        energy=_join([device_j, twin_j, zero_N1]),
        server_energy=_join([np.zeros_like(device_j), server_j, zero_N1]),
        accuracy=_join(accuracy),
    )


def _join(blocks: list[Floats]) -> Floats:
    rows = len(blocks[-1])
    return np.concatenate(
        [
            block.reshape(rows, -1) if rows else np.zeros((0, int(np.prod(block.shape[1:]))))
            for block in blocks
        ],
        axis=1,
    )


def _upload_s(size_bytes: Floats, goodput: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(size_bytes > 0.0, size_bytes / goodput, 0.0)


def _server_seconds(problem: Problem) -> Floats:
    table = problem.server.seconds_per_sample
    return np.array([table.get(student.name, np.inf) for student in problem.students] or [np.inf])


def _forbidden(
    problem: Problem, layout: Layout, facts: _Facts, raw: _Raw, deadline_s: float
) -> Booleans:
    memory_M = np.array([student.memory_bytes for student in problem.students] or [0.0])
    is_device_R = layout.mode_R != OUT
    is_twin_R = (layout.student_R != OUT) & ~is_device_R
    too_big_NR = is_device_R & (memory_M > facts.memory_N[:, None])[:, layout.student_R]
    kept_back_NR = is_twin_R & ~facts.has_twin_N[:, None]
    not_sold_R = is_twin_R & ~np.isin(layout.server_R, problem.server.choices)
    not_sold_R |= layout.server_R > problem.server.units
    poor_NR = np.isnan(raw.accuracy) | (raw.accuracy < facts.min_accuracy_N[:, None])
    costly_NR = raw.energy > facts.budget_N[:, None]
    units_G = {gateway.name: gateway.uplink_units for gateway in problem.gateways}
    units_N = np.array([units_G[user.gateway] for user in problem.users], float)
    wide_NR = layout.uplink_R > units_N[:, None]
    forbidden = too_big_NR | kept_back_NR | not_sold_R | poor_NR | costly_NR | wide_NR
    forbidden |= raw.seconds > deadline_s
    forbidden[:, -1] = False
    return np.asarray(forbidden, bool)


def _server_cost(problem: Problem) -> float:
    weights = problem.weights
    return weights.energy * weights.server_energy / weights.energy_ref_j


def _cost(problem: Problem, facts: _Facts, raw: _Raw) -> Floats:
    weights = problem.weights
    per_joule_N = weights.energy / weights.energy_ref_j + facts.battery_N
    gap_NR = np.nan_to_num(problem.teacher_accuracy - raw.accuracy)
    cost_NR = raw.energy * per_joule_N[:, None]
    cost_NR += raw.server_energy * _server_cost(problem)
    cost_NR += gap_NR * (weights.accuracy / weights.accuracy_ref)
    return np.asarray(cost_NR / max(1, len(problem.users)), float)


def _penalty(cost_NR: Floats, seconds_NR: Floats, time_price: float) -> float:
    real = cost_NR < BIG
    if not real.any():
        return 1.0
    spread = np.where(real, cost_NR, -BIG).max(axis=1) - np.where(real, cost_NR, BIG).min(axis=1)
    return float(1.0 + 2.0 * spread.sum() + 2.0 * time_price * seconds_NR[real].max())


def _teacher_before(problem: Problem) -> tuple[float, int]:
    teacher = problem.teacher
    if teacher is None or not teacher.is_sequential:
        return 0.0, 0
    units = max((each for each in teacher.choices if each <= problem.server.units), default=0)
    if units == 0:
        return (np.inf if teacher.unit_seconds > 0.0 else 0.0), 0
    return teacher.unit_seconds / units, units


def _with_teacher(table: Columns) -> Columns:
    problem, layout = table.problem, table.layout
    teacher = problem.teacher
    if teacher is None or teacher.is_sequential:
        return table
    width = len(layout.student_R)
    is_its_own = (layout.pair_R == layout.device[0]) & (layout.uplink_R == 0)
    is_its_own &= np.isin(layout.server_R, teacher.choices)
    is_its_own &= layout.server_R <= problem.server.units
    seconds = np.full(width, np.inf)
    seconds[is_its_own] = teacher.unit_seconds / layout.server_R[is_its_own]
    seconds[seconds > problem.deadline_s] = np.inf
    joules = np.full(width, teacher.unit_seconds * problem.server.watts_per_unit)
    cost = joules * _server_cost(problem) / max(1, table.users)
    cost = np.where(np.isfinite(seconds), cost, BIG)

    def below(top_NR: Floats, row_R: Floats) -> Floats:
        return np.concatenate([top_NR, row_R[None, :]])

    return replace(
        table,
        seconds_NR=below(table.seconds_NR, seconds),
        cost_NR=below(table.cost_NR, cost),
        accuracy_NR=below(table.accuracy_NR, np.zeros(width)),
        energy_NR=below(table.energy_NR, np.zeros(width)),
        server_energy_NR=below(table.server_energy_NR, joules),
        gateway_N=np.append(table.gateway_N, len(table.capacity_G) - 1),
    )


def _rank(table: Columns) -> Ranked:
    layout = table.layout
    keep_NR = table.cost_NR < BIG
    if not table.is_floored:
        keep_NR &= ~_is_dominated(table)
    width = max(1, int(keep_NR.sum(axis=1).max(initial=1)))
    seconds_NR = np.where(keep_NR, table.seconds_NR, np.inf)
    raw_NJ = np.argsort(seconds_NR, axis=1, kind="stable")[:, :width]
    seconds_NJ = np.take_along_axis(seconds_NR, raw_NJ, axis=1)
    is_real_NJ = np.isfinite(seconds_NJ)
    cost_NJ = np.where(is_real_NJ, np.take_along_axis(table.cost_NR, raw_NJ, axis=1), BIG)
    flat = seconds_NJ.ravel()
    order = np.argsort(flat, kind="stable")[: int(is_real_NJ.sum())]
    accuracy_NJ = np.take_along_axis(table.accuracy_NR, raw_NJ, axis=1)
    return Ranked(
        raw_NJ=raw_NJ,
        seconds_NJ=seconds_NJ,
        cost_NJ=cost_NJ,
        uplink_NJ=layout.uplink_R[raw_NJ].astype(float),
        server_NJ=layout.server_R[raw_NJ].astype(float),
        accuracy_NJ=np.where(is_real_NJ, accuracy_NJ, 0.0),
        order=order,
        times=flat[order],
        fastest_s=float(seconds_NJ[:, 0].max(initial=0.0)),
    )


def _is_dominated(table: Columns) -> Booleans:
    """Whether another column of the same row, place and units is no slower and no dearer.

    Of two alike the first stays. Device columns are compared with those of fewer units too.
    """
    students, modes, units = table.layout.device
    rows, split = table.rows, students * modes * units
    dominated = np.zeros(table.cost_NR.shape, bool)
    seconds = table.seconds_NR[:, :split].reshape(rows, students * modes, units)
    cost = table.cost_NR[:, :split].reshape(rows, students * modes, units)
    worse = _worse(seconds, cost)
    dominated[:, :split] = worse.reshape(rows, split)
    _, server, levels = table.layout.twin
    end = split + students * server * levels
    seconds = table.seconds_NR[:, split:end].reshape(rows, students, server * levels)
    cost = table.cost_NR[:, split:end].reshape(rows, students, server * levels)
    dominated[:, split:end] = _worse(seconds, cost).reshape(rows, end - split)
    return dominated


def _worse(seconds: Floats, cost: Floats) -> Booleans:
    """[N, A, C]: whether entry a is dominated within its cell c by another of the A."""
    worse = np.zeros(seconds.shape, bool)
    for a in range(seconds.shape[1]):
        for other in range(seconds.shape[1]):
            if a == other:
                continue
            is_as_good = (seconds[:, other] <= seconds[:, a]) & (cost[:, other] <= cost[:, a])
            if other > a:
                is_as_good &= (seconds[:, other] < seconds[:, a]) | (cost[:, other] < cost[:, a])
            worse[:, a] |= is_as_good
    return worse
