"""Rows of a copied expert, divided among its holders batch by batch: water-filling.

Shapes: B batches, E experts, D devices, H holders of one expert, P pairs of expert and holder.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_serving.placement.record import Loads, Placement

Rows = NDArray[np.int64]

SWEEPS = 30
"""Of `flow`; it stops earlier when nothing moves any more, mostly after three or four."""


@dataclass(frozen=True, slots=True, eq=False)
class Flow:
    """Loads by batch and device, and what part of them each copy takes: `share_BP`."""

    load_BD: Loads
    expert_P: NDArray[np.int64]
    device_P: NDArray[np.int64]
    share_BP: Loads


def split(counts_E: Sequence[int], placement: Placement) -> Rows:
    """Divides a batch's rows so that the busiest device has as few as possible, [E, D].

    First each copied expert, the largest first, is poured onto its holders like water. Then rows
    are pushed from a busiest device, over copies it shares with others, towards the least busy
    device that can be reached. When no reachable device has at least two rows less, no division
    has a smaller maximum: all rows on the reachable devices have nowhere else to go.

    Whole rows only, and the same on every machine that asks.
    """
    experts = len(counts_E)
    rows_ED: Rows = np.zeros((experts, placement.devices), dtype=np.int64)
    load_D: Rows = np.zeros(placement.devices, dtype=np.int64)
    copied = []
    for expert, (count, holders) in enumerate(zip(counts_E, placement.holders, strict=True)):
        if len(holders) > 1 and count:
            copied.append(expert)
        else:
            rows_ED[expert, holders[0]] = count
            load_D[holders[0]] += count
    for expert in sorted(copied, key=lambda expert: (-counts_E[expert], expert)):
        holders_H = list(placement.holders[expert])
        poured_H = _pour(counts_E[expert], load_D[holders_H])
        rows_ED[expert, holders_H] = poured_H
        load_D[holders_H] += poured_H
    while copied and _push(rows_ED, load_D, copied, placement):
        pass
    return rows_ED


def split_evenly(counts_E: Sequence[int], placement: Placement) -> Rows:
    """Divides each expert's rows evenly among its holders, [E, D], as DeepSeek's EPLB does."""
    rows_ED: Rows = np.zeros((len(counts_E), placement.devices), dtype=np.int64)
    for expert, holders in enumerate(placement.holders):
        whole, rest = divmod(int(counts_E[expert]), len(holders))
        for place, device in enumerate(holders):
            rows_ED[expert, device] = whole + (place < rest)
    return rows_ED


def flow(load_BE: Loads, placement: Placement) -> Loads:
    """Gives each device's load in each batch, [B, D], if rows could be divided at will."""
    return flow_by_copy(load_BE, placement).load_BD


def flow_by_copy(load_BE: Loads, placement: Placement) -> Flow:
    """Divides loads at will: each copied expert in turn is water-filled given all others.

    That is coordinate descent on the sum of squared loads, whose optimum also has the smallest
    maximum.
    """
    pairs = [(e, d) for e, holders in enumerate(placement.holders) for d in holders]
    expert_P, device_P = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    held_E = np.array([len(holders) for holders in placement.holders])
    share_BP = load_BE[:, expert_P] / held_E[expert_P]
    load_BD = np.zeros((len(load_BE), placement.devices))
    np.add.at(load_BD.T, device_P, share_BP.T)
    copied = [np.flatnonzero(expert_P == expert) for expert in np.flatnonzero(held_E > 1)]
    for _ in range(SWEEPS):
        moved = 0.0
        for places_H in copied:
            holders_H, share_BH = device_P[places_H], share_BP[:, places_H]
            base_BH = load_BD[:, holders_H] - share_BH
            filled_BH = fill(share_BH.sum(axis=1), base_BH)
            moved = max(moved, float(np.abs(filled_BH - share_BH).max()))
            load_BD[:, holders_H] = base_BH + filled_BH
            share_BP[:, places_H] = filled_BH
        if moved < 1e-4:
            break
    return Flow(load_BD, expert_P, device_P, share_BP)


def fill(amount_B: Loads, base_BH: Loads) -> Loads:
    """Pours an amount over bases so that all that get any end level, [B, H]."""
    holders = base_BH.shape[1]
    rising_BH = np.sort(base_BH, axis=1)
    count_H = np.arange(1, holders + 1)
    level_BH = (amount_B[:, None] + np.cumsum(rising_BH, axis=1)) / count_H
    # The level with the h lowest bases under water is the right one if base h + 1 stands above.
    above_BH = np.concatenate([rising_BH[:, 1:], np.full((len(base_BH), 1), np.inf)], axis=1)
    right_B1 = np.argmax(level_BH <= above_BH, axis=1)[:, None]
    poured_BH: Loads = np.maximum(np.take_along_axis(level_BH, right_B1, axis=1) - base_BH, 0.0)
    return poured_BH


def _pour(amount: int, base_H: Rows) -> Rows:
    """As `fill`, in whole rows; the ones left over go to the lowest."""
    exact_H = fill(np.array([float(amount)]), base_H[None, :].astype(np.float64))[0]
    poured_H: Rows = np.floor(exact_H).astype(np.int64)
    left = amount - int(poured_H.sum())
    order = np.argsort(base_H + poured_H, kind="stable")
    for turn in range(left):
        poured_H[order[turn % len(order)]] += 1
    return poured_H


def _push(rows_ED: Rows, load_D: Rows, copied: Sequence[int], placement: Placement) -> bool:
    """Moves rows from a busiest device to the least busy one it reaches; False if there is none."""
    start = int(np.argmax(load_D))
    came_by: dict[int, tuple[int, int]] = {}
    reached = [start]
    for device in reached:
        for expert in copied:
            if rows_ED[expert, device] == 0:
                continue
            for other in placement.holders[expert]:
                if other != start and other not in came_by:
                    came_by[other] = (device, expert)
                    reached.append(other)
    target = min(reached, key=lambda device: (load_D[device], device))
    surplus = int(load_D[start] - load_D[target])
    if surplus < 2:
        return False
    path = []
    device = target
    while device != start:
        before, expert = came_by[device]
        path.append((before, expert, device))
        device = before
    amount = min(surplus // 2, *(int(rows_ED[expert, before]) for before, expert, _ in path))
    for before, expert, after in path:
        rows_ED[expert, before] -= amount
        rows_ED[expert, after] += amount
    load_D[start] -= amount
    load_D[target] += amount
    return True
