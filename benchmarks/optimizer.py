"""Plans and their proofs: speed, what peers make of the same rounds, and planners' gaps."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

import numpy as np

from benchmarks.claims import Claim, Options, claim, main
from benchmarks.optimizer_q import measure as learned
from optimizer import core
from optimizer.allocation import Effort, Planner, allocate
from optimizer.columns import Columns, tabulate
from optimizer.fleets import Setting, draw
from optimizer.heuristics import AllAt, FedCS, Greedy, Oort, Random
from optimizer.plan import Plan
from optimizer.problem import Problem, Weights
from optimizer.sweep import relative_gap
from optimizer.textbook import solve_textbook
from optimizer.validation import check

CLOSE_GOALS_S = {20: None, 100: 0.15, 1000: 1.0}
PROOF_GOALS_S = {10: 0.1, 100: 0.3, 500: 1.5, 1000: 3.0}
HEAVY = Weights(time_ref_s=8.0)
TEST_SEED = 10_000
"""Fleets from here on are for measuring; whatever learns is taught with others."""


@dataclass(frozen=True, slots=True)
class Timed:
    """A plan and the CPU seconds it took from the users' records."""

    plan: Plan
    cpu_s: float


def measure(options: Options) -> list[Claim]:
    """Plans and their proofs: speed, what peers make of the same rounds, and planners' gaps.

    All times are CPU seconds of this process, from the users' records to the plan, on one thread.
    """
    timed(fleet(30, 1), tolerance=0.0)
    claims = []
    for section in SECTIONS:
        claims += section(options)
    return claims


def fleet(users: int, seed: int, weights: Weights | None = None) -> Problem:
    """One of the fleets that are measured."""
    setting = Setting(users=users, weights=weights or Weights())
    return draw(setting, np.random.default_rng(TEST_SEED + seed))


def timed(problem: Problem, tolerance: float, limit_s: float = 60.0) -> Timed:
    """Plan a round as `optimizer.allocation.plan` does, limited in CPU seconds."""
    begun = time.process_time()
    check(problem)
    effort = Effort(tolerance, limit_s, clock=time.process_time)
    found = allocate(tabulate(problem), effort=effort)
    return Timed(found, time.process_time() - begun)


def proofs(options: Options) -> list[Claim]:
    """How long a plan takes that is proven within 0.1 %, and one that is proven best."""
    claims = []
    for users, goal in CLOSE_GOALS_S.items():
        found = [timed(fleet(users, seed), 1e-3) for seed in _seeds(options, users)]
        name = f"{users} users: a plan proven within 0.1 %"
        claims.append(claim(name, median(each.cpu_s for each in found), "CPU s", goal=goal))
    for users, goal in PROOF_GOALS_S.items():
        if options.is_quick and users > 100:
            continue
        options.tell(f"proofs for {users} users")
        found = [timed(fleet(users, seed), 0.0) for seed in _seeds(options, users)]
        claims += _proof_claims(f"{users} users", found, goal)
    return claims


def _proof_claims(name: str, found: list[Timed], goal: float | None) -> list[Claim]:
    worst_gap = max(each.plan.gap for each in found)
    unproven = sum(each.plan.why_stopped != "optimal" for each in found)
    times = [each.cpu_s for each in found]
    count = f"of {len(found)} fleets"
    return [
        claim(f"{name}: a plan proven best, median {count}", median(times), "CPU s", goal=goal),
        claim(f"{name}: the same, the slowest", max(times), "CPU s"),
        claim(f"{name}: fleets without that proof", unproven, count, goal=0.0 if goal else None),
        claim(f"{name}: the widest gap", 100.0 * worst_gap, "%"),
    ]


def heavy_makespans(options: Options) -> list[Claim]:
    """What happens when seconds weigh most: many makespans are then nearly as good."""
    claims = []
    for users in (100,) if options.is_quick else (10, 100, 500, 1000):
        options.tell(f"heavy makespans for {users} users")
        seeds = _seeds(options, users)
        close = [timed(fleet(users, seed, HEAVY), 1e-3) for seed in seeds]
        name = f"{users} users, heavy makespan"
        claims.append(claim(f"{name}: within 0.1 %", median(each.cpu_s for each in close), "CPU s"))
        found = [timed(fleet(users, seed, HEAVY), 0.0, limit_s=60.0) for seed in seeds[:4]]
        claims += _proof_claims(name, found, None)
    return claims


def whole_models(options: Options) -> list[Claim]:
    """The same rounds by HiGHS on all columns, and by the textbook's model."""
    limit_s = 5.0 if options.is_quick else 60.0
    claims = []
    beaten = 0
    for users in (10, 20) if options.is_quick else (10, 20, 50, 100):
        options.tell(f"whole models of {users} users")
        problem = fleet(users, 0)
        table = tabulate(problem)
        ours = timed(problem, 0.0)
        whole = _timed_whole(table, limit_s)
        taught = _timed_textbook(table, limit_s / 2.0)
        beaten += sum(
            peer.objective < ours.plan.bound - 1e-7 * abs(ours.plan.bound)
            for peer in (whole, taught)
        )
        for name, peer, most_s in (
            ("HiGHS on all columns", whole, limit_s),
            ("the textbook's model", taught, limit_s / 2.0),
        ):
            within = f"{name} (limit {most_s:g} s)"
            claims += [
                claim(
                    f"{users} users: proven best", ours.cpu_s, "CPU s",
                    peer=within, peer_value=peer.cpu_s,
                ),
                claim(f"{users} users: excess of {name}", peer.excess(ours.plan), "%"),
                claim(f"{users} users: own gap of {name}", 100.0 * peer.gap, "%"),
            ]  # fmt: skip
    return [*claims, claim("peers' plans below our bound", beaten, "plans", goal=0.0)]


@dataclass(frozen=True, slots=True)
class Peer:
    """What a peer found: its plan's objective, its bound, its CPU seconds."""

    objective: float
    bound: float
    cpu_s: float

    @property
    def gap(self) -> float:
        """Its own; 1 where it has no plan."""
        return relative_gap(self.objective, self.bound) if np.isfinite(self.objective) else 1.0

    def excess(self, best: Plan) -> float:
        """By how many percent its plan is dearer; 100 where it has none."""
        if not np.isfinite(self.objective):
            return 100.0
        return max(0.0, 100.0 * (self.objective / best.objective - 1.0))


def _timed_whole(table: Columns, limit_s: float) -> Peer:
    begun = time.process_time()
    answer = core.solve(table, core.whole(table), core.Limits(limit_s, 0.0))
    cpu_s = time.process_time() - begun
    if answer is None or answer.selected is None:
        return Peer(np.inf, -np.inf, cpu_s)
    return Peer(answer.selected.objective, answer.bound, cpu_s)


def _timed_textbook(table: Columns, limit_s: float) -> Peer:
    begun = time.process_time()
    taught = solve_textbook(table, limit_s)
    cpu_s = time.process_time() - begun
    if taught.selected is None:
        return Peer(np.inf, taught.bound, cpu_s)
    return Peer(taught.selected.objective, taught.bound, cpu_s)


def planners(_options: Options) -> dict[str, Callable[[], Planner]]:
    """Who narrows the choice before the allocator; each is made anew for a size of fleet."""
    return {
        "random": lambda: Random(np.random.default_rng(0)),
        "all on the device, largest": lambda: AllAt("device"),
        "all on the device, smallest": lambda: AllAt("device", "smallest"),
        "all at the twin, largest": lambda: AllAt("twin"),
        "greedy": Greedy,
        "FedCS": lambda: FedCS(round_s=30.0),
        "Oort": lambda: Oort(np.random.default_rng(0)),
    }


def gaps(options: Options) -> list[Claim]:
    """How far each planner's plan is above the bound that no plan is below."""
    claims = []
    for users in (10, 100) if options.is_quick else (10, 100, 1000):
        options.tell(f"planners for {users} users")
        tables = [tabulate(fleet(users, seed)) for seed in _seeds(options, users)]
        bounds = [allocate(table, effort=Effort(0.0, 60.0)).bound for table in tables]
        for name, make in planners(options).items():
            planner = make()
            found = list(_above(planner, tables, bounds))
            label = f"{users} users: {name}, above the bound"
            claims.append(claim(f"{label}, median", median(found), "%"))
            claims.append(claim(f"{label}, worst", max(found), "%"))
    return claims


def _above(planner: Planner, tables: list[Columns], bounds: list[float]) -> Iterator[float]:
    for table, bound in zip(tables, bounds, strict=True):
        found = allocate(table, planner.choose(table), effort=Effort(1e-4, 20.0))
        yield 100.0 * max(0.0, found.objective / bound - 1.0)


def _seeds(options: Options, users: int) -> range:
    if options.is_quick:
        return range(2 if users <= 100 else 1)
    return range(12 if users <= 100 else 6)


SECTIONS: tuple[Callable[[Options], list[Claim]], ...] = (
    proofs,
    whole_models,
    heavy_makespans,
    gaps,
    learned,
)


if __name__ == "__main__":
    main("optimizer", measure)
