"""All state of a training between two batches, and its bytes."""

from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from federation.errors import CodecError
from federation.protocol.codec import Weights
from federation.protocol.tensors import pack, unpack


class Progress(msgspec.Struct, frozen=True):
    """How far training is: steps and samples done, sums over those samples, seconds spent."""

    steps: int = 0
    seen: int = 0
    loss_sum: float = 0.0
    correct: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """All state between two batches; `velocity` is the momentum, (P,), in `weights` order."""

    weights: Weights
    velocity: NDArray[np.float32]
    progress: Progress

    def to_bytes(self) -> bytes:
        """The checkpoint as one safetensors file."""
        tensors = {f"weights/{name}": tensor for name, tensor in self.weights.items()}
        order = list(self.weights)
        facts = msgspec.json.encode((order, self.progress)).decode()
        return pack({**tensors, "velocity": self.velocity}, facts)

    @classmethod
    def from_bytes(cls, payload: bytes) -> "Checkpoint":
        """The checkpoint in these bytes.

        Raises:
            CodecError: bytes that are not a checkpoint.
        """
        tensors, facts = unpack(payload)
        try:
            order, progress = msgspec.json.decode(facts, type=tuple[list[str], Progress])
            weights = {name: tensors[f"weights/{name}"] for name in order}
            return cls(weights, tensors["velocity"], progress)
        except (msgspec.DecodeError, KeyError) as error:
            raise CodecError(
                f"bytes are tensors but no checkpoint ({error}): start over"
            ) from error
