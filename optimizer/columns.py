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

import numpy as np

from optimizer.figures import cost_of, figure, gather, rules, server_cost
from optimizer.layout import BIG, OUT, Booleans, Floats, Integers, Layout, lay_out
from optimizer.problem import Problem
from optimizer.ranking import Ranked, rank

__all__ = ["BIG", "OUT", "Booleans", "Columns", "Floats", "Integers", "tabulate"]


@dataclass(frozen=True, eq=False)
class Columns:
    """The table of one problem. `cost_NR` is in units of the objective, or BIG: not allowed.

    `gateway_N` is a place in `capacity_G`, whose last entry is the teacher's: no units.
    `penalty` is what a required user pays extra for sitting out: more than the dearest plan costs
    over the cheapest, so that there always is a plan and an unkept rule shows. `seconds_offset` and
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
    def ranked(self) -> Ranked:
        """The columns worth a look, those of each row by time."""
        return rank(
            self.layout,
            self.seconds_NR,
            self.cost_NR,
            self.accuracy_NR,
            with_accuracy=self.is_floored,
        )

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


def tabulate(problem: Problem) -> Columns:
    """The columns of a problem that has passed `optimizer.validation.check`."""
    layout = lay_out(problem)
    facts = gather(problem, layout)
    sequential_s, units_before = _teacher_before(problem)
    raw = figure(problem, layout, facts)
    cost_NR = cost_of(problem, facts, raw)
    for broken_NR in rules(problem, layout, facts, raw, problem.deadline_s - sequential_s).values():
        cost_NR[broken_NR] = BIG
    time_price = problem.weights.makespan / problem.weights.time_ref_s
    penalty = _penalty(cost_NR, raw.seconds, time_price)
    cost_NR[facts.is_required_N, -1] += penalty
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
        cost_offset=time_price * sequential_s + server_cost(problem) * before_j / users,
        teacher_units_before=units_before,
    )
    return _with_teacher(table)


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
    cost = joules * server_cost(problem) / max(1, table.users)
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
