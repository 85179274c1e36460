"""The last gap: better plans by whole units, then the solver on one stretch of makespans a time.

What the sweep leaves open is a window of makespans, mostly in a few stretches. Within one the
makespan hardly matters, so its columns are few and the solver quick; a plan found in one
rules out others.
"""

from collections.abc import Callable

import numpy as np

from optimizer import core as exact
from optimizer.columns import Integers
from optimizer.knapsack import whole_units_at
from optimizer.sweep import Sweep, core_of, round_up

_PLANS = 4
_JUMP = 4e-4
_LONGEST = 400


def close(
    state: Sweep, tolerance: float, time_limit_s: float, clock: Callable[[], float]
) -> tuple[float, bool]:
    """Improve `state.best` and give the bound that is proven, and whether the solver did work.

    Args:
        state: What the sweep found.
        tolerance: The relative gap that is small enough.
        time_limit_s: When to stop, from now.
        clock: Seconds from any beginning.
    """
    end_s = clock() + time_limit_s
    _improve(state, lambda: clock() >= end_s)
    open_ = _stretches(state)
    proven = np.inf
    while open_:
        open_.sort(key=lambda places: float(state.bound[places].min()))
        lower = min(proven, float(state.bound[open_[0]].min()))
        if lower >= state.best.objective - tolerance * abs(state.best.objective):
            return min(lower, state.best.objective), True
        if clock() >= end_s:
            return lower, True
        stretch = open_.pop(0)
        limits = exact.Limits(end_s - clock(), tolerance)
        known = state.best.objective if np.isfinite(state.best.objective) else None
        answer = exact.solve(state.table, core_of(state, stretch), limits, at_most=known)
        if answer is None:
            return lower, False
        state.offer(answer.selected)
        proven = min(proven, max(answer.bound, float(state.bound[stretch].min())))
    return min(proven, state.best.objective), True


def _improve(state: Sweep, is_over: Callable[[], bool]) -> None:
    """Plans of whole units at the makespans where the best plan may be."""
    for places in _stretches(state)[:_PLANS]:
        place = int(places[state.bound[places].argmin()])
        if state.bound[place] >= state.best.objective or is_over():
            return
        state.price(place)
        better = whole_units_at(state.table, float(state.times[place]), state.priced[place].duals)
        if better is None:
            return
        state.offer(round_up(better))
        state.bound[place] = max(state.bound[place], better.value)


def _stretches(state: Sweep) -> list[Integers]:
    """The makespans that are still open, cut where they jump, the lowest bound first."""
    window = np.flatnonzero(state.bound < state.best.objective)
    if not len(window):
        return []
    times = state.times[window]
    jumps = np.flatnonzero(np.diff(times) > _JUMP * times[:-1]) + 1
    parts = [
        part
        for places in np.split(window, jumps)
        for part in np.array_split(places, -(-len(places) // _LONGEST))
    ]
    return sorted(parts, key=lambda places: float(state.bound[places].min()))
