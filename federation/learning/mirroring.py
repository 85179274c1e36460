"""A device's samples as bytes for its twin, and back."""

import numpy as np

from federation.errors import DataError
from federation.learning.data import LocalData, as_local_data
from federation.protocol.codec import decode, encode
from federation.protocol.effects import Trained
from federation.protocol.messages import Report
from federation.protocol.mirror import MOST_BYTES, X, Y


def pack_mirror(data: LocalData) -> bytes:
    """The bytes in which a device's samples travel to its twin.

    Raises:
        DataError: labels that no float32 tells apart, or more than a device may mirror.
    """
    if data.samples and data.y.max() >= 1 << 24:
        raise DataError(f"label {data.y.max()} is too large to mirror: number classes from 0")
    if data.x.nbytes > MOST_BYTES:
        raise DataError(
            f"the local samples have {data.x.nbytes} bytes; a device mirrors at most {MOST_BYTES}: "
            "keep fewer of them"
        )
    return encode({X: data.x, Y: data.y.astype(np.float32)})


def unpack_mirror(payload: bytes) -> LocalData:
    """The samples in these bytes, checked: they may come from anybody.

    Raises:
        CodecError: no tensors.
        DataError: other tensors than samples and their labels, or values that are none.
    """
    tensors = decode(payload)
    if tensors.keys() != {X, Y}:
        raise DataError(f"a mirror has tensors {sorted(tensors)}; expected {X} and {Y}: refuse it")
    return as_local_data(tensors[X], tensors[Y], "the mirror")


def mirrored(attempt: str, data: LocalData) -> Trained:
    """What a device answers to a task that asks for its samples."""
    try:
        payload = pack_mirror(data)
    except DataError as error:
        return Trained(attempt, failure=str(error))
    return Trained(attempt, update=payload, report=Report(samples=data.samples))
