"""What a policy would have hit on a trace, and what nobody could have bettered.

Shapes: V visits, K = L * E keys.
"""

from dataclasses import dataclass

import numpy as np

from moe_serving.buffering.policies import make_policy
from moe_serving.buffering.residency import Residency
from moe_serving.buffering.trace import Trace

NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True)
class Tally:
    """Uses of experts that found them resident, and that did not."""

    hits: int
    misses: int

    @property
    def hit_rate(self) -> float:
        """The share of uses that were hits; 0 when nothing was used."""
        return self.hits / max(1, self.hits + self.misses)


def simulate(trace: Trace, policy: str, capacity: int, *, skip: int = 0) -> Tally:
    """Replays a trace under a policy.

    Args:
        trace: What to replay.
        policy: A name in `moe_serving.buffering.policies.POLICIES`.
        capacity: How many experts may be resident, of all layers together.
        skip: So many visits at the start warm the residents up and are not counted.
    """
    residency = Residency(trace.shape, capacity, make_policy(policy, trace.shape, capacity))
    before = (0, 0)
    for visit, (layer, active) in enumerate(trace.visits()):
        if visit == skip:
            before = (residency.hits, residency.misses)
        residency.visit(layer, active)
    return Tally(residency.hits - before[0], residency.misses - before[1])


def best_possible(trace: Trace, capacity: int, *, skip: int = 0) -> Tally:
    """Replays a trace with foresight: after each visit those used soonest stay.

    Belady's MIN (1966), with the freedom to let a miss pass through. As residents of a visit run
    before its misses, one is a hit exactly if it was resident when the visit began; so keeping
    the `capacity` soonest among residents and active is optimal.
    """
    soonest_K = np.full(trace.shape.layers * trace.shape.experts, NEVER, dtype=np.int64)
    keys_V = [
        layer * trace.shape.experts + np.array(active, dtype=np.int64)
        for layer, active in trace.visits()
    ]
    nexts_V: list[np.ndarray[tuple[int], np.dtype[np.int64]]] = []
    for visit in range(len(keys_V) - 1, -1, -1):
        nexts_V.append(soonest_K[keys_V[visit]])
        soonest_K[keys_V[visit]] = visit
    is_resident_K = np.zeros(len(soonest_K), dtype=bool)
    next_K = np.full(len(soonest_K), NEVER, dtype=np.int64)
    hits = misses = 0
    for visit, keys in enumerate(keys_V):
        found = int(is_resident_K[keys].sum())
        if visit >= skip:
            hits += found
            misses += len(keys) - found
        next_K[keys] = nexts_V[-1 - visit]
        is_resident_K[keys] = True
        staying = np.flatnonzero(is_resident_K)
        if len(staying) > capacity:
            by_next = staying[np.argsort(next_K[staying], kind="stable")]
            is_resident_K[by_next[capacity:]] = False
    return Tally(hits, misses)
