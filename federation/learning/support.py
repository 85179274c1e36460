"""Where a sparse model lives: both sides read it off the base, so that no index travels."""

import numpy as np
from numpy.typing import NDArray

from federation.learning.layers import model_part
from federation.protocol.codec import Weights

MATRIX = 2
"""Tensors of so many dimensions are pruned; biases and scales are few, and live entirely."""


def support_of(base: Weights) -> dict[str, NDArray[np.bool_]]:
    """By matrix or kernel of the model, where its entries are not zero."""
    return {name: t != 0.0 for name, t in model_part(base).items() if t.ndim >= MATRIX}


def within_support(tensors: Weights, support: dict[str, NDArray[np.bool_]]) -> Weights:
    """The same tensors, with what lies outside of the support made zero."""
    return {
        name: np.where(support[name], tensor, np.float32(0.0)) if name in support else tensor
        for name, tensor in tensors.items()
    }
