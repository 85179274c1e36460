# ruff: noqa: N802, N803, N806, N815 - capitals at the end of a name are the shape of its array
"""What a learned planner sees of a round: every choice of every user, at a ladder of prices.

All of it is free of units, so that what was learned on some fleets holds on larger ones and
under other loads. A fleet's `spread` is what sitting out costs a user more than its best column,
in the median. Costs are counted from the user's best column in spreads. A unit's fair price is
one spread over the units that there are for each user.

Shapes: N users, P (student, place) pairs (sitting out last), R columns, L rungs of the ladder,
C figures of the surroundings, F = P L + C.
"""

from dataclasses import dataclass

import numpy as np

from optimizer.columns import BIG, Booleans, Columns, Floats, Integers
from optimizer.plan import Prices

CEILING = 2.0
"""Costs are cut off at so many spreads: beyond them a choice is only bad."""

AROUND = 6
"""How many figures describe the surroundings."""

LADDER: tuple[tuple[float, float, float], ...] = (
    (0.08, 0.05, 0.85),
    *((uplink, server, late) for uplink in (0.03, 0.2) for server in (0.0, 0.12)
      for late in (0.6, 0.95)),
)  # fmt: skip
"""Rungs: uplink and server as shares of their fair prices, and which share of the users would
be done by the makespan if each had a fair share of everything."""


@dataclass(frozen=True, slots=True, eq=False)
class Observation:
    """What is seen: costs in spreads from 0 to `CEILING`, which pairs are legal, the surroundings.

    The surroundings: logarithms of uplink units and of server units for each user, ten over the
    number of users (at most 1: it says little of large fleets), the logarithm of how late the
    slow are (times of the ladder's last rung over its first), and those of what would be asked
    for at the middle rung's prices over what there is: uplink at the user's gateway, server.
    """

    costs_NPL: Floats
    around_NC: Floats
    legal_NP: Booleans

    @property
    def features_NF(self) -> Floats:
        """All figures of each user in a row."""
        users, pairs, rungs = self.costs_NPL.shape
        return np.concatenate([self.costs_NPL.reshape(users, pairs * rungs), self.around_NC], 1)


@dataclass(frozen=True, slots=True, eq=False)
class Scale:
    """What makes a table's costs free of units; `base_N` is the cost of each user's best column."""

    base_N: Floats
    spread: float
    units_per_user_N: Floats
    server_per_user: float


def scale_of(table: Columns) -> Scale:
    """The scale of a table, in units of the objective times the number of users."""
    cost_NR = table.users * table.cost_NR[: table.users]
    allowed_NR = table.cost_NR[: table.users] < BIG
    real_NR = allowed_NR.copy()
    # A required user's sitting out costs a penalty, which says nothing of the fleet.
    required_N = table.cost_NR[: table.users, -1] >= table.penalty
    real_NR[required_N, -1] = ~real_NR[required_N, :-1].any(axis=1)
    base_N = np.where(real_NR, cost_NR, np.inf).min(axis=1)
    dearest_N = np.where(real_NR, cost_NR, -np.inf).max(axis=1)
    apart_N = np.where(required_N, dearest_N, cost_NR[:, -1]) - base_N
    apart = apart_N[apart_N > 0]
    users_G = np.bincount(table.gateway_N[: table.users], minlength=len(table.capacity_G))
    units_G = table.capacity_G / np.maximum(1, users_G)
    return Scale(
        base_N=base_N,
        spread=float(np.median(apart)) if len(apart) else 1.0,
        units_per_user_N=np.maximum(units_G, 1e-3)[table.gateway_N[: table.users]],
        server_per_user=max(table.problem.server.units / max(1, table.users), 1e-3),
    )


def priced_columns(table: Columns, uplink_N: Floats, server: float, makespan_s: float) -> Floats:
    """What each column costs each user at prices, [N, R], times the number of users.

    It is cost + units at their prices + what it costs all if the makespan has to wait for it: the
    cost of a lone deviation.

    Args:
        table: The columns.
        uplink_N: Price of an uplink unit at each user's gateway, times the number of users.
        server: Price of a server unit, times the number of users.
        makespan_s: The makespan of the others.
    """
    layout, users = table.layout, table.users
    # Columns that are not allowed have infinite seconds.
    late_NR = np.maximum(0.0, table.seconds_NR[:users] - makespan_s)
    v_NR = users * (table.cost_NR[:users] + table.time_price * late_NR)
    v_NR += uplink_N[:, None] * layout.uplink_R
    v_NR += server * layout.server_R
    return np.asarray(v_NR, float)


def pair_costs(table: Columns, scale: Scale, priced_NR: Floats) -> Floats:
    """The cost of each pair's best column, [N, P], in spreads; `CEILING` if not legal."""
    starts, pairs = _pairs_with_columns(table)
    least_NP = np.full((table.users, table.layout.pairs), np.inf)
    least_NP[:, pairs] = np.minimum.reduceat(priced_NR, starts, axis=1)
    return np.clip((least_NP - scale.base_N[:, None]) / scale.spread, 0.0, CEILING)


def costs_at(table: Columns, scale: Scale, prices: Prices) -> Floats:
    """`pair_costs` at a plan's prices, which are what they shall be learned from."""
    by_gateway = [prices.uplink[gateway.name] for gateway in table.problem.gateways]
    uplink_G = prices.users * np.array([*by_gateway, 0.0])
    uplink_N = uplink_G[table.gateway_N[: table.users]]
    server = prices.users * prices.server
    return pair_costs(table, scale, priced_columns(table, uplink_N, server, prices.makespan_s))


def observe(table: Columns) -> tuple[Observation, Scale]:
    """Look at a round's table from all rungs of the ladder."""
    scale, users, pairs = scale_of(table), table.users, table.layout.pairs
    fair_s = _fair_seconds(table, scale)
    times = {late: float(np.quantile(fair_s, late)) for _, _, late in LADDER}
    costs_NPL = np.zeros((users, pairs, len(LADDER)))
    asked_N2 = np.zeros((users, 2))
    for place, (uplink, server, late) in enumerate(LADDER if users else ()):
        uplink_N = uplink * scale.spread / scale.units_per_user_N
        server_price = server * scale.spread / scale.server_per_user
        priced_NR = priced_columns(table, uplink_N, server_price, times[late])
        costs_NPL[:, :, place] = pair_costs(table, scale, priced_NR)
        if place == 0:
            asked_N2 = _asked_for(table, scale, priced_NR.argmin(axis=1))
    starts, with_columns = _pairs_with_columns(table)
    legal_NP = np.zeros((users, pairs), bool)
    allowed_NR = table.cost_NR[:users] < BIG
    legal_NP[:, with_columns] = np.logical_or.reduceat(allowed_NR, starts, axis=1)
    slow = max(times.values()) / max(min(times.values()), 1e-9)
    around_NC = np.stack(
        [
            np.log(scale.units_per_user_N),
            np.full(users, np.log(scale.server_per_user)),
            np.full(users, 10.0 / max(10, users)),
            np.full(users, np.log(max(slow, 1.0))),
            *asked_N2.T,
        ],
        axis=1,
    )
    return Observation(costs_NPL, around_NC, legal_NP), scale


def _asked_for(table: Columns, scale: Scale, column_N: Integers) -> Floats:
    """Logarithms of uplink (at the user's gateway) and server asked for, over what there is."""
    layout, gateway_N = table.layout, table.gateway_N[: table.users]
    uplink_G = np.bincount(gateway_N, layout.uplink_R[column_N], minlength=len(table.capacity_G))
    users_G = np.bincount(gateway_N, minlength=len(table.capacity_G))
    uplink_N = (uplink_G / np.maximum(1, users_G))[gateway_N] / scale.units_per_user_N
    server = float(layout.server_R[column_N].mean()) / scale.server_per_user
    asked_N2 = np.stack([uplink_N, np.full(table.users, server)], axis=1)
    return np.asarray(np.log(np.clip(asked_N2, 0.1, 10.0)), float)


def _pairs_with_columns(table: Columns) -> tuple[Integers, Integers]:
    """Where columns of a pair begin, and which pairs: all that any user has a mode for."""
    pair_R = table.layout.pair_R
    starts = np.flatnonzero(np.diff(pair_R, prepend=-1))
    return starts, pair_R[starts]


def _fair_seconds(table: Columns, scale: Scale) -> Floats:
    """Seconds with a fair share of everything, of the users that can do anything."""
    layout, users = table.layout, table.users
    least_server = layout.server_levels[1] if len(layout.server_levels) > 1 else 0
    is_fair_NR = (
        layout.uplink_R <= np.maximum(layout.uplink_levels[1], scale.units_per_user_N)[:, None]
    )
    is_fair_NR &= layout.server_R <= max(least_server, scale.server_per_user)
    is_fair_NR[:, -1] = False
    fair_N = np.where(is_fair_NR, table.seconds_NR[:users], np.inf).min(axis=1, initial=np.inf)
    real = fair_N[np.isfinite(fair_N)]
    return real if len(real) else np.zeros(1)
