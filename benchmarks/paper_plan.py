"""The plans of arXiv:2303.06155, its Tables 3 and 4, beside ours in the calibrated profile."""

import time
from collections.abc import Callable
from typing import Literal, TypeAlias

import numpy as np

from benchmarks.claims import Claim, Options, claim, main
from optimizer.paper import PaperPlan
from optimizer.paper_environment import Discretisation, PaperRound
from optimizer.paper_profile import PaperProfile, PaperUsers, draw_users, paper_profile
from optimizer.paper_qlearning import PaperLearning, learn, plan_by_table
from optimizer.paper_search import descend, enumerate_plans, plan_with_student

Solver: TypeAlias = Callable[[PaperUsers], PaperPlan]
Split: TypeAlias = Literal["non_iid", "iid"]

PAPER = "arXiv:2303.06155"
PRINTED: dict[Split, dict[str, tuple[float, float, tuple[float, ...]]]] = {
    "non_iid": {
        "Q and convex step": (-1.03, 14.33, (1.5, 50.5, 48.0, 0.0)),
        "Q only": (-0.99, 15.66, (6.5, 62.0, 28.0, 3.5)),
        "FL-Min": (-0.95, 14.02, (100.0, 0.0, 0.0, 0.0)),
        "FL-Max": (0.0075, 27.01, (0.0, 0.0, 0.0, 100.0)),
    },
    "iid": {
        "Q and convex step": (-1.27, 13.91, (0.5, 17.0, 80.0, 2.5)),
        "Q only": (-1.22, 18.09, (0.0, 39.0, 49.5, 11.5)),
        "FL-Min": (-1.11, 13.07, (100.0, 0.0, 0.0, 0.0)),
        "FL-Max": (0.0074, 20.55, (0.0, 0.0, 0.0, 100.0)),
    },
}
"""Objective, mean delay in seconds, and how often each student was chosen, in percent."""


def measure(options: Options) -> list[Claim]:
    """Tables 3 (non_iid) and 4 (iid): ours as values, the paper's as peers.

    `loss` is 2 + the objective without the price of CPU, as a mean over users: so that it is
    above 0 and less is better. `gap` is to the enumerated optimum, in units of the objective.
    """
    draws = 10 if options.is_quick else 100
    claims: list[Claim] = []
    for split in PRINTED:
        options.tell(f"{split}: {draws} draws of four users")
        claims += _table(split, draws)
    return claims


def _table(split: Split, draws: int) -> list[Claim]:
    profile, rng = paper_profile(split), np.random.default_rng(0)
    solvers = _solvers(profile, np.random.default_rng(1))
    plans: dict[str, list[PaperPlan]] = {name: [] for name in solvers}
    cpu_s = dict.fromkeys(solvers, 0.0)
    for _ in range(draws):
        users = draw_users(rng)
        for name, solve in solvers.items():
            began = time.process_time()
            plans[name].append(solve(users))
            cpu_s[name] += (time.process_time() - began) / draws
    best = np.array([plan.objective for plan in plans["enumeration"]])
    names = [student.name for student in profile.students]
    claims = []
    for name, found in plans.items():
        printed = PRINTED[split].get(name, PRINTED[split]["Q and convex step"])
        claims += _rows(f"{split}, {name}", names, found, printed)
        gaps = np.array([plan.objective for plan in found]) - best
        goals = _goals(name)
        claims += [
            claim(f"{split}, {name}: gap, mean", _above_0(gaps.mean()), "", goal=goals[0]),
            claim(f"{split}, {name}: gap, worst", _above_0(gaps.max()), "", goal=goals[1]),
            claim(f"{split}, {name}: CPU for a plan", 1e3 * cpu_s[name], "ms"),
        ]
    return claims


def _rows(
    about: str,
    names: list[str],
    plans: list[PaperPlan],
    printed: tuple[float, float, tuple[float, ...]],
) -> list[Claim]:
    def mean(of: Callable[[PaperPlan], float]) -> float:
        return float(np.mean([of(plan) for plan in plans]))

    loss = 2 + mean(lambda plan: plan.objective_unpriced)
    claims = [
        claim(f"{about}: loss", loss, "", peer=PAPER, peer_value=2 + printed[0]),
        claim(f"{about}: delay", mean(lambda p: p.delay_s), "s", peer=PAPER, peer_value=printed[1]),
        claim(f"{about}: on the device", 100 * mean(lambda p: float(p.is_local.mean())), "%"),
    ]
    for place, name in enumerate(names):
        share = 100 * mean(lambda plan, at=place: float((plan.students == at).mean()))  # type: ignore[misc]
        claims.append(
            claim(f"{about}: {name}", share, "%", peer=PAPER, peer_value=printed[2][place])
        )
    return claims


def _solvers(profile: PaperProfile, rng: np.random.Generator) -> dict[str, Solver]:
    convex = PaperRound(profile)
    alone = PaperRound(profile, discretisation=Discretisation(share_levels=5))
    joint = PaperLearning(is_joint=True)
    return {
        "enumeration": lambda users: enumerate_plans(profile, users),
        "coordinate descent": lambda users: descend(profile, users),
        "Q and convex step": lambda u: plan_by_table(learn(convex, rng, users=u), convex, u),
        "joint Q and convex step": lambda u: plan_by_table(learn(convex, rng, joint, u), convex, u),
        "Q only": lambda u: plan_by_table(learn(alone, rng, users=u), alone, u),
        "FL-Min": lambda users: plan_with_student(profile, users, 0),
        "FL-Max": lambda users: plan_with_student(profile, users, len(profile.students) - 1),
    }


def _goals(name: str) -> tuple[float | None, float | None]:
    if name == "coordinate descent":
        return None, 1e-3
    return (0.01, 0.03) if name == "Q and convex step" else (None, None)


def _above_0(gap: float) -> float:
    return max(0.0, float(gap))


if __name__ == "__main__":
    main("paper_plan", measure)
