"""How long the busiest device keeps a step waiting, by who planned the placement."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.claims import Claim, Options, claim, main
from benchmarks.expert_traces import PROMPTS, record, served_lm
from moe_serving.placement.baselines import anti_correlated, contiguous, eplb, greedy
from moe_serving.placement.exact import best_placement
from moe_serving.placement.record import Placement
from moe_serving.placement.search import imbalance, search
from moe_serving.placement.split import Rows, split, split_evenly

GOAL = 1.10
"""Of ours with one copy a device, 128 experts on 8 devices."""

ORACLE_GAP = 1.04
"""How far from the proved best ours may be in small cases."""

PAPER, OURS, OURS_COPIED = "anti-correlation (paper)", "ours", "ours, 1 copy a device"

History = NDArray[np.int64]
Divide = Callable[[Sequence[int], Placement], Rows]


@dataclass(frozen=True, slots=True)
class Case:
    """Batches to plan from, and others of the same kind to judge by."""

    name: str
    devices: int
    seen: History
    unseen: History
    goal: float | None = None
    has_many_rows: bool = True


def measure(options: Options) -> list[Claim]:
    """Mean over held-out batches of the busiest device's load over the mean load; 1 is perfect.

    Synthetic batches are mixtures of 8 topics (Dirichlet 0.35), each with Zipf 0.9 over an order
    of its own; recorded ones are a layer of a served language model, 64 tokens a batch. Greedy
    places by mean loads; EPLB's copies are divided evenly, as DeepSeek does, and by water-filling.
    """
    batches = 60 if options.is_quick else 120
    sizes = [(128, 8)] if options.is_quick else [(64, 4), (64, 8), (128, 8)]
    cases = [
        synthetic_case(experts, devices, batches, GOAL if (experts, devices) == (128, 8) else None)
        for experts, devices in sizes
    ]
    cases += _recorded_cases(options, batches)
    claims = [each for case in cases for each in _judge_planners(case, options)]
    return claims + _oracle_claims(options)


def synthetic_case(experts: int, devices: int, batches: int, goal: float | None = None) -> Case:
    """Batches of 2048 rows in which topics come and go."""
    history = topics(experts, 2 * batches, 2048, np.random.default_rng(experts + devices))
    name = f"{experts} experts on {devices} devices"
    return Case(name, devices, history[:batches], history[batches:], goal)


def topics(experts: int, batches: int, rows: int, rng: np.random.Generator) -> History:
    """Rows by batch and expert of mixtures of topics."""
    zipf = 1 / np.arange(1, experts + 1) ** 0.9
    theme = np.array([rng.permutation(zipf / zipf.sum()) for _ in range(8)])
    mix = rng.dirichlet(np.full(len(theme), 0.35), size=batches)
    return np.array([rng.multinomial(rows, each) for each in mix @ theme])


def _recorded_cases(options: Options, batches: int) -> list[Case]:
    folder = served_lm(options)
    cases = []
    for text_set in PROMPTS:
        trace = record(folder, text_set, streams=64, passes=2 * batches)
        history = trace.loads(trace.shape.layers // 2).astype(np.int64)
        name = f"recorded, {text_set}, {trace.shape.experts} experts on 4 devices"
        cases.append(Case(name, 4, history[:batches], history[batches:], None, False))
    return cases


def _judge_planners(case: Case, options: Options) -> list[Claim]:
    options.tell(case.name)
    seen, devices, experts = case.seen, case.devices, case.seen.shape[1]
    slots = experts // devices
    plans: dict[str, tuple[Callable[[], Placement], Divide]] = {
        "in order": (lambda: contiguous(experts, devices), split),
        "greedy (paper)": (lambda: greedy(seen, devices, slots), split),
        "anti-correlation (paper), literal": (
            lambda: anti_correlated(seen, devices, slots, is_literal=True),
            split,
        ),
        PAPER: (lambda: anti_correlated(seen, devices, slots), split),
        OURS: (lambda: search(seen, devices, slots), split),
        "EPLB, 1 copy a device, even": (lambda: eplb(seen, devices, slots + 1), split_evenly),
        "EPLB, 1 copy a device, water-filled": (lambda: eplb(seen, devices, slots + 1), split),
        OURS_COPIED: (lambda: search(seen, devices, slots + 1), split),
    }
    waits, seconds = {}, {}
    for name, (make, divide) in plans.items():
        began_s = time.process_time()
        planned = make()
        seconds[name] = time.process_time() - began_s
        waits[name] = mean_wait(case.unseen, planned, divide)
    claims = []
    for name, wait in waits.items():
        peer = {OURS: PAPER, OURS_COPIED: "EPLB, 1 copy a device, even"}.get(name, "greedy (paper)")
        # With few rows a batch the busiest device is chance, and placements without copies tie.
        uncopied = waits[PAPER] if case.has_many_rows else None
        goal = {OURS: uncopied, OURS_COPIED: case.goal or waits[peer]}.get(name)
        claims.append(
            claim(f"{case.name}: {name}", wait, "", peer=peer, peer_value=waits[peer], goal=goal)
        )
    planning = claim(f"{case.name}: planning, {OURS_COPIED}", seconds[OURS_COPIED], "CPU s")
    return [*claims, planning]


def mean_wait(history: History, placement: Placement, divide: Divide) -> float:
    """The mean over batches of the busiest device's rows over the mean, whole rows divided."""
    waits = []
    for counts in history:
        load = divide(counts.tolist(), placement).sum(axis=0)
        waits.append(load.max() / load.mean())
    return float(np.mean(waits))


def _oracle_claims(options: Options) -> list[Claim]:
    sizes = [(8, 2, 0), (12, 3, 0), (12, 3, 3)]
    if not options.is_quick:
        sizes.append((16, 4, 0))
    claims = []
    for experts, devices, copies in sizes:
        options.tell(f"exact: {experts} experts on {devices} devices, {copies} copies")
        history = topics(experts, 8, 200, np.random.default_rng(experts))
        slots = experts // devices + -(-copies // devices)
        proven = best_placement(history, devices, slots, copies=copies, time_limit_s=20.0)
        ours = imbalance(history, search(history, devices, slots, copies=copies))
        claims.append(
            claim(
                f"small: {experts} experts on {devices} devices, {copies} copies: ours",
                ours,
                "",
                peer=f"MIP (bound {proven.bound:.4f})",
                peer_value=proven.merit,
                goal=ORACLE_GAP * proven.merit,
            )
        )
    return claims


if __name__ == "__main__":
    main("placement", measure)
