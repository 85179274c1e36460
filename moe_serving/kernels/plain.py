"""Experts in plain torch, on any device: what every other kernel must agree with."""

from dataclasses import dataclass

from torch import Tensor

from moe_serving.layers.experts import Activation, ExpertWeights, run_expert


@dataclass(frozen=True, slots=True)
class PlainExpert:
    """An expert's weights as they are."""

    weights: ExpertWeights
    activation: Activation

    @property
    def size_bytes(self) -> int:
        """The weights' bytes."""
        return sum(w.nbytes for w in self.weights)

    def __call__(self, x_MD: Tensor) -> Tensor:
        """Two products and the activation."""
        return run_expert(x_MD, self.weights, self.activation)


def pack_plain(weights: ExpertWeights, activation: Activation) -> PlainExpert:
    """The weights, not copied."""
    return PlainExpert(weights, activation)
