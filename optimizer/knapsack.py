# ruff: noqa: N803, N806, N815 - capitals at the end of a name are the shape of its array
"""Whole uplink units at every gateway: the exact choice at a fixed makespan and server price.

At a fixed makespan and server price the gateways are apart, and each is a multiple-choice
knapsack in few units: dynamic programming over units, one user after the other, all gateways
side by side (Dudzinski and Walukiewicz 1987, section 3.1). The prices of uplink units leave a
gap of about one user's cost for each gateway; this leaves only that of the server.

Shapes: G gateways, U users of the fullest gateway, B unit counts (0 first), C units.
"""

from dataclasses import dataclass

import numpy as np

from optimizer.columns import BIG, Columns, Floats, Integers
from optimizer.pricing import Cells, Duals, Priced, bisect_server, cells_at

_MOST_STATES = 40_000_000


@dataclass(frozen=True, slots=True, eq=False)
class _Seats:
    """Who sits where: `row_GU` is the row of a gateway's u-th user, -1 for none."""

    row_GU: Integers
    units_B: Integers
    capacity_G: Integers

    @staticmethod
    def of(table: Columns) -> "_Seats":
        gateways = len(table.capacity_G)
        count_G = np.bincount(table.gateway_N, minlength=gateways)
        order = np.argsort(table.gateway_N, kind="stable")
        begin_G = np.cumsum(count_G) - count_G
        row_GU = np.full((gateways, int(count_G.max(initial=0))), -1)
        place = np.arange(table.rows) - begin_G[table.gateway_N[order]]
        row_GU[table.gateway_N[order], place] = order
        units_B = table.layout.uplink_levels
        most = count_G * int(units_B.max())
        return _Seats(row_GU, units_B, np.minimum(table.capacity_G.astype(np.int64), most))


def whole_units_at(table: Columns, limit_s: float, near: Duals) -> Priced | None:
    """The best prices of the server at a makespan where gateways give whole units only.

    The value bounds every plan of this makespan from below. None where the gateways' units are
    too many for it, or accuracy has a floor.
    """
    if table.is_floored or not table.users:
        return None
    seats = _Seats.of(table)
    if seats.row_GU.size * (int(seats.capacity_G.max()) + 1) > _MOST_STATES:
        return None
    cells = cells_at(table, limit_s, 0.0)

    def at(price: float) -> Priced:
        return _choose(cells, seats, near, price)

    return bisect_server(table, at, near)


def _choose(cells: Cells, seats: _Seats, near: Duals, server_price: float) -> Priced:
    table = cells.table
    layout = table.layout
    priced_NBS = cells.cost_NBS + server_price * layout.server_levels
    w_NB = priced_NBS.min(axis=2)
    level_N, total = _fill(w_NB, seats)
    server_N = priced_NBS[np.arange(table.rows), level_N].argmin(axis=1)
    value = total + table.time_price * cells.limit_s
    value -= server_price * table.problem.server.units
    duals = Duals(near.uplink_G, server_price, 0.0)
    return Priced(cells, duals, float(value), level_N, server_N)


def _fill(w_NB: Floats, seats: _Seats) -> tuple[Integers, float]:
    """The unit counts of least total cost, and that cost."""
    gateways, users = seats.row_GU.shape
    most = int(seats.units_B.max())
    width = int(seats.capacity_G.max()) + 1
    none_B = np.where(seats.units_B == 0, 0.0, BIG)
    w_GUB = np.where(seats.row_GU[:, :, None] >= 0, w_NB[seats.row_GU], none_B)
    # cost_GC[:, most + c] is the least cost of the users so far with at most c units.
    cost_GC = np.full((gateways, most + width), BIG)
    cost_GC[:, most:] = 0.0
    taken_UGC = np.empty((users, gateways, width), np.int8)
    tried_BGC = np.empty((len(seats.units_B), gateways, width))
    for user in range(users):
        for level, units in enumerate(seats.units_B.tolist()):
            np.add(
                cost_GC[:, most - units : most - units + width],
                w_GUB[:, user, level, None],
                out=tried_BGC[level],
            )
        best_GC = tried_BGC.min(axis=0)
        taken_UGC[user] = (tried_BGC == best_GC).argmax(axis=0)
        cost_GC[:, most:] = best_GC
    return _trace(taken_UGC, seats, len(w_NB)), float(
        cost_GC[np.arange(gateways), most + seats.capacity_G].sum()
    )


def _trace(taken_UGC: np.ndarray, seats: _Seats, rows: int) -> Integers:
    level_N = np.zeros(rows, np.int64)
    gateways = np.arange(len(seats.row_GU))
    left_G = seats.capacity_G.copy()
    for user in reversed(range(len(taken_UGC))):
        level_G = taken_UGC[user, gateways, left_G].astype(np.int64)
        row_G = seats.row_GU[:, user]
        level_N[row_G[row_G >= 0]] = level_G[row_G >= 0]
        left_G -= seats.units_B[level_G]
    return level_N
