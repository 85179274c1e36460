"""Our placement: swaps and copies, judged by what a step waits for, its busiest device.

A step lasts as long as its busiest device, so the figure of merit is the mean over batches of
the largest load over the mean load; balance in total is trivial and beside the point.

Shapes: B batches, E experts, D devices.
"""

import numpy as np
from numpy.typing import NDArray

from moe_serving.placement.baselines import History, greedy
from moe_serving.placement.record import Loads, Placement, check_history, place
from moe_serving.placement.split import Flow, flow, flow_by_copy

GAIN = 1e-5
"""Smaller gains than this are not pursued."""

ROUNDS = 8
"""Of swaps and new copies by turns; mostly it ends after two or three."""

ROUND_GAIN = 2e-3
"""A round that gains less was the last: rounds cost seconds, swaps milliseconds."""


SHORT = 32
"""Batches below which nothing can be set aside to judge by."""


def imbalance(counts_BE: History, placement: Placement) -> float:
    """The mean over batches of the busiest device's load over the mean; 1 is perfect."""
    load_BE = check_history(counts_BE, placement.devices, len(placement.holders))
    return _merit(load_BE, placement)


def search(counts_BE: History, devices: int, slots: int, *, copies: int | None = None) -> Placement:
    """Looks for the placement with the least mean of the per-batch maximum.

    Starts from `greedy`; swaps experts of two devices as long as that helps, if it also helps on
    batches set aside; then fills free
    slots one by one with the copy that helps most, given that its rows are divided by
    water-filling; then takes copies back and swaps again with the rest in place.

    Args:
        counts_BE: Rows by batch and expert: some fifty batches or more that are like those to
            come.
        devices: How many there are.
        slots: Experts that fit on one device.
        copies: At most so many in all; without, as many as there are free slots.

    Raises:
        ConfigError: The experts do not fit.
    """
    load_BE = check_history(counts_BE, devices, slots)
    experts = load_BE.shape[1]
    most = devices * slots - experts
    if copies is not None:
        most = min(most, copies)
    best = greedy(counts_BE, devices, slots)
    if _pays_to_swap(load_BE, devices, slots):
        best = _swap(load_BE, best)
    best = _copy(load_BE, best, slots, most)
    merit = _merit(load_BE, best)
    for _ in range(ROUNDS if best.copies else 0):
        tried = _recopy(load_BE, _swap(load_BE, best), slots, most)
        found = _merit(load_BE, tried)
        if found >= merit:
            break
        gained, best, merit = merit - found, tried, found
        if gained < ROUND_GAIN:
            break
    return best


def _pays_to_swap(load_BE: Loads, devices: int, slots: int) -> bool:
    """Whether swaps that suit every other batch suit those between.

    Where a batch has few rows, its busiest device is a matter of chance, and swaps would learn
    the chance. Short histories are taken at their word.
    """
    if len(load_BE) < SHORT:
        return True
    seen_BE, unseen_BE = load_BE[::2], load_BE[1::2]
    start = greedy(seen_BE, devices, slots)
    return _merit(unseen_BE, _swap(seen_BE, start)) < _merit(unseen_BE, start)


def _merit(load_BE: Loads, placement: Placement) -> float:
    return float(flow(load_BE, placement).max(axis=1).mean())


def _swap(load_BE: Loads, placement: Placement) -> Placement:
    """Swaps experts that have one holder, the best partner for each in turn, until none helps."""
    device_E = np.array([mine[0] if len(mine) == 1 else -1 for mine in placement.holders])
    movable = np.flatnonzero(device_E >= 0)
    load_BD = flow(load_BE, placement)
    merit = float(load_BD.max(axis=1).mean())
    has_gained = True
    while has_gained:
        has_gained = False
        for expert in movable.tolist():
            found, partner = _best_partner(load_BE, load_BD, device_E, expert)
            if found > merit - GAIN:
                continue
            device_E[[expert, partner]] = device_E[[partner, expert]]
            # With copies about, the water finds a new level: the gain is at least what was seen.
            placement = _moved(placement, device_E)
            load_BD = flow(load_BE, placement)
            merit = float(load_BD.max(axis=1).mean())
            has_gained = True
    return placement


def _best_partner(
    load_BE: Loads, load_BD: Loads, device_E: NDArray[np.int64], expert: int
) -> tuple[float, int]:
    """The least merit that swapping `expert` with any other gives, and that other."""
    home = int(device_E[expert])
    others = np.flatnonzero((device_E >= 0) & (device_E != home))
    if len(others) == 0:
        return np.inf, expert
    gain_BP = load_BE[:, others] - load_BE[:, expert, None]
    there_BP = load_BD[:, device_E[others]] - gain_BP
    here_BP = load_BD[:, home, None] + gain_BP
    rest_BP = _largest_without(load_BD, home)[:, device_E[others]]
    merit_P = np.maximum(np.maximum(there_BP, here_BP), rest_BP).mean(axis=0)
    best = int(np.argmin(merit_P))
    return float(merit_P[best]), int(others[best])


def _largest_without(load_BD: Loads, home: int) -> Loads:
    """The largest load of a batch on any device but `home` and d, for each d: [B, D]."""
    rest_BD = load_BD.copy()
    rest_BD[:, home] = -np.inf
    batch = np.arange(len(rest_BD))
    first_B = rest_BD.argmax(axis=1)
    largest_B = rest_BD[batch, first_B]
    rest_BD[batch, first_B] = -np.inf
    without_BD = np.repeat(largest_B[:, None], rest_BD.shape[1], axis=1)
    without_BD[batch, first_B] = rest_BD.max(axis=1)
    return without_BD


def _moved(placement: Placement, device_E: NDArray[np.int64]) -> Placement:
    holders = [
        mine if device < 0 else (device,)
        for mine, device in zip(placement.holders, device_E.tolist(), strict=True)
    ]
    return Placement(placement.devices, tuple(holders))


def _copy(load_BE: Loads, placement: Placement, slots: int, most: int) -> Placement:
    """Adds the copy that helps most, again and again, while there is room.

    Also where none helps on these batches: in others it will, and the slot is free.
    """
    while placement.copies < most:
        now = flow_by_copy(load_BE, placement)
        candidates = (
            (*_best_copy(now, placement, device), device) for device in _with_room(placement, slots)
        )
        found, expert, device = min(candidates)
        if found == np.inf:
            break
        placement = _with(placement, expert, device)
    return placement


def _best_copy(now: Flow, placement: Placement, device: int) -> tuple[float, int]:
    """The least merit that one more copy on a device gives, and its expert.

    Each copy that there is gives half of what it is ahead of the device; all others stay as they
    are divided, so what is seen is not more than what will be gained.
    """
    home_BP, there_B1 = now.load_BD[:, now.device_P], now.load_BD[:, device, None]
    moved_BP = np.clip((home_BP - there_B1) / 2, 0.0, now.share_BP)
    rest_BP = _largest_without(now.load_BD, device)[:, now.device_P]
    level_BP = np.maximum(home_BP - moved_BP, there_B1 + moved_BP)
    merit_P = np.maximum(level_BP, rest_BP).mean(axis=0)
    here = np.array(placement.held_by(device), dtype=np.int64)
    merit_P[np.isin(now.expert_P, here)] = np.inf
    best = int(np.argmin(merit_P))
    return float(merit_P[best]), int(now.expert_P[best])


def _with_room(placement: Placement, slots: int) -> list[int]:
    held_D = np.bincount(
        [d for mine in placement.holders for d in mine], minlength=placement.devices
    )
    devices: list[int] = np.flatnonzero(held_D < slots).tolist()
    return devices


def _recopy(load_BE: Loads, placement: Placement, slots: int, most: int) -> Placement:
    """Takes each copy back in turn, and lets the best one take its place."""
    copied = [(e, d) for e, mine in enumerate(placement.holders) if len(mine) > 1 for d in mine]
    for expert, device in copied:
        if len(placement.holders[expert]) == 1 or device not in placement.holders[expert]:
            continue
        tried = _copy(load_BE, _without(placement, expert, device), slots, most)
        if _merit(load_BE, tried) < _merit(load_BE, placement) - GAIN:
            placement = tried
    return placement


def _with(placement: Placement, expert: int, device: int) -> Placement:
    holders = list(placement.holders)
    holders[expert] = (*holders[expert], device)
    return place(placement.devices, holders)


def _without(placement: Placement, expert: int, device: int) -> Placement:
    holders = list(placement.holders)
    holders[expert] = tuple(d for d in holders[expert] if d != device)
    return place(placement.devices, holders)
