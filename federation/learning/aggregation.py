"""Averages of updates, in NumPy, with the same bits whatever the order of arrival.

Sums run over devices in sorted order, in float64, and are rounded to float32 once. A tensor
that a device did not send has no vote there; a tensor that nobody sent stays as it was.
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from federation.errors import ProtocolError
from federation.protocol.codec import Weights, check_tensor

MAX_WEIGHT = 1e15
"""No update counts more: their sum stays exact enough, and far from overflow."""


class Aggregator(Protocol):
    """Takes updates one by one and, once, turns them and a base into new weights."""

    def add(self, device: str, update: Weights, weight: float) -> None:
        """Count an update."""
        ...

    def apply(self, base: Weights) -> Weights:
        """The new weights."""
        ...


class WeightedMean:
    """The mean of updates by weight, tensor by tensor (FedAvg, arXiv:1602.05629, Alg. 1).

    Departs from the paper: a tensor's weights are normalised over the devices that sent it,
    so devices may send parts of the model. It holds every update until `apply`.
    """

    def __init__(self) -> None:
        self._updates: dict[str, tuple[Weights, float]] = {}

    def add(self, device: str, update: Weights, weight: float) -> None:
        """Count an update; it is kept by reference, so leave it unchanged.

        Args:
            device: whose it is: at most one update for each name.
            update: tensors of the base, all or some.
            weight: how much it counts, such as its number of samples; zero has no vote.

        Raises:
            ProtocolError: a second update of a device, or a weight below 0, over
                `MAX_WEIGHT` or not a number.
        """
        if device in self._updates:
            raise ProtocolError(
                f"a second update of {device!r} in one aggregation; expected one each: "
                "acknowledge the duplicate and drop it"
            )
        if not 0.0 <= weight <= MAX_WEIGHT:
            raise ProtocolError(
                f"update of {device!r} has weight {weight}; expected 0 to {MAX_WEIGHT:g}: "
                "use the number of its samples"
            )
        self._updates[device] = (update, weight)

    def apply(self, base: Weights) -> Weights:
        """The new weights: the base where nobody voted, the weighted mean elsewhere.

        Raises:
            CodecError: an update with a tensor that is not finite, or of another shape or
                dtype than in the base.
            ProtocolError: an update with a tensor the base does not have.
        """
        for device in sorted(self._updates):
            if foreign := sorted(self._updates[device][0].keys() - base.keys()):
                raise ProtocolError(
                    f"update of {device!r} has tensor {foreign[0]!r}, which the base lacks: "
                    "refuse it before aggregation"
                )
        return {name: self._mean(name, tensor) for name, tensor in base.items()}

    def _mean(self, name: str, base: NDArray[np.float32]) -> NDArray[np.float32]:
        voters = [
            (self._updates[device][0][name], self._updates[device][1])
            for device in sorted(self._updates)
            if name in self._updates[device][0] and self._updates[device][1] > 0.0
        ]
        if not voters:
            return base.copy()
        whole = sum(weight for _, weight in voters)
        mean = np.zeros(base.shape, np.float64)
        for tensor, weight in voters:
            check_tensor(name, tensor, base)
            mean += np.multiply(tensor, weight / whole, dtype=np.float64)
        return mean.astype(np.float32)


def staleness_weight(age: int, alpha: float = 0.5) -> float:
    """What a late update is worth: (1 + age)^-alpha (FedAsync, arXiv:1903.03934, section 5.2).

    Args:
        age: how many rounds older its base is than the newest, from 0.
        alpha: how fast worth falls; 0 keeps all alike.
    """
    return float((1.0 + age) ** -alpha)
