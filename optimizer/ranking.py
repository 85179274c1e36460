# ruff: noqa: N803, N806, N815 - capitals at the end of a name are the shape of its array
"""The columns that can be in a good plan, those of each row by time.

Shapes: N rows, R columns before any is dropped, J that stay, A columns of one cell.
"""

from dataclasses import dataclass

import numpy as np

from optimizer.layout import BIG, Booleans, Floats, Integers, Layout


@dataclass(frozen=True, slots=True, eq=False)
class Ranked:
    """Columns of each row by time, padded with seconds of infinity and costs of BIG.

    `raw_NJ` are their places in R. `order` runs over all real columns (places in the flat [N, J])
    by time, `times` are their seconds; no plan is faster than `fastest_s`.
    """

    raw_NJ: Integers
    seconds_NJ: Floats
    cost_NJ: Floats
    uplink_NJ: Floats
    server_NJ: Floats
    accuracy_NJ: Floats
    order: Integers
    times: Floats
    fastest_s: float


def rank(
    layout: Layout, seconds_NR: Floats, cost_NR: Floats, accuracy_NR: Floats, *, with_accuracy: bool
) -> Ranked:
    """Sort what is worth a look; with a price for accuracy, cost alone dominates nothing."""
    keep_NR = cost_NR < BIG
    if not with_accuracy:
        keep_NR &= ~_is_dominated(layout, seconds_NR, cost_NR)
    width = max(1, int(keep_NR.sum(axis=1).max(initial=1)))
    kept_NR = np.where(keep_NR, seconds_NR, np.inf)
    raw_NJ = np.argsort(kept_NR, axis=1, kind="stable")[:, :width]
    seconds_NJ = np.take_along_axis(kept_NR, raw_NJ, axis=1)
    is_real_NJ = np.isfinite(seconds_NJ)
    cost_NJ = np.where(is_real_NJ, np.take_along_axis(cost_NR, raw_NJ, axis=1), BIG)
    flat = seconds_NJ.ravel()
    order = np.argsort(flat, kind="stable")[: int(is_real_NJ.sum())]
    accuracy_NJ = np.take_along_axis(accuracy_NR, raw_NJ, axis=1)
    return Ranked(
        raw_NJ=raw_NJ,
        seconds_NJ=seconds_NJ,
        cost_NJ=cost_NJ,
        uplink_NJ=layout.uplink_R[raw_NJ].astype(float),
        server_NJ=layout.server_R[raw_NJ].astype(float),
        accuracy_NJ=np.where(is_real_NJ, accuracy_NJ, 0.0),
        order=order,
        times=flat[order],
        fastest_s=float(seconds_NJ[:, 0].max(initial=0.0)),
    )


def _is_dominated(layout: Layout, seconds_NR: Floats, cost_NR: Floats) -> Booleans:
    """Whether another column of the same row, place and units is no slower and no dearer.

    Of two alike the first stays.
    """
    students, modes, units = layout.device
    rows, split = len(cost_NR), students * modes * units
    dominated = np.zeros(cost_NR.shape, bool)
    seconds = seconds_NR[:, :split].reshape(rows, students * modes, units)
    cost = cost_NR[:, :split].reshape(rows, students * modes, units)
    worse = _worse(seconds, cost)
    dominated[:, :split] = worse.reshape(rows, split)
    _, server, levels = layout.twin
    end = split + students * server * levels
    seconds = seconds_NR[:, split:end].reshape(rows, students, server * levels)
    cost = cost_NR[:, split:end].reshape(rows, students, server * levels)
    dominated[:, split:end] = _worse(seconds, cost).reshape(rows, end - split)
    return dominated


def _worse(seconds: Floats, cost: Floats) -> Booleans:
    """[N, A, C]: whether entry a is dominated within its cell c by another of the A."""
    worse = np.zeros(seconds.shape, bool)
    for a in range(seconds.shape[1]):
        for other in range(seconds.shape[1]):
            if a == other:
                continue
            is_as_good = (seconds[:, other] <= seconds[:, a]) & (cost[:, other] <= cost[:, a])
            if other > a:
                is_as_good &= (seconds[:, other] < seconds[:, a]) | (cost[:, other] < cost[:, a])
            worse[:, a] |= is_as_good
    return worse
