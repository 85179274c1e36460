"""Policies by name: the paper's, LRU, aged LFU, and ours (`moe_serving.buffering.reuse`)."""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np

from federation.errors import ConfigError
from moe_serving.buffering.residency import PASS, Admission, Heat, Policy
from moe_serving.buffering.reuse import ExpectedReuse
from moe_serving.buffering.trace import Shape

DEFAULT = "reuse"


class Paper:
    """Inactive experts go first, then the last that came; each layer has slots of its own.

    "Towards MoE Deployment" (arXiv:2303.06182), section on expert buffering. Experts run in
    ascending order and the order comes again with the next batch, so the last that came is the
    one needed last. The paper does not say which inactive expert goes first: here also the last
    that came.
    """

    def __init__(self, shape: Shape, capacity: int, heat_LE: Heat | None = None):
        del heat_LE
        whole, rest = divmod(capacity, shape.layers)
        self._slots = [whole + (layer < rest) for layer in range(shape.layers)]
        self._stacks: list[list[int]] = [[] for _ in range(shape.layers)]
        self._active: frozenset[int] = frozenset()
        self._shape = shape

    def observe(self, layer: int, active: Sequence[int]) -> None:
        """Remembers who is active."""
        self._active = frozenset(self._shape.key(layer, expert) for expert in active)

    def use(self, key: int) -> None:
        """Uses change nothing: only who came when counts."""

    def admit(self, key: int) -> Admission:
        """Always takes a miss in, if its layer has a slot at all."""
        layer = key // self._shape.experts
        stack, slots = self._stacks[layer], self._slots[layer]
        if slots == 0:
            return PASS
        evicted = None
        if len(stack) >= slots:
            inactive = (
                place for place in range(slots - 1, -1, -1) if stack[place] not in self._active
            )
            evicted = stack.pop(next(inactive, -1))
        stack.append(key)
        return Admission(stays=True, evicted=evicted)


class LeastRecent:
    """The least recently used goes (LRU): what most systems do."""

    def __init__(self, shape: Shape, capacity: int, heat_LE: Heat | None = None):
        del shape, heat_LE
        self._capacity = capacity
        self._order: OrderedDict[int, None] = OrderedDict()

    def observe(self, layer: int, active: Sequence[int]) -> None:
        """Gates change nothing: only uses count."""

    def use(self, key: int) -> None:
        """Makes a resident the last to go."""
        self._order.move_to_end(key)

    def admit(self, key: int) -> Admission:
        """Always takes a miss in."""
        if self._capacity == 0:
            return PASS
        evicted = None
        if len(self._order) >= self._capacity:
            evicted, _ = self._order.popitem(last=False)
        self._order[key] = None
        return Admission(stays=True, evicted=evicted)


class LeastFrequent:
    """The least frequently used goes, with old uses fading (aged LFU).

    Args:
        shape: Of the model.
        capacity: How many may be resident.
        heat_LE: Shares of visits to start from.
        half_life: After so many visits of its layer a use counts half.
        may_pass: Whether a miss that is rarer than the rarest resident passes through.
    """

    def __init__(
        self,
        shape: Shape,
        capacity: int,
        heat_LE: Heat | None = None,
        *,
        half_life: float = 32.0,
        may_pass: bool = False,
    ):
        self._capacity = capacity
        self._may_pass = may_pass
        self._fade = 0.5 ** (1 / half_life)
        self._rate_LE = np.zeros((shape.layers, shape.experts)) if heat_LE is None else +heat_LE
        self._is_resident_K = np.zeros(shape.layers * shape.experts, dtype=bool)
        self._residents = 0

    def observe(self, layer: int, active: Sequence[int]) -> None:
        """Lets the layer's rates fade, and counts who is active."""
        rate_E = self._rate_LE[layer]
        rate_E *= self._fade
        rate_E[active] += 1 - self._fade

    def use(self, key: int) -> None:
        """Uses were counted when the gate spoke."""

    def admit(self, key: int) -> Admission:
        """Takes a miss in for the rarest resident."""
        if self._capacity == 0:
            return PASS
        evicted = None
        if self._residents >= self._capacity:
            rate_K = self._rate_LE.ravel()
            evicted = int(np.argmin(np.where(self._is_resident_K, rate_K, np.inf)))
            if self._may_pass and rate_K[key] <= rate_K[evicted]:
                return PASS
            self._is_resident_K[evicted] = False
        else:
            self._residents += 1
        self._is_resident_K[key] = True
        return Admission(stays=True, evicted=evicted)


class LeastFrequentOrPass(LeastFrequent):
    """Aged LFU where a miss that is rarer than the rarest resident passes through."""

    def __init__(self, shape: Shape, capacity: int, heat_LE: Heat | None = None):
        super().__init__(shape, capacity, heat_LE, may_pass=True)


POLICIES: dict[str, Callable[[Shape, int, Heat | None], Policy]] = {
    "reuse": ExpectedReuse,
    "paper": Paper,
    "lru": LeastRecent,
    "lfu": LeastFrequent,
    "lfu-pass": LeastFrequentOrPass,
}


def make_policy(name: str, shape: Shape, capacity: int, heat_LE: Heat | None = None) -> Policy:
    """Gives a policy by its name.

    Raises:
        ConfigError: no policy has that name.
    """
    if name not in POLICIES:
        raise ConfigError(f"unknown expert policy {name!r}; choose one of {', '.join(POLICIES)}")
    return POLICIES[name](shape, capacity, heat_LE)
