"""How far learned plans are from the proven bound, beside planners that everybody knows."""

import time
from dataclasses import dataclass

import numpy as np

from benchmarks.claims import Claim, Options, claim, main
from optimizer.allocation import Effort, Planner, allocate
from optimizer.columns import Columns, tabulate
from optimizer.environment import DrawnFleets, FederatedRound
from optimizer.fleets import Setting, draw
from optimizer.heuristics import AllAt, FedCS, Greedy, Oort, Random
from optimizer.qlearning import FairPrices, QPlanner, TableValues, Values
from optimizer.qlearning_training import Training, train

FINISH = Effort(tolerance=1e-3, time_limit_s=20.0)
PROVE = Effort(tolerance=1e-4, time_limit_s=60.0)
TRAINING_GOAL_S = 120.0
MEAN_GOALS = {("linear Q, k = 1", 100): 5.0, ("linear Q, k = 1", 1000): 5.0,
              ("linear Q, k = 2", 100): 0.6, ("linear Q, k = 2", 1000): 0.6}  # fmt: skip
WORST_GOALS = {("linear Q, k = 2", 10): 3.0}


@dataclass(frozen=True, slots=True)
class Fleet:
    """Fleets of one kind: how many of them, and with how much for each user."""

    name: str
    users: int
    count: int
    setting: Setting


def measure(options: Options) -> list[Claim]:
    """Gap of each planner's plan to the bound, in percent: mean and worst over fleets.

    The same allocator ends all plans. Q is trained here, on fleets of 10 to 60 users with half to
    twice the uplink and server of those it is then tried on, and never shown an optimum.
    """
    claims: list[Claim] = []
    values = _trained(options, claims)
    for fleet in _fleets(options.is_quick):
        options.tell(f"{fleet.count} fleets: {fleet.name}")
        claims += _compare(fleet, _planners(values))
    return claims


def _trained(options: Options, claims: list[Claim]) -> dict[str, Values]:
    rounds = 100 if options.is_quick else 400
    values: dict[str, Values] = {"fair prices": FairPrices()}
    blanks = {
        "linear Q": (None, True),
        "linear Q, chosen only": (None, False),
        "table Q": (TableValues.blank(9), True),
    }
    for name, (blank, is_counterfactual) in blanks.items():
        options.tell(f"{name}: {rounds} rounds")
        settings = Training(rounds=rounds, is_counterfactual=is_counterfactual)
        environment = FederatedRound(DrawnFleets(users=(10, 60)), most_users=60)
        began = time.process_time()
        values[name] = train(environment, np.random.default_rng(0), settings, blank)
        cpu_s = time.process_time() - began
        claims.append(claim(f"{name}: training", cpu_s, "CPU s", goal=TRAINING_GOAL_S))
    return values


def _fleets(is_quick: bool) -> list[Fleet]:
    counts = {10: 6, 100: 2} if is_quick else {10: 40, 50: 8, 100: 6, 1000: 2}
    fleets = [Fleet(f"{n} users", n, count, Setting(users=n)) for n, count in counts.items()]
    if not is_quick:
        tight = Setting(users=100, blocks_per_user=1.0, server_units_per_user=0.3)
        ample = Setting(users=100, blocks_per_user=4.0, server_units_per_user=1.2)
        fleets.append(Fleet("100 users, half of everything", 100, 4, tight))
        fleets.append(Fleet("100 users, twice of everything", 100, 4, ample))
    return fleets


def _planners(values: dict[str, Values]) -> dict[str, Planner]:
    planners: dict[str, Planner] = {
        "random": Random(np.random.default_rng(0)),
        "all on devices": AllAt("device"),
        "all on devices, smallest": AllAt("device", "smallest"),
        "all at twins": AllAt("twin"),
        "FedCS": FedCS(round_s=30.0),
        "Oort": Oort(np.random.default_rng(0)),
        "greedy": Greedy(),
    }
    for name, learned in values.items():
        for k in (1, 2, 3):
            planners[f"{name}, k = {k}"] = QPlanner(learned, k)
    planners["linear Q, k = 1, not safe"] = QPlanner(values["linear Q"], 1, keeps_safe=False)
    return planners


def _compare(fleet: Fleet, planners: dict[str, Planner]) -> list[Claim]:
    rng = np.random.default_rng(10_000 + fleet.users)
    gaps: dict[str, list[float]] = {name: [] for name in planners}
    cpu_s: dict[str, list[float]] = {name: [] for name in [*planners, "proof"]}
    for _ in range(fleet.count):
        table = tabulate(draw(fleet.setting, rng))
        began = time.process_time()
        bound = allocate(table, effort=PROVE).bound
        cpu_s["proof"].append(time.process_time() - began)
        for name, planner in planners.items():
            began = time.process_time()
            objective = _objective(table, planner)
            cpu_s[name].append(time.process_time() - began)
            gaps[name].append(100.0 * max(0.0, objective / bound - 1.0))
    proof_ms = 1e3 * float(np.mean(cpu_s["proof"]))
    claims = []
    for name, found in gaps.items():
        about = f"{fleet.name}, {name}"
        is_plain = fleet.name == f"{fleet.users} users"
        key = (name, fleet.users if is_plain else 0)
        mean, worst = float(np.mean(found)), float(np.max(found))
        claims.append(claim(f"{about}: gap, mean", mean, "%", goal=MEAN_GOALS.get(key)))
        claims.append(claim(f"{about}: gap, worst", worst, "%", goal=WORST_GOALS.get(key)))
        if "Q" in name:
            ms = 1e3 * float(np.mean(cpu_s[name]))
            peer = "the exact plan, within 0.01 %"
            claims.append(claim(f"{about}: CPU", ms, "ms", peer=peer, peer_value=proof_ms))
    return claims


def _objective(table: Columns, planner: Planner) -> float:
    return allocate(table, planner.choose(table), effort=FINISH).objective


if __name__ == "__main__":
    main("optimizer_q", measure)
