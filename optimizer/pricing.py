# ruff: noqa: N803, N806, N815 - capitals at the end of a name are the shape of its array
"""Prices for uplink, server and accuracy, and the bound that any prices give.

At prices lambda (a unit of gateway g), mu (a server unit) and nu (accuracy) a column really costs
v = c + lambda b + mu s - nu a, and no plan with makespan T costs less than

    L(T) = w_T T + sum over n of min { v_nj : t_nj <= T } - lambda RB - mu S + nu A.

One pass over the columns by time gives L at every T at once, so the makespan, the weak part of
the linear relaxation, is exact in the bound. At a fixed T the best prices are found by bisection
on mu; for each mu those of all gateways are exact, from the lower hulls of the users' costs over
units (the linear relaxation of a multiple-choice knapsack: Sinha and Zoltners 1979, section 2).

Shapes: N rows, B unit counts (0 first), S server unit counts (0 first), G gateways.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from optimizer.columns import BIG, Columns, Floats, Integers

_BISECTIONS = 40
_GOLDEN = (5.0**0.5 - 1.0) / 2.0
_GOLDEN_STEPS = 16
_PRECISION = 2e-6
"""A bisection ends when the bound can rise by no more than this share of it."""


@dataclass(frozen=True, slots=True, eq=False)
class Duals:
    """Prices by place in the table; the last of `uplink_G` belongs to the teacher and is 0."""

    uplink_G: Floats
    server: float
    accuracy: float

    @staticmethod
    def zero(table: Columns) -> "Duals":
        """Everything is free."""
        return Duals(np.zeros(len(table.capacity_G)), 0.0, 0.0)


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """L(T) for ascending `times`, all that a makespan can be, and what prices made it."""

    times: Floats
    bound: Floats
    duals: Duals


@dataclass(frozen=True, slots=True, eq=False)
class Cells:
    """The cheapest column of each row for each use of units, among those that end by a time.

    `cost_NBS` counts accuracy at its price; BIG where there is none.
    """

    table: Columns
    limit_s: float
    accuracy_price: float
    cost_NBS: Floats


@dataclass(frozen=True, slots=True, eq=False)
class Priced:
    """Prices at a fixed makespan, what each row takes at them within all capacities, and L(T)."""

    cells: Cells
    duals: Duals
    value: float
    uplink_level_N: Integers
    server_level_N: Integers


def fixed_value(table: Columns, duals: Duals) -> float:
    """The part of L that no column changes."""
    return float(
        nu_times(table, duals.accuracy)
        - duals.uplink_G @ table.capacity_G
        - duals.server * table.problem.server.units
    )


def nu_times(table: Columns, accuracy_price: float) -> float:
    """What the accuracy wanted is worth."""
    return accuracy_price * table.accuracy_wanted


def priced_columns(table: Columns, duals: Duals) -> Floats:
    """What each column really costs, [N, J]; padded ones stay near BIG."""
    ranked = table.ranked
    v_NJ = ranked.uplink_NJ * duals.uplink_G[table.gateway_N][:, None]
    v_NJ += ranked.cost_NJ
    if duals.server:
        v_NJ += duals.server * ranked.server_NJ
    if duals.accuracy:
        v_NJ -= duals.accuracy * ranked.accuracy_NJ
    return v_NJ


def bound_curve(table: Columns, duals: Duals) -> Curve:
    """The bound at every makespan, exactly."""
    ranked = table.ranked
    best_NJ = np.minimum.accumulate(priced_columns(table, duals), axis=1)
    fall_NJ = np.zeros_like(best_NJ)
    np.subtract(best_NJ[:, 1:], best_NJ[:, :-1], out=fall_NJ[:, 1:])
    total = np.cumsum(fall_NJ.ravel()[ranked.order])
    total += best_NJ[:, 0].sum() + fixed_value(table, duals)
    total += table.time_price * ranked.times
    first = int(np.searchsorted(ranked.times, ranked.fastest_s))
    return Curve(ranked.times[first:], total[first:], duals)


def price_at(
    table: Columns, limit_s: float, near: Duals | None = None, enough: float = np.inf
) -> Priced:
    """The prices that make the bound at a makespan highest.

    Args:
        table: What can be chosen.
        limit_s: The makespan; at least `table.ranked.fastest_s`.
        near: Prices that may be close, of the last round or of a makespan nearby.
        enough: A bound above this rules the makespan out: no need to seek higher ones. Beyond it
            prices of a makespan that no plan can have would grow without end.
    """
    if not table.is_floored:
        return _price_server(cells_at(table, limit_s, 0.0), near, enough)

    def at(price: float) -> Priced:
        return _price_server(cells_at(table, limit_s, price), near, enough)

    def spare(priced: Priced) -> float:
        chosen = chosen_columns(priced.cells, priced.uplink_level_N, priced.server_level_N)
        reached = table.accuracy_NR[np.arange(table.rows), chosen].sum()
        return float(reached - table.accuracy_wanted)

    start = near.accuracy if near is not None and near.accuracy > 0.0 else 1.0 / table.users
    return _climb(at, spare, start, (1e3 * table.penalty, enough))


def _climb(
    at: Callable[[float], Priced],
    spare: Callable[[Priced], float],
    start: float,
    most: tuple[float, float],
) -> Priced:
    """The price of the highest bound, by golden section, and a choice with something to spare.

    Choices rounded to whole columns may lack accuracy at every price, so their sign is no guide
    here; the bound is concave in the price. `most` is as in `_bisect`.
    """
    tried = {0.0: at(0.0)}
    if spare(tried[0.0]) >= 0.0:
        return tried[0.0]

    def value(price: float) -> float:
        if price not in tried:
            tried[price] = at(price)
        return tried[price].value

    low, middle, high = 0.0, start, 4.0 * start
    while value(high) > value(middle) and high < most[0] and value(high) <= most[1]:
        low, middle, high = middle, high, 4.0 * high
    for _ in range(_GOLDEN_STEPS):
        if max(each.value for each in tried.values()) > most[1]:
            break
        inner, outer = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        low, high = (low, outer) if value(inner) >= value(outer) else (inner, high)
    best = max(tried.values(), key=_value)
    reaching = [each for each in tried.values() if spare(each) >= 0.0]
    fits = max(reaching, key=_value, default=best)
    return Priced(fits.cells, best.duals, best.value, fits.uplink_level_N, fits.server_level_N)


def _bisect(
    at: Callable[[float], Priced],
    spare: Callable[[Priced], float],
    start: float,
    most: tuple[float, float],
) -> Priced:
    """The lowest price found at which something is spare, kept with the best bound found.

    `most` are the price and the bound beyond which it is not sought.
    """
    fits = at(0.0)
    left = spare(fits)
    if left >= 0.0:
        return fits
    low, high, best = 0.0, start, fits
    low_left = left
    while True:
        fits = at(high)
        left = spare(fits)
        best = max(best, fits, key=_value)
        if left >= 0.0 or high > most[0] or best.value > most[1]:
            break
        low, low_left, high = high, left, 4.0 * high
    for _ in range(_BISECTIONS):
        error = (high - low) * max(-low_left, left)
        if left < 0.0 or error <= _PRECISION * abs(best.value):
            break
        # By factors while the ends are of different size.
        middle = 0.5 * (low + high) if low >= 0.25 * high else 0.25 * high
        tried = at(middle)
        tried_left = spare(tried)
        best = max(best, tried, key=_value)
        if tried_left >= 0.0:
            high, fits, left = middle, tried, tried_left
        else:
            low, low_left = middle, tried_left
    return Priced(fits.cells, best.duals, best.value, fits.uplink_level_N, fits.server_level_N)


def _value(priced: Priced) -> float:
    return priced.value


def cells_at(table: Columns, limit_s: float, accuracy_price: float) -> Cells:
    """The cells of a makespan, at a price of accuracy."""
    layout, rows = table.layout, table.rows
    cost_NR = np.where(table.seconds_NR <= limit_s, table.cost_NR, BIG)
    if accuracy_price:
        cost_NR = cost_NR - accuracy_price * np.nan_to_num(table.accuracy_NR)
    students, modes, units = layout.device
    _, server, levels = layout.twin
    split = students * modes * units
    cost_NBS = np.full((rows, levels, server + 1), BIG)
    if split:
        device = cost_NR[:, :split].reshape(rows, students * modes, units)
        cost_NBS[:, 1:, 0] = device.min(axis=1)
    twin = cost_NR[:, split:-1].reshape(rows, students, server, levels)
    cost_NBS[:, :, 1:] = twin.min(axis=1).transpose(0, 2, 1)
    cost_NBS[:, 0, 0] = np.minimum(cost_NBS[:, 0, 0], cost_NR[:, -1])
    return Cells(table, limit_s, accuracy_price, cost_NBS)


def _price_server(cells: Cells, near: Duals | None, enough: float) -> Priced:
    def at(price: float) -> Priced:
        return _price_uplink(cells, price)

    return bisect_server(cells.table, at, near, enough)


def bisect_server(
    table: Columns, at: Callable[[float], Priced], near: Duals | None, enough: float = np.inf
) -> Priced:
    """The least price of a server unit at which what the rows take fits."""

    def spare(priced: Priced) -> float:
        used = table.layout.server_levels[priced.server_level_N].sum()
        return float(table.problem.server.units - used)

    start = near.server if near is not None and near.server > 0.0 else 0.1 / max(1, table.users)
    return _bisect(at, spare, start, (1e3 * table.penalty, enough))


def _price_uplink(cells: Cells, server_price: float) -> Priced:
    """The best prices of all gateways at one of the server, and a choice that fits them all."""
    table = cells.table
    layout = table.layout
    priced_NBS = cells.cost_NBS + server_price * layout.server_levels
    w_NB = priced_NBS.min(axis=2)
    hull = _hull(w_NB, layout.uplink_levels)
    uplink_G = _critical_prices(hull, layout.uplink_levels, table)
    price_N = uplink_G[table.gateway_N]
    held_NB = np.where(hull.threshold_NB > price_N[:, None], np.arange(w_NB.shape[1]), 0)
    level_N = held_NB.max(axis=1)
    rows = np.arange(table.rows)
    server_N = priced_NBS[rows, level_N].argmin(axis=1)
    duals = Duals(uplink_G, server_price, cells.accuracy_price)
    paid = w_NB[rows, level_N].sum() + price_N @ layout.uplink_levels[level_N]
    value = float(paid + table.time_price * cells.limit_s + fixed_value(table, duals))
    return Priced(cells, duals, value, level_N, server_N)


@dataclass(frozen=True, slots=True, eq=False)
class _Hull:
    """At which unit price each count is given up, and what units that sets free.

    `threshold_NB` is 0 for a count that no price makes best, infinite for the least count.
    """

    threshold_NB: Floats
    freed_NB: Floats
    free_use_N: Floats


def _hull(w_NB: Floats, levels: Integers) -> _Hull:
    """The lower convex hulls of the rows' costs over unit counts.

    slope[i, j] is the unit price at which counts i and j cost alike; count i is on the hull if
    it gives way to lesser ones only at prices above those that bring it in.
    """
    count = len(levels)
    units = levels.astype(float)
    step_BB = units[None, :] - units[:, None]
    np.fill_diagonal(step_BB, 1.0)
    slope_NBB = (w_NB[:, :, None] - w_NB[:, None, :]) / step_BB
    to_more = np.where(np.triu(np.ones((count, count)), 1) > 0, 0.0, -np.inf)
    to_less = np.where(np.tril(np.ones((count, count)), -1) > 0, 0.0, np.inf)
    enters_NB = (slope_NBB + to_more).max(axis=2)
    leaves_NB = (slope_NBB + to_less).min(axis=2)
    is_vertex_NB = (leaves_NB > enters_NB) & (leaves_NB > 0.0)
    held_NB = np.where(is_vertex_NB, units, 0.0)
    below_NB = np.zeros_like(held_NB)
    np.maximum.accumulate(held_NB[:, :-1], axis=1, out=below_NB[:, 1:])
    return _Hull(
        threshold_NB=np.where(is_vertex_NB, leaves_NB, 0.0),
        freed_NB=np.where(is_vertex_NB, units - below_NB, 0.0),
        free_use_N=held_NB.max(axis=1),
    )


def _critical_prices(hull: _Hull, levels: Integers, table: Columns) -> Floats:
    """For each gateway the least price at which what its users take fits."""
    capacity_G, gateway_N = table.capacity_G, table.gateway_N
    use_G = np.bincount(gateway_N, weights=hull.free_use_N, minlength=len(capacity_G))
    excess_G = use_G - capacity_G
    prices_G = np.zeros(len(capacity_G))
    if not (excess_G > 0.0).any():
        return prices_G
    threshold = hull.threshold_NB[:, 1:].ravel()
    freed = hull.freed_NB[:, 1:].ravel()
    gateway = np.repeat(gateway_N, len(levels) - 1)
    matters = (freed > 0.0) & (excess_G[gateway] > 0.0)
    threshold, freed, gateway = threshold[matters], freed[matters], gateway[matters]
    order = np.lexsort((threshold, gateway))
    threshold, gateway = threshold[order], gateway[order]
    total = np.cumsum(freed[order])
    begin = np.searchsorted(gateway, np.arange(len(capacity_G)))
    before_G = np.concatenate([[0.0], total])[begin]
    # The first place where what was freed at this gateway covers its excess.
    short = np.flatnonzero(excess_G > 0.0)
    place = np.searchsorted(total, before_G[short] + excess_G[short] - 1e-9)
    prices_G[short] = threshold[place]
    return prices_G


def chosen_columns(cells: Cells, level_N: Integers, server_level_N: Integers) -> Integers:
    """The column (its place in R) of each row that uses these units and costs least."""
    table = cells.table
    layout = table.layout
    is_cell_NR = layout.uplink_R == layout.uplink_levels[level_N][:, None]
    is_cell_NR &= layout.server_R == layout.server_levels[server_level_N][:, None]
    is_cell_NR &= table.seconds_NR <= cells.limit_s
    cost_NR = np.where(is_cell_NR, table.cost_NR, 2.0 * BIG)
    if cells.accuracy_price:
        cost_NR = cost_NR - cells.accuracy_price * np.nan_to_num(table.accuracy_NR)
    return np.asarray(cost_NR.argmin(axis=1), np.int64)
