"""Which local samples something was said of: labels of a teacher go with these, and no others."""

import hashlib

import numpy as np
from numpy.typing import NDArray

from federation.errors import TrainingError
from federation.learning.data import LocalData
from federation.learning.layers import TAUGHT, sample_part, taught_part
from federation.protocol.codec import Weights

DIGEST = f"{TAUGHT}/digest"


def sample_digest(data: LocalData) -> str:
    """The SHA-256 of samples and labels in their order, as 64 hexadecimal digits."""
    digest = hashlib.sha256(f"{data.x.shape}\n".encode())
    digest.update(np.ascontiguousarray(data.x).data)
    digest.update(np.ascontiguousarray(data.y).data)
    return digest.hexdigest()


def as_tensor(digest: str) -> NDArray[np.float32]:
    """The digest's 32 bytes as numbers, since what travels beside a model is tensors."""
    return np.frombuffer(bytes.fromhex(digest), np.uint8).astype(np.float32)


def check_taught(weights: Weights, data: LocalData) -> None:
    """Refuse what a teacher said of other samples than these.

    Raises:
        TrainingError: the digest is of other samples, or a tensor has another number of rows.
    """
    said = taught_part(weights)
    if not said:
        return
    if DIGEST not in said or not np.array_equal(said[DIGEST], as_tensor(sample_digest(data))):
        raise TrainingError(
            "the teacher's answers beside the base are of other samples than the local ones: "
            "mirror the data again, or train without them"
        )
    for name, tensor in sample_part(weights).items():
        if tensor.shape[:1] != (data.samples,):
            raise TrainingError(
                f"the teacher's {name} have shape {tensor.shape}; expected a row for each of "
                f"{data.samples} samples: ask the hub for new ones"
            )
