# ruff: noqa: N806, N815 - capitals at the end of a name are the shape of its array
"""From a problem to a plan with a proof: sweep, fix, and let the solver finish.

`plan` is for people, `allocate` for planners that have narrowed the choice to a shortlist.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from federation.errors import Infeasible, PlanError
from optimizer.closing import close
from optimizer.columns import BIG, Booleans, Columns, tabulate
from optimizer.diagnosis import diagnose
from optimizer.plan import Plan, Prices, WhyStopped
from optimizer.problem import Problem
from optimizer.reading import duals_of, plan_of
from optimizer.sweep import Selected, relative_gap, sweep
from optimizer.validation import check

_PROVEN = 1e-7
"""A relative gap this small is what the solver's own tolerances leave of a proof."""


@dataclass(frozen=True, slots=True, eq=False)
class Shortlist:
    """Which (student, place) pairs stay for each user: [N, P], as `Layout.pair_R` numbers them.

    Sitting out always stays.
    """

    pairs_NP: Booleans

    @staticmethod
    def everything(table: Columns) -> "Shortlist":
        """No pair is left out."""
        return Shortlist(np.ones((table.users, table.layout.pairs), bool))


class Planner(Protocol):
    """Whatever narrows the choice; the same allocator finishes every planner's plan."""

    def choose(self, table: Columns) -> Shortlist:
        """The pairs that stay."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How hard to try: the relative gap that is enough, the seconds, whether to ask the solver.

    `clock` gives seconds from any beginning.
    """

    tolerance: float = 1e-3
    time_limit_s: float = 5.0
    with_solver: bool = True
    clock: Callable[[], float] = time.monotonic


def plan(
    problem: Problem,
    tolerance: float = 1e-3,
    time_limit_s: float = 5.0,
    *,
    near: Prices | None = None,
) -> Plan:
    """The best plan of a round, or one that is proven to be close to it.

    Args:
        problem: The fleet and what is offered to it.
        tolerance: The relative gap that is enough; 0 asks for the best.
        time_limit_s: When to stop with the best plan known. It is checked between steps, so
            that a first plan is always finished.
        near: The prices of the last round: they save a turn where little has changed.

    Raises:
        InvalidProblem: naming every fault of the problem.
        Infeasible: no plan keeps every rule.
    """
    check(problem)
    effort = Effort(tolerance, time_limit_s)
    return allocate(tabulate(problem), effort=effort, near=near)


def allocate(
    table: Columns,
    shortlist: Shortlist | None = None,
    *,
    effort: Effort | None = None,
    near: Prices | None = None,
) -> Plan:
    """The best plan among the pairs of a shortlist; bound and gap are those of the shortlist.

    Raises:
        Infeasible: no plan keeps every rule; the message says which and what would do.
    """
    effort = effort or Effort()
    begun = effort.clock()

    def is_over() -> bool:
        return effort.clock() - begun >= effort.time_limit_s

    if shortlist is not None:
        table = table.restrict(shortlist.pairs_NP)
    if not _has_teacher(table) or not _can_reach_floor(table):
        raise _infeasible(table, "optimal")
    state = sweep(table, effort.tolerance, is_over, duals_of(table, near))
    lower, why = state.lower, _why(state.gap, effort.tolerance)
    if why is None and is_over():
        why = "time limit"
    if why is None and not effort.with_solver:
        why = "no progress"
    if why is None:
        left_s = effort.time_limit_s - (effort.clock() - begun)
        lower, has_solver = close(state, effort.tolerance, left_s, effort.clock)
        gap = relative_gap(state.best.objective, lower)
        why = _why(gap, effort.tolerance) or ("time limit" if has_solver else "no solver")
    if not _keeps_all_rules(table, state.best):
        raise _infeasible(table, why)
    return plan_of(table, state, lower, why)


def _why(gap: float, tolerance: float) -> WhyStopped | None:
    if gap <= _PROVEN:
        return "optimal"
    return "tolerance" if gap <= tolerance else None


def _has_teacher(table: Columns) -> bool:
    if table.seconds_offset > table.problem.deadline_s or not np.isfinite(table.seconds_offset):
        return False
    return table.rows == table.users or bool(np.isfinite(table.seconds_NR[-1]).any())


def _can_reach_floor(table: Columns) -> bool:
    if not table.is_floored:
        return True
    allowed_NR = table.cost_NR[: table.users] < BIG
    highest_N = np.where(allowed_NR, table.accuracy_NR[: table.users], 0.0).max(axis=1)
    return bool(highest_N.sum() >= table.accuracy_wanted)


def _keeps_all_rules(table: Columns, best: Selected) -> bool:
    if not np.isfinite(best.objective):
        return False
    out = len(table.layout.student_R) - 1
    return not any(
        user.is_required and raw == out
        for user, raw in zip(table.problem.users, best.raw_N.tolist(), strict=False)
    )


def _infeasible(table: Columns, why: WhyStopped | None) -> PlanError:
    conflicts = diagnose(table.problem).conflicts
    if conflicts or why == "optimal":
        return Infeasible("; ".join(conflicts or ["the shortlist leaves no plan that keeps all"]))
    return PlanError(
        "no plan that keeps every rule was found in time; none is ruled out: allow more time"
    )
