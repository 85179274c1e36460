"""What gates asked for: recorded while serving, kept in a file, replayed by the simulator.

Shapes: V visits of a mixture layer, in the order they happened; L layers; E experts a layer.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from federation.errors import StoreError

Counts = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Shape:
    """How many mixture layers a model has, and experts in each."""

    layers: int
    experts: int

    def key(self, layer: int, expert: int) -> int:
        """Numbers an expert among all of the model's: `layer * experts + expert`."""
        return layer * self.experts + expert


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """Visits of mixture layers: `layer_V`, and `counts_VE`, the rows each expert was given."""

    shape: Shape
    layer_V: Counts
    counts_VE: Counts

    def __len__(self) -> int:
        """How many visits there are."""
        return len(self.layer_V)

    def visits(self) -> Iterator[tuple[int, list[int]]]:
        """Yields each visit's layer and its active experts, ascending."""
        for layer, counts_E in zip(self.layer_V.tolist(), self.counts_VE, strict=True):
            yield layer, np.flatnonzero(counts_E).tolist()

    def heat(self) -> NDArray[np.float64]:
        """Gives, [L, E], the share of a layer's visits that each expert was active in."""
        heat_LE = np.zeros((self.shape.layers, self.shape.experts))
        for layer in range(self.shape.layers):
            mine_VE = self.counts_VE[self.layer_V == layer]
            if len(mine_VE):
                heat_LE[layer] = (mine_VE > 0).mean(axis=0)
        return heat_LE

    def loads(self, layer: int) -> Counts:
        """Gives, [visits of the layer, E], the history that a placement is planned from."""
        counts_VE: Counts = self.counts_VE[self.layer_V == layer]
        return counts_VE


class TraceRecorder:
    """Collects visits while a model serves; give `record` to a store as its listener.

    Keeps the last `most` visits only: a server runs for months.
    """

    def __init__(self, shape: Shape, *, most: int = 100_000):
        self.shape = shape
        self._most = most
        self._visits: list[tuple[int, Counts]] = []

    def record(self, layer: int, counts_E: Sequence[int]) -> None:
        """Adds one visit."""
        self._visits.append((layer, np.asarray(counts_E, dtype=np.int32)))
        if len(self._visits) >= 2 * self._most:
            del self._visits[: -self._most]

    def trace(self) -> Trace:
        """Gives what was recorded so far, at most the last `most` visits."""
        visits = self._visits[-self._most :]
        return make_trace(self.shape, visits)


def make_trace(shape: Shape, visits: Sequence[tuple[int, Sequence[int] | Counts]]) -> Trace:
    """Builds a trace of `(layer, counts_E)` pairs."""
    counts_VE = np.zeros((len(visits), shape.experts), dtype=np.int32)
    for visit, (_, counts_E) in enumerate(visits):
        counts_VE[visit] = counts_E
    return Trace(shape, np.array([layer for layer, _ in visits], dtype=np.int32), counts_VE)


def save_trace(trace: Trace, path: Path) -> None:
    """Writes a trace as safetensors, aside and then in place."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    tensors = {"layer_V": trace.layer_V, "counts_VE": trace.counts_VE}
    save_file(tensors, aside, metadata={"layers": str(trace.shape.layers)})
    aside.replace(path)


def load_trace(path: Path) -> Trace:
    """Reads what `save_trace` wrote.

    Raises:
        StoreError: the file is absent, damaged or not a trace.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise StoreError(f"trace {path} cannot be read ({error}); record it again") from error
    layer_V, counts_VE = tensors.get("layer_V"), tensors.get("counts_VE")
    if layer_V is None or counts_VE is None or not _is_trace(layer_V, counts_VE):
        raise StoreError(
            f"{path} is not a trace of experts: layer_V [V] and counts_VE [V, E] of int32, "
            "none below 0, are expected; record it again"
        )
    layers = int(layer_V.max()) + 1 if len(layer_V) else 0
    return Trace(Shape(layers, counts_VE.shape[1]), layer_V, counts_VE)


def _is_trace(layer_V: NDArray[np.generic], counts_VE: NDArray[np.generic]) -> bool:
    if layer_V.dtype != np.int32 or counts_VE.dtype != np.int32:
        return False
    if layer_V.ndim != 1 or counts_VE.ndim != 2 or len(layer_V) != len(counts_VE):
        return False
    return bool((layer_V.astype(np.int64) >= 0).all() and (counts_VE.astype(np.int64) >= 0).all())
