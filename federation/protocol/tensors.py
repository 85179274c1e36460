"""Plain tensors and a text about them as one safetensors file, checked in both directions."""

import json
import re
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import safetensors
from numpy.typing import NDArray
from safetensors.numpy import save

from federation.errors import CodecError

Array: TypeAlias = NDArray[Any]

MAX_HEADER_BYTES = 256 * 1024
"""No longer header is parsed: enough for some two thousand tensors."""

MAX_DIMENSIONS = 8

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:/-]{0,199}")
"""What a tensor may be called."""

_FACTS, _RESERVED = "headwater", "__metadata__"
_DTYPES = {"F32": np.float32, "F64": np.float64, "I64": np.int64, "I8": np.int8}


def pack(tensors: Mapping[str, Array], facts: str = "") -> bytes:
    """Tensors of any dtype known here, and a text about them, as one safetensors file.

    Raises:
        CodecError: a name, dtype or number of dimensions that cannot travel.
    """
    ready: dict[str, Array] = {}
    for name in sorted(tensors):
        tensor = tensors[name]
        if name == _RESERVED or NAME.fullmatch(name) is None:
            raise CodecError(
                f"tensor name {name[:80]!r} cannot travel: "
                "use 1 to 200 letters, digits and _ . : / -"
            )
        if tensor.dtype.type not in _DTYPES.values() or tensor.ndim > MAX_DIMENSIONS:
            raise CodecError(
                f"tensor {name!r} is {tensor.dtype} with {tensor.ndim} dimensions; expected "
                f"float32, float64, int64 or int8 with at most {MAX_DIMENSIONS}: convert it"
            )
        ready[name] = np.asarray(tensor, order="C")
    payload = save(ready, {_FACTS: facts} if facts else None)
    _check_header(payload)
    return payload


def unpack(payload: bytes) -> tuple[dict[str, Array], str]:
    """The tensors in a safetensors file, writable, and the text about them.

    Raises:
        CodecError: bytes that are not such a file, whole and nothing beyond.
    """
    header = _check_header(payload)
    try:
        entries = safetensors.deserialize(payload)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        raise CodecError(
            f"{len(payload)} bytes are not tensors ({error}); expected a safetensors payload: "
            "fetch it again"
        ) from error
    tensors: dict[str, Array] = {}
    for name, entry in entries:
        dtype, shape = _DTYPES.get(entry["dtype"]), tuple(entry["shape"])
        if dtype is None or NAME.fullmatch(name) is None or not _is_sane(shape):
            raise CodecError(
                f"tensor {name[:80]!r} is {entry['dtype']} of shape {shape[:9]}: not ours, refuse"
            )
        try:
            tensors[name] = np.frombuffer(bytearray(entry["data"]), dtype).reshape(shape)
        except ValueError as error:
            raise CodecError(
                f"tensor {name!r} cannot have shape {shape} ({error}): not ours, refuse"
            ) from error
    return tensors, _text_in(header)


def _check_header(payload: bytes) -> bytes:
    length = int.from_bytes(payload[:8], "little")
    if len(payload) < 8 or length > len(payload) - 8:
        raise CodecError(
            f"payload of {len(payload)} bytes is cut short or not tensors: fetch it again"
        )
    if length > MAX_HEADER_BYTES:
        raise CodecError(
            f"payload has a header of {length} bytes; at most {MAX_HEADER_BYTES} are read: "
            "send fewer tensors at once"
        )
    return payload[8 : 8 + length]


def _text_in(header: bytes) -> str:
    try:
        metadata = json.loads(header).get(_RESERVED)
    except (ValueError, RecursionError) as error:
        raise CodecError(f"payload's header is unreadable ({error}): fetch it again") from error
    text = metadata.get(_FACTS, "") if isinstance(metadata, dict) else ""
    return text if isinstance(text, str) else ""


def _is_sane(shape: tuple[int, ...]) -> bool:
    return len(shape) <= MAX_DIMENSIONS and all(size < 2**31 for size in shape)
