"""Sensor windows as they would be had the device been worn a little otherwise."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

AXES = 3
"""Channels come in threes: the axes of one sensor in space."""


@dataclass(frozen=True, slots=True, eq=False)
class TurnedWindows:
    """Each window `copies` times: turned about an axis of its own, and a little stronger or weaker.

    All sensors of a window turn together, by up to `turn_deg`; their strength varies by a share of
    `scale`. What a copy is follows from the seed and its place alone, so a training that is
    resumed, or shared by more processes, sees the same.
    """

    x: NDArray[np.float32]
    y: NDArray[np.int64]
    copies: int
    turn_deg: float
    scale: float
    seed: int

    def __len__(self) -> int:
        """How many there are, copies counted."""
        return len(self.y) * self.copies

    def batch(self, places: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Windows (B, length, channels) and labels (B,)."""
        chosen = places % len(self.y)
        drawn = np.stack([self._draw(int(place)) for place in places])
        turns = turned(drawn[:, :AXES], drawn[:, AXES] * np.deg2rad(self.turn_deg))
        windows = self.x[chosen].reshape(len(places), -1, self.x.shape[2] // AXES, AXES)
        x = (
            np.einsum("blsi,bij->blsj", windows, turns)
            * (1 + self.scale * drawn[:, 4])[:, None, None, None]
        )
        shape = (len(places), *self.x.shape[1:])
        return torch.from_numpy(x.reshape(shape).astype(np.float32)), torch.from_numpy(
            self.y[chosen]
        )

    def _draw(self, place: int) -> NDArray[np.float64]:
        """A direction in space, and two numbers from -1 to 1."""
        rng = np.random.default_rng([self.seed, place])
        return np.concatenate([rng.standard_normal(AXES), rng.uniform(-1, 1, 2)])


def turned(axis: NDArray[np.float64], angle: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rotation matrices (B, 3, 3) about axes (B, 3) by angles (B,): Rodrigues' formula."""
    x, y, z = (axis / np.linalg.norm(axis, axis=1, keepdims=True)).T
    o = np.zeros_like(x)
    cross = np.stack([o, -z, y, z, o, -x, -y, x, o], axis=1).reshape(-1, 3, 3)
    sine, versine = np.sin(angle)[:, None, None], (1 - np.cos(angle))[:, None, None]
    matrices: NDArray[np.float64] = np.eye(3) + sine * cross + versine * (cross @ cross)
    return matrices
