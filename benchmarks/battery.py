"""What a price on batteries is worth over days, beside the best plan of each round by itself."""

from dataclasses import replace

import numpy as np

from benchmarks.claims import Claim, Options, claim, main
from optimizer.allocation import Effort, allocate
from optimizer.battery import (
    SERVER_ENERGY_ONLY,
    BatteryFleet,
    Conditions,
    Harvest,
    unpriced_objective,
)
from optimizer.columns import tabulate
from optimizer.fleets import Setting

EFFORT = Effort(tolerance=1e-3, time_limit_s=5.0)
WEIGHT = 12.0
CONSTANT_PRICES_PER_J = (0.3, 1.0, 3.0)
DAY_ROUNDS = 48
GOALS = {"steady": 0.9, "day and night": 0.7}


def measure(options: Options) -> list[Claim]:
    """Mean objective of a round over days, what devices' joules cost left out: 50 users.

    Who sits out counts as knowing nothing; with `keeps` as what it knew (accuracy 0.45). Each
    policy meets the same fleets; the harvests, fadings and plans' shortlists are exact plans'.
    """
    fleets, rounds = (1, DAY_ROUNDS) if options.is_quick else (1, 3 * DAY_ROUNDS)
    claims: list[Claim] = []
    for name, day_rounds in (("steady", 0), ("day and night", DAY_ROUNDS)):
        harvest = Harvest(day_rounds=day_rounds)
        for sitting_out, absent in (("", 0.0), (", keeps", 0.45)):
            if options.is_quick and sitting_out:
                continue
            about = name + sitting_out
            options.tell(f"{about}: {fleets} fleets, {rounds} rounds")
            claims += _policies(about, harvest, absent, (fleets, rounds))
    return claims


def _policies(about: str, harvest: Harvest, absent: float, size: tuple[int, int]) -> list[Claim]:
    plain = Conditions(harvest=harvest)
    priced = Conditions(harvest=harvest, price_weight=WEIGHT)
    myopic, out = _live(plain, absent, size)
    constant = min(_live(plain, absent, size, price)[0] for price in CONSTANT_PRICES_PER_J)
    ours, out_priced = _live(priced, absent, size)
    peer, goal = "the best plan of each round", GOALS.get(about)
    return [
        claim(f"{about}: best constant price", constant, "", peer=peer, peer_value=myopic),
        claim(
            f"{about}: price of the missing charge",
            ours,
            "",
            peer=peer,
            peer_value=myopic,
            goal=None if goal is None else goal * myopic,
        ),
        claim(f"{about}: sit out", 100 * out_priced, "%", peer=peer, peer_value=100 * out),
    ]


def _live(
    conditions: Conditions, absent: float, size: tuple[int, int], price_per_j: float = 0.0
) -> tuple[float, float]:
    """The mean objective of a round, and the share of users that sat out."""
    fleets, rounds = size
    setting = Setting(users=50, weights=SERVER_ENERGY_ONLY, absent_accuracy=absent)
    objectives, out = [], []
    for seed in range(fleets):
        rng, world = np.random.default_rng(seed), BatteryFleet(conditions, setting)
        problem = world.begin(rng)
        for _ in range(rounds):
            asked = problem
            if price_per_j:
                users = (replace(user, battery_price_per_j=price_per_j) for user in problem.users)
                asked = replace(problem, users=tuple(users))
            plan = allocate(tabulate(asked), effort=EFFORT)
            objectives.append(unpriced_objective(problem, plan))
            out.append(np.mean([choice.place == "out" for choice in plan.choices]))
            following = world.after(plan, rng)
            if following is None:
                break
            problem = following
    return float(np.mean(objectives)), float(np.mean(out))


if __name__ == "__main__":
    main("battery", measure)
