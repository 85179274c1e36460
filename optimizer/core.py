# ruff: noqa: N803, N806 - capitals at the end of a name are the shape of its array
"""The exact model on columns, by Pyomo and HiGHS: on the few that are left, or on all of them.

min  w_T T + sum c_nj x_nj
s.t. each row one column; each gateway, the server and the accuracy floor within their limits;
     sum over j of max(0, t_nj - T_low) x_nj <= T - T_low for every row; x binary.

Costs are multiplied by the number of users, so that the solver's absolute tolerances are small
beside a single user's cost.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from optimizer.columns import Columns, Floats, Integers
from optimizer.sweep import Core, Selected, checked

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """What the solver found: a plan if it has one, and what no plan in the core costs less than.

    `bound` is infinite where the core holds no plan at all, so that what was known is best.
    """

    selected: Selected | None
    bound: float
    is_complete: bool


@dataclass(frozen=True, slots=True)
class Limits:
    """When the solver may stop: time, and the relative gap that is small enough."""

    time_s: float
    tolerance: float


def whole(table: Columns) -> Core:
    """Every column of the table, for cross-checks."""
    ranked = table.ranked
    keep_NJ = np.isfinite(ranked.seconds_NJ)
    last = float(ranked.times[-1]) if len(ranked.times) else 0.0
    return Core(keep_NJ, 0.0, last)


def solve(
    table: Columns, core: Core, limits: Limits, at_most: float | None = None
) -> Answer | None:
    """Solve the model on some columns; None where there is no solver, or it failed.

    Args:
        table: What can be chosen.
        core: Which columns may be used, and the window of the makespan.
        limits: When to stop.
        at_most: The objective of a known plan; dearer ones are cut off.
    """
    if (core.keep_NJ.sum(axis=1) == 0).any():
        return Answer(None, np.inf, True)
    try:
        from pyomo.common.errors import ApplicationError, PyomoException
    except ImportError:
        logger.warning("no solver: pyomo is not installed")
        return None
    try:
        return _solve(table, core, limits, at_most)
    except (ApplicationError, PyomoException, ImportError, RuntimeError, ValueError) as error:
        logger.warning("solver failed: error=%s", error)
        return None


def _solve(table: Columns, core: Core, limits: Limits, at_most: float | None) -> Answer:
    from pyomo.contrib.solver.common.results import SolutionStatus, TerminationCondition
    from pyomo.contrib.solver.solvers.highs import Highs

    scale = float(max(1, table.users))
    part = _Part.of(table, core)
    model = _build(table, core, part, scale, at_most)
    solver = Highs()
    solver.config.load_solutions = False
    solver.config.raise_exception_on_nonoptimal_result = False
    solver.config.threads = 1
    solver.config.time_limit = max(0.01, limits.time_s)
    solver.config.rel_gap = max(1e-9, limits.tolerance)
    solver.config.abs_gap = 1e-9 * scale
    results = solver.solve(model)
    condition = results.termination_condition
    if condition in (
        TerminationCondition.provenInfeasible,
        TerminationCondition.infeasibleOrUnbounded,
    ):
        return Answer(None, np.inf, True)
    bound = results.objective_bound
    selected = None
    if results.solution_status in (SolutionStatus.optimal, SolutionStatus.feasible):
        values = results.solution_loader.get_vars()
        taken = np.array([values[model.x[place]] for place in range(len(part.row))])
        selected = checked(table, _raw_of(table, part, taken))
    return Answer(
        selected,
        -np.inf if bound is None else float(bound) / scale,
        condition == TerminationCondition.convergenceCriteriaSatisfied,
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """The columns of the core, flat and by row; `begin` has each row's first and the end."""

    row: Integers
    place: Integers
    cost: Floats
    seconds: Floats
    uplink: Floats
    server: Floats
    accuracy: Floats
    begin: Integers

    @staticmethod
    def of(table: Columns, core: Core) -> "_Part":
        ranked = table.ranked
        row, place = np.nonzero(core.keep_NJ)

        def flat(values_NJ: Floats) -> Floats:
            return values_NJ[row, place]

        return _Part(
            row=row,
            place=place,
            cost=flat(ranked.cost_NJ),
            seconds=flat(ranked.seconds_NJ),
            uplink=flat(ranked.uplink_NJ),
            server=flat(ranked.server_NJ),
            accuracy=flat(ranked.accuracy_NJ),
            begin=np.searchsorted(row, np.arange(table.rows + 1)),
        )


def _raw_of(table: Columns, part: _Part, taken: Floats) -> Integers:
    raw_N = np.zeros(table.rows, np.int64)
    for row in range(table.rows):
        begin, end = part.begin[row], part.begin[row + 1]
        best = begin + int(taken[begin:end].argmax())
        raw_N[row] = table.ranked.raw_NJ[row, part.place[best]]
    return raw_N


def _build(table: Columns, core: Core, part: _Part, scale: float, at_most: float | None) -> Any:
    import pyomo.environ as pyo
    from pyomo.core.expr import LinearExpression

    model = pyo.ConcreteModel()
    model.x = pyo.Var(range(len(part.row)), domain=pyo.Binary)
    model.late = pyo.Var(bounds=(0.0, max(0.0, core.longest_s - core.shortest_s)))
    x = list(model.x.values())

    def linear(places: Integers, values: Floats) -> list[Any]:
        used = np.flatnonzero(values[places])
        coefficients = values[places][used].tolist()
        return [coefficients, [x[place] for place in places[used].tolist()]]

    everything = np.arange(len(part.row))
    coefficients, variables = linear(everything, part.cost * scale)
    price = table.time_price * scale
    total = LinearExpression(
        constant=price * core.shortest_s,
        linear_coefs=[*coefficients, price],
        linear_vars=[*variables, model.late],
    )
    model.total = pyo.Objective(expr=total)
    model.rules = pyo.ConstraintList()
    for places, values, least, most in _rules(table, part):
        coefficients, variables = linear(places, values)
        if least is None and most is not None and sum(filter(_is_above, coefficients)) <= most:
            continue
        expression = LinearExpression(linear_coefs=coefficients, linear_vars=variables)
        model.rules.add((least, expression, most))
    for row in range(table.rows):
        places = np.arange(part.begin[row], part.begin[row + 1])
        late = np.maximum(0.0, part.seconds - core.shortest_s)
        coefficients, variables = linear(places, late)
        if coefficients:
            expression = LinearExpression(
                linear_coefs=[*coefficients, -1.0], linear_vars=[*variables, model.late]
            )
            model.rules.add((None, expression, 0.0))
    if at_most is not None:
        model.known = pyo.Constraint(expr=total <= at_most * scale + 1e-9)
    return model


def _is_above(value: float) -> bool:
    return value > 0.0


def _rules(
    table: Columns, part: _Part
) -> Iterator[tuple[Integers, Floats, float | None, float | None]]:
    everything = np.arange(len(part.row))
    for row in range(table.rows):
        own = np.arange(part.begin[row], part.begin[row + 1])
        yield own, np.ones(len(part.row)), 1.0, 1.0
    gateway = table.gateway_N[part.row]
    for place, capacity in enumerate(table.capacity_G[:-1].tolist()):
        yield np.flatnonzero(gateway == place), part.uplink, None, capacity
    yield everything, part.server, None, float(table.problem.server.units)
    if table.is_floored:
        counts = np.where(part.row < table.users, part.accuracy, 0.0)
        yield everything, counts, table.accuracy_wanted, None
