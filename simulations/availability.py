"""Who is there in which round: devices that come and go by themselves, not by a failing link."""

from collections.abc import Sequence

import numpy as np

from optimizer.problem import Candidates, Selection, Selector
from simulations.tables import AvailabilityPlan
from simulations.world import draws_of


def available(
    plan: AvailabilityPlan, devices: Sequence[str], seed: int, number: int
) -> frozenset[str]:
    """The devices that are on in round `number`, counted from 1; one at least.

    Each is on with its own probability, whatever the others are. All are drawn anew every
    `every_rounds`, and again where nobody would be on (ReBaFL, arXiv:2303.06314).
    """
    if plan.kind == "always":
        return frozenset(devices)
    block = (number - 1) // plan.every_rounds
    chances = plan.chances(len(devices))
    rng = draws_of(seed, f"availability/{block}")
    while True:
        on = [name for name, q in zip(devices, chances, strict=True) if rng.random() < q]
        if on:
            return frozenset(on)


def select_available(
    select: Selector, plan: AvailabilityPlan, devices: Sequence[str], seed: int
) -> Selector:
    """Chooses as `select` does, among the devices that are on.

    `devices` is the whole fleet: who is on depends on it, the seed and the round alone, so two
    methods that are compared see the same devices.
    """
    if plan.kind == "always":
        return select

    def choose(
        candidates: Candidates, count: int, number: int, rng: np.random.Generator
    ) -> Selection:
        on = available(plan, devices, seed, number)
        there = [name for name in candidates.names if name in on]
        away = [name for name in candidates.names if name not in on]
        selection = select(Candidates(there, candidates.capability), count, number, rng)
        excluded = dict.fromkeys(away, "not available in this round")
        return Selection(selection.chosen, selection.excluded | excluded, selection.otherwise)

    return choose
