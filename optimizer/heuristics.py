# ruff: noqa: N803, N806 - capitals at the end of a name are the shape of its array
"""Planners that everybody knows, to be measured by: each narrows the choice, the allocator ends it.

All but `Everything` name one (student, place) pair for each user, or that the user sits out.

Shapes: N users, R columns, P pairs (device students, the same at the twin, sitting out).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from optimizer.allocation import Shortlist
from optimizer.columns import BIG, Booleans, Columns, Floats, Integers


def by_pair(table: Columns, values_NR: Floats) -> Floats:
    """The least of each user's columns for every pair, [N, P]."""
    begin_P = np.searchsorted(table.layout.pair_R, np.arange(table.layout.pairs))
    return np.asarray(np.minimum.reduceat(values_NR[: table.users], begin_P, axis=1), float)


def legal_pairs(table: Columns) -> Booleans:
    """Which pairs have a column that keeps the rules, [N, P]."""
    return np.asarray(by_pair(table, table.cost_NR) < BIG, bool)


def only(table: Columns, pair_N: Integers) -> Shortlist:
    """One pair for each user."""
    pairs_NP = np.zeros((table.users, table.layout.pairs), bool)
    pairs_NP[np.arange(table.users), pair_N] = True
    return Shortlist(pairs_NP)


@dataclass(frozen=True, slots=True)
class Everything:
    """Leave nothing out: the exact plan."""

    def choose(self, table: Columns) -> Shortlist:
        """All pairs of all users."""
        return Shortlist.everything(table)


@dataclass(frozen=True, slots=True)
class Random:
    """A legal pair for each user, each with the same chance."""

    rng: np.random.Generator

    def choose(self, table: Columns) -> Shortlist:
        """One pair for each user."""
        legal_NP = legal_pairs(table)
        legal_NP[:, -1] |= ~legal_NP.any(axis=1)
        draw_NP = np.where(legal_NP, self.rng.random(legal_NP.shape), -1.0)
        return only(table, draw_NP.argmax(axis=1))


@dataclass(frozen=True, slots=True)
class AllAt:
    """Everybody at one place with the largest, or the smallest, student that the rules allow."""

    place: Literal["device", "twin"]
    size: Literal["largest", "smallest"] = "largest"

    def choose(self, table: Columns) -> Shortlist:
        """One pair for each user; who has none there sits out."""
        pairs = table.layout.pairs
        students = table.layout.device[0]
        wanted = np.arange(students) + (students if self.place == "twin" else 0)
        bytes_M = [student.update_bytes for student in table.problem.students] or [0.0]
        by_size = wanted[np.argsort(bytes_M, kind="stable")]
        if self.size == "largest":
            by_size = by_size[::-1]
        order = np.concatenate([by_size, [pairs - 1]])
        legal_NX = legal_pairs(table)[:, order]
        legal_NX[:, -1] = True
        return only(table, order[legal_NX.argmax(axis=1)])


@dataclass(frozen=True, slots=True)
class Greedy:
    """One user after the other, the fastest first, takes what adds least to the objective.

    Of units it gets at most `shares` times its even share of what is left, or one: without that
    the first take everything.
    """

    shares: float = 2.0

    def choose(self, table: Columns) -> Shortlist:
        """One pair for each user: that of the column taken."""
        layout = table.layout
        left_G, left_server = table.capacity_G.copy(), float(table.problem.server.units)
        waiting_G = np.bincount(table.gateway_N[: table.users], minlength=len(left_G))
        seconds_NP = by_pair(table, table.seconds_NR)
        makespan_s = 0.0
        pair_N = np.full(table.users, layout.pairs - 1)
        for row in np.argsort(seconds_NP[:, :-1].min(axis=1), kind="stable").tolist():
            gateway = table.gateway_N[row]
            uplink = min(
                left_G[gateway], max(1.0, self.shares * left_G[gateway] / waiting_G[gateway])
            )
            server = min(left_server, max(1.0, self.shares * left_server / waiting_G.sum()))
            fits_R = (layout.uplink_R <= uplink) & (layout.server_R <= server)
            later_R = np.maximum(0.0, table.seconds_NR[row] - makespan_s)
            added_R = table.cost_NR[row] + table.time_price * later_R
            raw = int(np.where(fits_R, added_R, 2.0 * BIG).argmin())
            waiting_G[gateway] -= 1
            left_G[gateway] -= layout.uplink_R[raw]
            left_server -= float(layout.server_R[raw])
            makespan_s = max(makespan_s, float(table.seconds_NR[row, raw]))
            pair_N[row] = layout.pair_R[raw]
        return only(table, pair_N)


@dataclass(frozen=True, slots=True)
class FedCS:
    """As many devices as a deadline allows: FedCS (arXiv:1804.08333), Algorithm 3.

    Departs from the paper: every device has the largest student it may have, each gateway is a
    cell of its own, and the shares of the uplink are the allocator's; the paper's uploads, one
    after the other at the full rate, only decide who is in.
    """

    round_s: float

    def choose(self, table: Columns) -> Shortlist:
        """The largest student on the devices that are in; the others sit out."""
        pairs_NP = AllAt("device").choose(table).pairs_NP
        train_N, upload_N = _train_and_upload(table, pairs_NP)
        is_in_N = np.zeros(table.users, bool)
        for gateway in range(len(table.capacity_G) - 1):
            rows = np.flatnonzero(table.gateway_N[: table.users] == gateway)
            is_in_N[list(_fedcs(rows, train_N, upload_N, self.round_s))] = True
        return _without(pairs_NP, ~is_in_N)


@dataclass(frozen=True, slots=True)
class Oort:
    """The devices of highest utility: Oort (arXiv:2010.06081), Eq. 1, with its exploration.

    A device that takes longer than the preferred time, a quantile of the fleet's, loses utility by
    (preferred / own) ** penalty. Departs from the paper: a device's loss is not known here; that
    its accuracy lacks of the teacher's stands for it. Nobody is unexplored, so that exploration
    draws among those not exploited.
    """

    rng: np.random.Generator
    share: float = 0.75
    exploration: float = 0.1
    quantile: float = 0.8
    penalty: float = 2.0

    def choose(self, table: Columns) -> Shortlist:
        """The largest student on the devices that are drawn; the others sit out."""
        pairs_NP = AllAt("device").choose(table).pairs_NP
        train_N, upload_N = _train_and_upload(table, pairs_NP)
        seconds_N = train_N + upload_N
        can_N = np.isfinite(seconds_N)
        count = round(self.share * int(can_N.sum()))
        exploited = count - round(self.exploration * count)
        order = np.argsort(-self._utility(table, seconds_N), kind="stable")[: int(can_N.sum())]
        drawn = self.rng.permutation(order[exploited:])[: count - exploited]
        is_in_N = np.zeros(table.users, bool)
        is_in_N[order[:exploited]] = True
        is_in_N[drawn] = True
        return _without(pairs_NP, ~is_in_N)

    def _utility(self, table: Columns, seconds_N: Floats) -> Floats:
        users = table.problem.users
        lacking = [table.problem.teacher_accuracy - user.absent_accuracy for user in users]
        samples = np.array([user.samples for user in users], float)
        can_N = np.isfinite(seconds_N)
        preferred_s = float(np.quantile(seconds_N[can_N], self.quantile)) if can_N.any() else 1.0
        slow_N = np.where(can_N, preferred_s / np.maximum(seconds_N, 1e-9), 0.0)
        weight_N = np.minimum(1.0, slow_N) ** self.penalty
        return np.asarray(samples * np.maximum(0.0, lacking) * weight_N, float)


def _train_and_upload(table: Columns, pairs_NP: Booleans) -> tuple[Floats, Floats]:
    """Of each user's pair at the fastest mode: training, and upload with the most units."""
    layout = table.layout
    is_own_NR = pairs_NP[:, layout.pair_R] & (layout.pair_R < layout.pairs - 1)
    seconds_NR = np.where(is_own_NR, table.seconds_NR[: table.users], np.inf)
    fastest_N = seconds_NR.min(axis=1, initial=np.inf)
    upload_N = np.zeros(table.users)
    for row, user in enumerate(table.problem.users):
        pair = int(pairs_NP[row].argmax())
        if np.isfinite(fastest_N[row]) and max(user.goodput_bytes_per_s) > 0.0:
            sent = table.problem.students[pair].update_bytes
            upload_N[row] = min(fastest_N[row], sent / max(user.goodput_bytes_per_s))
    return np.where(np.isfinite(fastest_N), fastest_N - upload_N, np.inf), upload_N


def _fedcs(rows: Integers, train_N: Floats, upload_N: Floats, round_s: float) -> Iterable[int]:
    """Add the device that adds least time, as long as the round is not over by then."""
    left = [row for row in rows.tolist() if np.isfinite(train_N[row])]
    elapsed_s = 0.0
    while left:
        added_s = [upload_N[row] + max(0.0, train_N[row] - elapsed_s) for row in left]
        place = int(np.argmin(added_s))
        row = left.pop(place)
        if elapsed_s + added_s[place] < round_s:
            elapsed_s += added_s[place]
            yield row


def _without(pairs_NP: Booleans, gone_N: Booleans) -> Shortlist:
    pairs_NP = pairs_NP.copy()
    pairs_NP[gone_N] = False
    pairs_NP[gone_N, -1] = True
    return Shortlist(pairs_NP)
