# ruff: noqa: N803, N806, N815 - capitals at the end of a name are the shape of its array
"""The price sweep: prices, a bound over all makespans, plans on the way, and what they rule out.

Each turn takes the makespan where the bound is lowest, finds the best prices there, rounds what
the users take at them to a plan, and raises the bound everywhere with the new prices. What is
left when prices can do no more is a window of makespans, and the few columns that a better plan
could use: reduced-cost fixing leaves those to a solver.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from optimizer.columns import BIG, Booleans, Columns, Floats, Integers
from optimizer.pricing import (
    Cells,
    Curve,
    Duals,
    Priced,
    bound_curve,
    chosen_columns,
    price_at,
    priced_columns,
)

_TURNS = 60
_PIECES = 12


@dataclass(frozen=True, slots=True, eq=False)
class Selected:
    """A plan as one column (its place in R) for each row, and its objective without offsets."""

    raw_N: Integers
    objective: float


@dataclass(slots=True, eq=False)
class Sweep:
    """What is known so far. `bound` is the highest known at each of `times`."""

    table: Columns
    best: Selected
    times: Floats
    bound: Floats
    duals: Duals
    curves: list[Curve] = field(default_factory=list)
    priced: dict[int, Priced] = field(default_factory=dict)

    @property
    def lower(self) -> float:
        """No plan costs less."""
        return min(float(self.bound.min(initial=np.inf)), self.best.objective)

    @property
    def gap(self) -> float:
        """What the best plan may lose, as a share of its objective."""
        return relative_gap(self.best.objective, self.lower)

    def offer(self, selected: Selected | None) -> None:
        """Keep a plan if it is the best yet."""
        if selected is not None and selected.objective < self.best.objective:
            self.best = selected

    def raise_bound(self, duals: Duals) -> None:
        """Raise the bound by what prices prove."""
        curve = bound_curve(self.table, duals)
        self.curves.append(curve)
        np.maximum(self.bound, curve.bound, out=self.bound)

    def price(self, place: int) -> bool:
        """Find the prices at a place of `times`. False if that has been done before."""
        if place in self.priced:
            return False
        known = min(self.priced, key=lambda other: abs(other - place), default=None)
        near = self.duals if known is None else self.priced[known].duals
        priced = price_at(self.table, float(self.times[place]), near, self.best.objective)
        self.priced[place] = priced
        self.duals = priced.duals
        self.offer(round_up(priced))
        self.raise_bound(priced.duals)
        return True


def relative_gap(objective: float, bound: float) -> float:
    """(objective - bound) / |objective|, and 0 where they are equal but for rounding."""
    if not np.isfinite(objective):
        return np.inf
    difference = objective - bound
    if difference <= 1e-9 * max(1.0, abs(objective)):
        return 0.0
    return difference / max(abs(objective), 1e-12)


def sweep(
    table: Columns, tolerance: float, is_over: Callable[[], bool], near: Duals | None = None
) -> Sweep:
    """Raise the bound and find plans until the gap is small, prices do no more, or time is over.

    Args:
        table: What can be chosen; every row must have a column.
        tolerance: The relative gap that is small enough.
        is_over: Whether time is over; asked once a turn.
        near: The last round's prices, if they fit the table.
    """
    ranked = table.ranked
    start = near if near is not None else Duals.zero(table)
    curve = bound_curve(table, start)
    idle = Selected(np.zeros(table.rows, np.int64), np.inf)
    state = Sweep(table, idle, curve.times, curve.bound.copy(), start, [curve])
    if not table.rows:
        state.best = Selected(np.zeros(0, np.int64), 0.0)
    if not len(ranked.times):
        return state
    state.offer(everybody_idle(table))
    if state.best.objective >= table.penalty:
        # Some must take part: at the slowest makespan they can most easily.
        state.price(len(state.times) - 1)
    for _ in range(_TURNS):
        if not state.price(int(state.bound.argmin())) or state.gap <= tolerance or is_over():
            break
    return state


def everybody_idle(table: Columns) -> Selected | None:
    """All sit out, and the teacher trains as fast as it can."""
    raw_N = np.full(table.rows, len(table.layout.student_R) - 1)
    if table.rows > table.users:
        raw_N[-1] = table.seconds_NR[-1].argmin()
    return checked(table, raw_N)


def checked(table: Columns, raw_N: Integers) -> Selected | None:
    """The plan with its objective, or None if it breaks a rule."""
    layout, rows = table.layout, np.arange(table.rows)
    cost_N = table.cost_NR[rows, raw_N]
    uplink_G = np.bincount(table.gateway_N, layout.uplink_R[raw_N], len(table.capacity_G))
    if (uplink_G > table.capacity_G).any() or (cost_N >= BIG).any():
        return None
    if layout.server_R[raw_N].sum() > table.problem.server.units:
        return None
    if table.is_floored:
        reached = table.accuracy_NR[rows, raw_N][: table.users].sum()
        if reached < table.accuracy_wanted * (1.0 - 1e-12):
            return None
    makespan_s = table.seconds_NR[rows, raw_N].max(initial=0.0)
    return Selected(raw_N, float(cost_N.sum() + table.time_price * makespan_s))


def round_up(priced: Priced) -> Selected | None:
    """A plan from prices: what each row takes at them, and the rest of the units put to use."""
    cells = priced.cells
    table = cells.table
    plain = checked(table, chosen_columns(cells, priced.uplink_level_N, priced.server_level_N))
    if plain is None:
        return None
    level_N, server_N = _use_the_rest(priced)
    filled = checked(table, chosen_columns(cells, level_N, server_N))
    return filled if filled is not None and filled.objective < plain.objective else plain


def _use_the_rest(priced: Priced) -> tuple[Integers, Integers]:
    """Move one row at a time to what it likes better, the most gain for the units' price first."""
    cells = priced.cells
    table = cells.table
    layout, rows = table.layout, np.arange(table.rows)
    level_N, server_N = priced.uplink_level_N.copy(), priced.server_level_N.copy()
    used_G = np.bincount(
        table.gateway_N, layout.uplink_levels[level_N], minlength=len(table.capacity_G)
    )
    left_G = table.capacity_G - used_G
    left = float(table.problem.server.units - layout.server_levels[server_N].sum())
    score_N, move_N = np.full(table.rows, -np.inf), np.zeros(table.rows, np.int64)
    again = rows
    while True:
        score_N[again], move_N[again] = _best_moves(
            cells, priced.duals, again, (level_N[again], server_N[again]), (left_G, left)
        )
        n = int(score_N.argmax()) if len(score_N) else 0
        if not len(score_N) or score_N[n] <= 0.0:
            return level_N, server_N
        to_level, to_server = divmod(int(move_N[n]), len(layout.server_levels))
        gateway = table.gateway_N[n]
        left_G[gateway] -= layout.uplink_levels[to_level] - layout.uplink_levels[level_N[n]]
        taken = layout.server_levels[to_server] - layout.server_levels[server_N[n]]
        left -= float(taken)
        level_N[n], server_N[n] = to_level, to_server
        again = rows if taken else rows[table.gateway_N == gateway]


def _best_moves(
    cells: Cells,
    duals: Duals,
    rows: Integers,
    held: tuple[Integers, Integers],
    left: tuple[Floats, float],
) -> tuple[Floats, Integers]:
    """For each of some rows its best move within what is left: score (0: none) and cell."""
    table = cells.table
    layout = table.layout
    (level_N, server_N), (left_G, left_server) = held, left
    cost_NBS = cells.cost_NBS[rows]
    gateway_N = table.gateway_N[rows]
    gain_NBS = cost_NBS[np.arange(len(rows)), level_N, server_N][:, None, None] - cost_NBS
    more_NB = layout.uplink_levels - layout.uplink_levels[level_N][:, None]
    more_NS = layout.server_levels - layout.server_levels[server_N][:, None]
    fits_NBS = (more_NB <= left_G[gateway_N][:, None])[:, :, None]
    fits_NBS = fits_NBS & (more_NS <= left_server)[:, None, :] & (gain_NBS > 1e-12)
    paid_NBS = (more_NB * duals.uplink_G[gateway_N][:, None])[:, :, None]
    paid_NBS = paid_NBS + (more_NS * duals.server)[:, None, :]
    smallest = 1e-3 / max(1, table.users)
    score_NBS = np.where(fits_NBS, gain_NBS / np.maximum(paid_NBS, smallest), 0.0)
    score_NX = score_NBS.reshape(len(rows), -1)
    move_N = score_NX.argmax(axis=1)
    return score_NX[np.arange(len(rows)), move_N], move_N


@dataclass(frozen=True, slots=True, eq=False)
class Core:
    """What a better plan than the best known could still use."""

    keep_NJ: Booleans
    shortest_s: float
    longest_s: float

    @property
    def columns(self) -> int:
        """How many columns are left."""
        return int(self.keep_NJ.sum())


def core_of(state: Sweep, places: Integers) -> Core:
    """Fix columns by reduced cost, for makespans at some ascending places of `times`.

    If a plan below the best used column j of row n and had makespan T, it would cost at least
    L(T) + v_j - min { v_nk : t_nk <= T }.
    """
    keep_NJ = np.zeros(state.table.ranked.seconds_NJ.shape, bool)
    least = state.best.objective - 1e-10 * max(1.0, abs(state.best.objective))
    window = places[state.bound[places] < least]
    if len(window) == 0:
        return Core(keep_NJ, 0.0, 0.0)
    for piece in np.array_split(window, min(_PIECES, len(window))):
        _keep(state, piece, least, keep_NJ)
    return Core(keep_NJ, float(state.times[window[0]]), float(state.times[window[-1]]))


def _keep(state: Sweep, piece: Integers, least: float, keep_NJ: Booleans) -> None:
    table = state.table
    ranked = table.ranked
    begin_s, end_s = state.times[piece[0]], state.times[piece[-1]]
    curve = max(state.curves, key=lambda each: float(each.bound[piece].min()))
    v_NJ = priced_columns(table, curve.duals)
    best_NJ = np.minimum.accumulate(v_NJ, axis=1)
    early_NJ = ranked.seconds_NJ <= begin_s
    last_N = early_NJ.sum(axis=1) - 1
    at_begin_N = best_NJ[np.arange(table.rows), last_N]
    loss_NJ = v_NJ - np.minimum(best_NJ, at_begin_N[:, None])
    keep_NJ |= (loss_NJ < least - curve.bound[piece].min()) & (ranked.seconds_NJ <= end_s)
