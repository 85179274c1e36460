# ruff: noqa: N806 - capitals at the end of a name are the shape of its array
"""By how many units capacities are short for those who must take part: the elastic model.

Each capacity row may be exceeded, and the sum of what exceeds is least. What costs, seconds and
joules are is forgotten: a column is only its units, so that few are left of each user.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from optimizer.columns import BIG, Columns


@dataclass(frozen=True, slots=True)
class Shortage:
    """Units short, by gateway (its place) and of the server; what each row takes, in units."""

    uplink: Mapping[int, int]
    server: int
    taken: Mapping[int, tuple[int, int]]

    @property
    def is_none(self) -> bool:
        """Whether everything fits."""
        return not self.uplink and not self.server


def shortage(table: Columns, limit_s: float) -> Shortage:
    """The least units short in sum when required users and the teacher end by a time.

    Raises:
        ImportError: Pyomo or HiGHS is not installed.
    """
    import pyomo.environ as pyo
    from pyomo.contrib.solver.solvers.highs import Highs

    offers = {row: _least_units(table, row, limit_s) for row in _who_must(table)}
    if any(not units for units in offers.values()):
        raise ValueError("a user who must take part has no column by this time")
    model = pyo.ConcreteModel()
    keys = [(row, place) for row, units in offers.items() for place in range(len(units))]
    model.x = pyo.Var(keys, domain=pyo.Binary)
    gateways = range(len(table.capacity_G) - 1)
    model.short = pyo.Var(gateways, domain=pyo.NonNegativeReals)
    model.server_short = pyo.Var(domain=pyo.NonNegativeReals)
    model.total = pyo.Objective(
        expr=sum(model.short[place] for place in gateways) + model.server_short
    )
    model.rules = pyo.ConstraintList()
    by_gateway = defaultdict(list)
    server = [-1.0 * model.server_short]
    for row, units in offers.items():
        model.rules.add(sum(model.x[row, place] for place in range(len(units))) == 1)
        for place, (uplink_units, server_units) in enumerate(units):
            by_gateway[int(table.gateway_N[row])].append(uplink_units * model.x[row, place])
            server.append(server_units * model.x[row, place])
    for place in gateways:
        terms = [*by_gateway[place], -1.0 * model.short[place]]
        model.rules.add(sum(terms) <= float(table.capacity_G[place]))
    model.rules.add(sum(server) <= float(table.problem.server.units))
    solver = Highs()
    solver.config.threads = 1
    solver.config.time_limit = 10.0
    solver.solve(model)
    taken = {row: offers[row][place] for row, place in keys if model.x[row, place].value > 0.5}
    short = {place: round(model.short[place].value) for place in gateways}
    return Shortage(
        {place: units for place, units in short.items() if units},
        round(model.server_short.value),
        taken,
    )


def _who_must(table: Columns) -> list[int]:
    rows = [place for place, user in enumerate(table.problem.users) if user.is_required]
    return [*rows, *range(table.users, table.rows)]


def least_deadline(table: Columns) -> float | None:
    """The earliest time by which all who must take part fit; None where none is.

    `table` is that of the problem without a deadline.
    """
    must = np.array(_who_must(table), np.int64)
    if not len(must):
        return 0.0
    seconds_NR = np.where(table.cost_NR[must] < BIG, table.seconds_NR[must], np.inf)
    seconds_NR[: len(must) - (table.rows - table.users), -1] = np.inf
    earliest_s = float(seconds_NR.min(axis=1).max())
    times = np.unique(seconds_NR[np.isfinite(seconds_NR)])
    times = times[times >= earliest_s]
    if not len(times) or not shortage(table, float(times[-1])).is_none:
        return None
    low, high = 0, len(times) - 1
    while low < high:
        middle = (low + high) // 2
        if shortage(table, float(times[middle])).is_none:
            high = middle
        else:
            low = middle + 1
    return float(times[low])


def _least_units(table: Columns, row: int, limit_s: float) -> list[tuple[int, int]]:
    layout = table.layout
    allowed_R = (table.cost_NR[row] < BIG) & (table.seconds_NR[row] <= limit_s)
    if row < table.users:
        allowed_R[-1] = False
    pairs = sorted(
        set(
            zip(
                layout.uplink_R[allowed_R].tolist(),
                layout.server_R[allowed_R].tolist(),
                strict=True,
            )
        )
    )
    kept: list[tuple[int, int]] = []
    for uplink_units, server_units in pairs:
        if all(server_units < other for _, other in kept):
            kept.append((uplink_units, server_units))
    return kept
