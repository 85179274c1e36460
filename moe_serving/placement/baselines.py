"""Placements of others: in order, the paper's greedy and anti-correlation, and EPLB's copies.

Shapes: B batches, E experts, D devices.
"""

import numpy as np
from numpy.typing import NDArray

from moe_serving.placement.record import Loads, Placement, check_history, place

History = NDArray[np.generic]


def contiguous(experts: int, devices: int) -> Placement:
    """Deals experts out in order, as evenly as can be: what one does without a history."""
    return place(devices, [[expert * devices // experts] for expert in range(experts)])


def greedy(counts_BE: History, devices: int, slots: int) -> Placement:
    """Gives each expert, the busiest first, to the least busy device that has a free slot.

    "Towards MoE Deployment" (arXiv:2303.06182), section on load balancing, and the classic
    longest-processing-time rule (Graham, 1969) with slots. Only mean loads count.

    Args:
        counts_BE: Rows by batch and expert.
        devices: How many there are.
        slots: Experts that fit on one device.
    """
    mean_E = check_history(counts_BE, devices, slots).mean(axis=0)
    return _deal(mean_E, np.zeros((len(mean_E), len(mean_E))), devices, slots)


def anti_correlated(
    counts_BE: History, devices: int, slots: int, *, weight: float = 0.5, is_literal: bool = False
) -> Placement:
    """As `greedy`, but a device looks busier to an expert that is busy when its experts are.

    The paper's second algorithm: placing m, a device counts, for each of its experts a, the mean
    load of a plus `weight` times the correlation of a and m over the batches.

    Departs from the paper: there a correlation, near 1, is added to a mean load, near 1 / E, and
    drowns it. Here it is first multiplied by the geometric mean of both mean loads, unless
    `is_literal`.
    """
    load_BE = check_history(counts_BE, devices, slots)
    mean_E = load_BE.mean(axis=0)
    centred_BE = load_BE - mean_E
    length_E = np.sqrt((centred_BE**2).sum(axis=0))
    length_E[length_E == 0] = 1.0
    correlation_EE = (centred_BE.T @ centred_BE) / np.outer(length_E, length_E)
    if is_literal:
        # Loads here are in units of a device's mean; the paper's are shares of a batch.
        correlation_EE *= devices
    else:
        correlation_EE *= np.sqrt(np.outer(mean_E, mean_E))
    return _deal(mean_E, weight * correlation_EE, devices, slots)


def eplb(counts_BE: History, devices: int, slots: int) -> Placement:
    """Copies experts into all free slots, then packs: DeepSeek's EPLB without its node level.

    Each free slot goes to the expert with the highest mean load a copy. Then copies, the busiest
    first, go to the least busy device with a free slot that does not hold the expert yet.
    """
    mean_E = check_history(counts_BE, devices, slots).mean(axis=0)
    copies_E = np.ones(len(mean_E), dtype=np.int64)
    for _ in range(devices * slots - len(mean_E)):
        each_E = np.where(copies_E < devices, mean_E / copies_E, -1.0)
        copies_E[int(np.argmax(each_E))] += 1
    each_E = mean_E / copies_E
    holders: list[list[int]] = [[] for _ in mean_E]
    load_D, free_D = np.zeros(devices), np.full(devices, slots)
    for expert in np.argsort(-each_E, kind="stable").tolist():
        for _ in range(int(copies_E[expert])):
            is_barred_D = free_D == 0
            is_barred_D[holders[expert]] = True
            if is_barred_D.all():
                break  # the last slots are on its own devices; it has copies enough
            device = int(np.argmin(np.where(is_barred_D, np.inf, load_D)))
            holders[expert].append(device)
            load_D[device] += each_E[expert]
            free_D[device] -= 1
    return place(devices, holders)


def _deal(mean_E: Loads, affinity_EE: Loads, devices: int, slots: int) -> Placement:
    holders: list[list[int]] = [[] for _ in mean_E]
    load_D, free_D = np.zeros(devices), np.full(devices, slots)
    dislike_DE = np.zeros((devices, len(mean_E)))
    for expert in np.argsort(-mean_E, kind="stable").tolist():
        felt_D = np.where(free_D > 0, load_D + dislike_DE[:, expert], np.inf)
        device = int(np.argmin(felt_D))
        holders[expert].append(device)
        load_D[device] += mean_E[expert]
        dislike_DE[device] += affinity_EE[expert]
        free_D[device] -= 1
    return place(devices, holders)
