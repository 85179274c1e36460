"""Who is resident: decided once for a visit, the same in a simulation and in a real store.

A visit is one call of a mixture layer. Dynamic gating knows all of its active experts before the
first one runs, so a visit is planned as a whole: residents run first (they are the hits), then
the misses in ascending order. For each miss a policy says whether it stays, and in whose place.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from moe_serving.buffering.trace import Shape

Heat = NDArray[np.float64]


class Admission(NamedTuple):
    """What a policy says of a miss: whether it stays, and the key of whom it replaces."""

    stays: bool
    evicted: int | None = None


PASS = Admission(stays=False)
"""It runs once from scratch memory, and leaves the residents alone."""


class Policy(Protocol):
    """Which experts stay, by key (`Shape.key`). Deterministic: the same calls, the same answers.

    A policy is built for a shape and a capacity and remembers who stays by what it answered.
    """

    def observe(self, layer: int, active: Sequence[int]) -> None:
        """Hears a layer's gate, before any of its active experts (ascending) is used."""

    def use(self, key: int) -> None:
        """Hears that a resident is used."""

    def admit(self, key: int) -> Admission:
        """Judges a miss of the visit last observed. Its use is not told by `use` as well."""


class Fetch(NamedTuple):
    """One miss of a visit: the expert to bring, whether it stays, and the key that goes."""

    expert: int
    stays: bool
    evicted: int | None


@dataclass(frozen=True, slots=True)
class VisitPlan:
    """In which order a visit's experts run: `hits`, then `fetches`, each ascending."""

    layer: int
    hits: tuple[int, ...]
    fetches: tuple[Fetch, ...]


class Residency:
    """The set of residents under a policy, and what was hit so far.

    Args:
        shape: Of the model.
        capacity: How many experts may be resident; 0 is allowed, then each use is a miss.
        policy: Built for the same shape and capacity.
    """

    def __init__(self, shape: Shape, capacity: int, policy: Policy):
        self.shape = shape
        self.capacity = capacity
        self.hits = 0
        self.misses = 0
        self._policy = policy
        self._residents: set[int] = set()

    @property
    def residents(self) -> frozenset[int]:
        """The keys that are resident."""
        return frozenset(self._residents)

    def warm_up(self, heat_LE: Heat) -> tuple[int, ...]:
        """Takes in the hottest experts until there is no more room, and gives their keys."""
        by_heat = np.argsort(-heat_LE.ravel(), kind="stable")
        for key in by_heat.tolist():
            if len(self._residents) >= self.capacity or heat_LE.flat[key] <= 0:
                break
            if key not in self._residents:
                self._take(key, self._policy.admit(key))
        return tuple(sorted(self._residents))

    def visit(self, layer: int, active: Sequence[int]) -> VisitPlan:
        """Plans a visit and counts it; `active` ascends."""
        self._policy.observe(layer, active)
        key = self.shape.key
        hits = tuple(expert for expert in active if key(layer, expert) in self._residents)
        for expert in hits:
            self._policy.use(key(layer, expert))
        missed = sorted(set(active).difference(hits))
        fetches = tuple(self._fetch(layer, expert) for expert in missed)
        self.hits += len(hits)
        self.misses += len(fetches)
        return VisitPlan(layer, hits, fetches)

    def _fetch(self, layer: int, expert: int) -> Fetch:
        key = self.shape.key(layer, expert)
        admission = self._policy.admit(key)
        self._take(key, admission)
        return Fetch(expert, admission.stays, admission.evicted)

    def _take(self, key: int, admission: Admission) -> None:
        if admission.evicted is not None:
            self._residents.remove(admission.evicted)
        if admission.stays:
            self._residents.add(key)
        if len(self._residents) > self.capacity:
            raise RuntimeError(f"{len(self._residents)} experts resident; at most {self.capacity}")
