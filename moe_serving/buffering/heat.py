"""How much each expert is used: measured while serving, stored, and where a new store begins."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from federation.errors import StoreError
from moe_serving.buffering.residency import Heat
from moe_serving.buffering.trace import Shape

HALF_LIFE = 1000.0
"""In visits of a layer: long enough to survive a quiet night, short enough to follow a season."""


class HeatMeter:
    """The share of a layer's recent visits in which each expert was active, [L, E]."""

    def __init__(self, shape: Shape, *, half_life: float = HALF_LIFE):
        self._fade = 0.5 ** (1 / half_life)
        self._sum_LE: Heat = np.zeros((shape.layers, shape.experts))
        self._weight_L: Heat = np.zeros(shape.layers)

    def record(self, layer: int, counts_E: Sequence[int]) -> None:
        """Adds one visit."""
        self._sum_LE[layer] *= self._fade
        self._sum_LE[layer] += np.asarray(counts_E) > 0
        self._weight_L[layer] = self._weight_L[layer] * self._fade + 1

    def heat(self) -> Heat:
        """Gives the heat so far; 0 where a layer was never visited."""
        heat_LE: Heat = self._sum_LE / np.maximum(self._weight_L, 1e-9)[:, None]
        return heat_LE


def save_heat(heat_LE: Heat, path: Path) -> None:
    """Writes a heat map as safetensors, aside and then in place."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    save_file({"heat_LE": np.ascontiguousarray(heat_LE, dtype=np.float64)}, aside)
    aside.replace(path)


def load_heat(path: Path, shape: Shape) -> Heat:
    """Reads the heat map of a model of this shape.

    Raises:
        StoreError: The file is absent, damaged, or of another model.
    """
    try:
        heat_LE = load_file(path).get("heat_LE")
    except (OSError, SafetensorError) as error:
        raise StoreError(f"heat map {path} cannot be read ({error}); begin without") from error
    if heat_LE is None or heat_LE.shape != (shape.layers, shape.experts):
        raise StoreError(
            f"{path} is no heat map of {shape.layers} layers with {shape.experts} experts; "
            "record one with this model"
        )
    if not bool(((heat_LE >= 0) & (heat_LE <= 1)).all()):
        raise StoreError(f"{path} holds shares outside 0 to 1; record it again")
    return np.asarray(heat_LE, dtype=np.float64)
