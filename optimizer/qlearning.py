# ruff: noqa: N803, N806, N815 - capitals at the end of a name are the shape of its array
"""One Q that all users share: what each (student, place) pair will cost, before anybody plans.

Costs are shaped by prices: once a plan is allocated, its duals say what *any* pair would have
cost any user (`optimizer.observation.costs_at`), so every round teaches all pairs of all users.
Nothing here ever sees an optimum. Choosing in a round is a contextual bandit: there is no
discount, for what is chosen now changes nothing of the fleet that comes next.

Shapes: N users, P pairs (sitting out last), F features of a pair, S cells of a table's states.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from federation.errors import ConfigError
from optimizer.allocation import Shortlist
from optimizer.columns import Booleans, Columns, Floats, Integers
from optimizer.observation import CEILING, LADDER, Observation, observe

_CENTRE_C = np.array([0.7, -0.5, 0.3, 0.8, 0.0, 0.0])
"""Surroundings are counted from about here, so that the linear features are little correlated."""

_RIDGE = 1e-3
_MARGINS = np.array([0.02, 0.08])
_UPLINKS = np.log([1.5, 3.0])
_SERVERS = np.log([0.4, 0.8])


class Values(Protocol):
    """A Q-function: what pairs will cost. Learning gives a new one."""

    def costs(self, seen: Observation) -> Floats:
        """The cost of each pair of each user, [N, P], in spreads; less is better."""

    def learned(self, seen: Observation, costs_NP: Floats, weights_NP: Floats) -> "Values":
        """The Q-function that has seen these costs, each with its weight."""


@dataclass(frozen=True, slots=True, eq=False)
class FairPrices:
    """Costs at the middle rung of the ladder: nothing is learned. A bar for those that do."""

    def costs(self, seen: Observation) -> Floats:
        """The costs at fair prices."""
        return seen.costs_NPL[:, :, 0]

    def learned(self, _seen: Observation, _costs_NP: Floats, _weights_NP: Floats) -> "FairPrices":
        """The same again."""
        return self


@dataclass(frozen=True, slots=True, eq=False)
class LinearValues:
    """Costs as a linear function, by recursive least squares with forgetting: one a pair.

    A pair's features are its costs on the ladder, and 1, each by itself and times each figure of
    the surroundings. `gram_PFF` and `moment_PF` are the normal equations.
    """

    gram_PFF: Floats
    moment_PF: Floats
    weights_PF: Floats
    forgetting: float = 0.998

    @staticmethod
    def blank(pairs: int, forgetting: float = 0.998) -> "LinearValues":
        """Begins as `FairPrices`, with little trust in it."""
        features = (len(LADDER) + 1) * (len(_CENTRE_C) + 1)
        gram_PFF = np.tile(1e-2 * np.eye(features), (pairs, 1, 1))
        weights_PF = np.zeros((pairs, features))
        weights_PF[:, 0] = 1.0
        return LinearValues(gram_PFF, 1e-2 * weights_PF, weights_PF, forgetting)

    def costs(self, seen: Observation) -> Floats:
        """The linear function's costs."""
        _check_pairs(len(self.weights_PF), seen)
        return np.asarray(np.einsum("npf,pf->np", _design(seen), self.weights_PF), float)

    def learned(self, seen: Observation, costs_NP: Floats, weights_NP: Floats) -> "LinearValues":
        """One step of least squares with all users at once."""
        _check_pairs(len(self.weights_PF), seen)
        # Pairs in front, so that the sums are products of matrices.
        x_PNF = _design(seen).transpose(1, 0, 2)
        weighted_PNF = x_PNF * weights_NP.T[:, :, None]
        gram_PFF = self.forgetting * self.gram_PFF + weighted_PNF.transpose(0, 2, 1) @ x_PNF
        moment_PF = self.forgetting * self.moment_PF
        moment_PF += (weighted_PNF * costs_NP.T[:, :, None]).sum(axis=1)
        steady_PFF = gram_PFF + _RIDGE * np.eye(gram_PFF.shape[1])
        solved_PF1 = np.linalg.solve(steady_PFF, moment_PF[:, :, None])
        weights_PF = np.asarray(solved_PF1[:, :, 0], float)
        return LinearValues(gram_PFF, moment_PF, weights_PF, self.forgetting)


@dataclass(frozen=True, slots=True, eq=False)
class TableValues:
    """Costs by state, in a table: means of what was seen, recent costs more than old ones.

    A state is a user's best and second-best pair at fair prices, how close they are (3 bins), and
    how much uplink and server there is for each user (3 bins each). Pairs never seen in a state
    answer with their costs at fair prices. `seen_SP` is the sum of weights.
    """

    costs_SP: Floats
    seen_SP: Floats
    slowest_rate: float = 0.02

    @staticmethod
    def blank(pairs: int, slowest_rate: float = 0.02) -> "TableValues":
        """Nothing has been seen yet."""
        cells = pairs * pairs * 27
        return TableValues(np.zeros((cells, pairs)), np.zeros((cells, pairs)), slowest_rate)

    def costs(self, seen: Observation) -> Floats:
        """The table's costs."""
        _check_pairs(self.costs_SP.shape[1], seen)
        cell_N = _cells(seen)
        return np.where(self.seen_SP[cell_N] > 0, self.costs_SP[cell_N], seen.costs_NPL[:, :, 0])

    def learned(self, seen: Observation, costs_NP: Floats, weights_NP: Floats) -> "TableValues":
        """The table moved towards the mean of what each cell has now seen."""
        _check_pairs(self.costs_SP.shape[1], seen)
        cell_N = _cells(seen)
        weight_SP, total_SP = np.zeros_like(self.costs_SP), np.zeros_like(self.costs_SP)
        np.add.at(weight_SP, cell_N, weights_NP)
        np.add.at(total_SP, cell_N, weights_NP * costs_NP)
        seen_SP = self.seen_SP + weight_SP
        touched_SP = weight_SP > 0
        mean_SP = np.divide(total_SP, weight_SP, out=np.zeros_like(total_SP), where=touched_SP)
        share_SP = np.divide(weight_SP, seen_SP, out=np.zeros_like(total_SP), where=touched_SP)
        rate_SP = np.maximum(share_SP, self.slowest_rate) * touched_SP
        moved_SP = self.costs_SP + rate_SP * (mean_SP - self.costs_SP)
        return TableValues(moved_SP, seen_SP, self.slowest_rate)


def _design(seen: Observation) -> Floats:
    users, pairs, _ = seen.costs_NPL.shape
    costs_NPL1 = np.concatenate([seen.costs_NPL, np.ones((users, pairs, 1))], axis=2)
    around_NC1 = np.concatenate([np.ones((users, 1)), seen.around_NC - _CENTRE_C], axis=1)
    # The first feature is the cost at fair prices.
    x_NPCL = costs_NPL1[:, :, None, :] * around_NC1[:, None, :, None]
    return np.asarray(x_NPCL.reshape(users, pairs, -1), float)


def _cells(seen: Observation) -> Integers:
    costs_NP = np.where(seen.legal_NP, seen.costs_NPL[:, :, 0], CEILING + 1.0)
    users, pairs = costs_NP.shape
    order_NP = np.argsort(costs_NP, axis=1)
    first_N, second_N = order_NP[:, 0], order_NP[:, min(1, pairs - 1)]
    of_all = np.arange(users)
    margin_N = costs_NP[of_all, second_N] - costs_NP[of_all, first_N]
    cell_N = first_N * pairs + second_N
    for edges, value_N in (
        (_MARGINS, margin_N),
        (_UPLINKS, seen.around_NC[:, 0]),
        (_SERVERS, seen.around_NC[:, 1]),
    ):
        cell_N = 3 * cell_N + np.digitize(value_N, edges)
    return np.asarray(cell_N, np.int64)


def _check_pairs(pairs: int, seen: Observation) -> None:
    if seen.legal_NP.shape[1] != pairs:
        raise ConfigError(
            f"this Q-function knows {pairs} (student, place) pairs, the problem has"
            f" {seen.legal_NP.shape[1]}; train one for this catalogue of students"
        )


@dataclass(frozen=True, slots=True)
class QPlanner:
    """Keeps the `shortlist` pairs of each user that Q finds cheapest; the allocator does the rest.

    With `keeps_safe` each user's cheapest-to-serve legal pair stays whatever Q says, and the
    shortlist is of the others: the smallest student on the device, and where none is legal
    there, the least work at the server. Otherwise one wrong place in a crowded server costs a
    user its part in the round.
    """

    values: Values
    shortlist: int = 2
    keeps_safe: bool = True

    def __post_init__(self) -> None:
        if self.shortlist < 1:
            raise ConfigError(f"a shortlist of {self.shortlist} pairs; expected at least 1")

    def choose(self, table: Columns) -> Shortlist:
        """The pairs that stay."""
        seen, _ = observe(table)
        costs_NP = self.values.costs(seen)
        if not self.keeps_safe:
            return Shortlist(cheapest_pairs(costs_NP, seen.legal_NP, self.shortlist))
        safe_NP = safe_pairs(table, seen.legal_NP)
        return Shortlist(
            safe_NP | cheapest_pairs(costs_NP, seen.legal_NP & ~safe_NP, self.shortlist)
        )


def cheapest_pairs(costs_NP: Floats, legal_NP: Booleans, count: int) -> Booleans:
    """The `count` cheapest legal pairs of each user, of equal ones the first."""
    priced_NP = np.where(legal_NP, costs_NP, np.inf)
    kept = np.argsort(priced_NP, axis=1, kind="stable")[:, :count]
    keep_NP = np.zeros(legal_NP.shape, bool)
    np.put_along_axis(keep_NP, kept, True, axis=1)
    return keep_NP & legal_NP


def safe_pairs(table: Columns, legal_NP: Booleans) -> Booleans:
    """Each user's cheapest-to-serve legal pair; nothing for users who can only sit out."""
    problem, students = table.problem, table.layout.device[0]
    if not problem.students:
        return np.zeros_like(legal_NP)
    sizes = [student.update_bytes for student in problem.students]
    work = [problem.server.seconds_per_sample.get(s.name, np.inf) for s in problem.students]
    order = np.concatenate([np.argsort(sizes), students + np.argsort(work)])
    legal_NO = legal_NP[:, order]
    safe_NP = np.zeros_like(legal_NP)
    of_all = np.arange(len(legal_NP))
    safe_NP[of_all, order[legal_NO.argmax(axis=1)]] = legal_NO.any(axis=1)
    return safe_NP
