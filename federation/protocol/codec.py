"""Tensors to bytes and back: safetensors, dense or int8, whole, partial, masked or sparse.

Weights are float32 arrays under the names of a torch `state_dict`. A payload is one
safetensors file, readable by any safetensors reader; what differs from plain tensors stands
in its header under `headwater`, as JSON:

- *partial*: some names are not there. Absent is never zero: a tensor that was not sent is
  not in the result either.
- *masked*: of a tensor only the entries its mask keeps are there, in C order. Both sides
  hold the mask; the header carries its digest, so two different masks are noticed.
- *int8*: one byte an entry and one scale a tensor, rounded stochastically without bias. The
  method's tensors, those with a slash in their name, are never rounded.
- *compact*: one run of bytes, of a tensor of which only some entries travel, or of int8 that
  deflates well (`compact`). What is not in it is zero, so this is for differences. It is read
  only by who says how large the tensor may be.

The same weights give the same bytes, and bytes from anywhere give weights or `CodecError`.
"""

import hashlib
from collections.abc import Collection, Mapping
from typing import Literal, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from federation.errors import CodecError
from federation.protocol.compact import (
    WORTHWHILE,
    Form,
    dequantise,
    expand,
    quantise,
    scatter,
    squeeze,
)
from federation.protocol.in_place import InPlace
from federation.protocol.tensors import Array, pack, unpack

Weights: TypeAlias = dict[str, NDArray[np.float32]]
Masks: TypeAlias = Mapping[str, NDArray[np.bool_]]
Encoding: TypeAlias = Literal["dense", "int8"]


class _Facts(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the header says of the tensors: int8 scales, digests of masks, forms of compact ones."""

    scales: dict[str, float] = {}
    masks: dict[str, str] = {}
    compact: dict[str, Form] = {}


def digest_of(content: bytes) -> str:
    """The SHA-256 of these bytes in lower-case hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def layer_of(name: str) -> str:
    """The layer a tensor belongs to: its name up to the last dot (all of it without one)."""
    return name.rpartition(".")[0] or name


def encode(
    weights: Mapping[str, Array],
    *,
    encoding: Encoding = "dense",
    masks: Masks | None = None,
    kept: Masks | None = None,
    compact: bool = False,
    seed: int = 0,
) -> bytes:
    """The bytes of these weights.

    Int8 rounds x / s to one of its two neighbours, up with the probability of its fraction,
    where s = max |x| / 127: the mean of many roundings is x, and none is off by s or more.

    Args:
        weights: float32 tensors by name; a part of a model is as good as the whole.
        encoding: `dense` keeps every bit; `int8` needs a quarter of the bytes.
        masks: for the tensors named here, only the entries where the mask is true travel,
            and the reader must hold the mask.
        kept: likewise, but with their positions: the reader needs no more than the shape.
        compact: whether int8 tensors are deflated where that saves bytes.
        seed: decides the rounding of int8; dense does not look at it.

    Raises:
        CodecError: another dtype than float32, a name or mask that does not fit, or, for
            int8, a value that is not finite.
    """
    tensors, digests = _keep(_sorted_float32(weights), masks or {})
    sparse = _checked(kept or {}, tensors, digests)
    facts = _Facts(masks=digests)
    rng = np.random.default_rng(seed % 2**64)
    for name, tensor in tensors.items():
        entries = tensor[sparse[name]] if name in sparse else tensor
        if encoding == "int8" and "/" not in name:
            entries, facts.scales[name] = quantise(name, entries, rng)
        tensors[name] = entries
        if name in sparse:
            tensors[name] = squeeze(entries, sparse[name])
            facts.compact[name] = Form(tensor.shape, entries.size)
        elif compact and name in facts.scales and name not in digests:
            run = squeeze(entries, None)
            if run.size < WORTHWHILE * entries.size:
                tensors[name], facts.compact[name] = run, Form(tensor.shape)
    return pack(tensors, _facts_to_json(facts))


def decode(
    payload: bytes | InPlace,
    masks: Masks | None = None,
    like: Mapping[str, Array] | None = None,
    *,
    sparse: bool = False,
) -> Weights:
    """The weights in these bytes, as arrays of their own, ordered by name.

    Args:
        payload: what `encode` gave, on whatever machine; or tensors that stayed in place.
        masks: the masks of the tensors that travelled masked; others are not looked at.
            Entries a mask drops do not live in the model: they come back as zero.
        like: tensors as large as the reader allows: these may be compact, and no larger in
            any dimension.
        sparse: whether entries of a compact tensor may be missing. They come back as zero,
            which is right for differences and for nothing else.

    Raises:
        CodecError: bytes that are not a payload, whole and of this format, a mask that is
            missing or is not the sender's, or a compact tensor that is not allowed.
    """
    if isinstance(payload, InPlace):
        return dict(payload.tensors)
    tensors, text = unpack(payload)
    facts = _facts_from_json(text)
    described = facts.scales.keys() | facts.masks.keys() | facts.compact.keys()
    if foreign := sorted(described - tensors.keys()):
        raise CodecError(f"payload describes {foreign[0]!r} but does not hold it: refuse it")
    weights: Weights = {}
    for name in sorted(tensors):
        if name in facts.compact:
            weights[name] = _expand(name, tensors[name], facts, like or {}, sparse=sparse)
        else:
            flat = dequantise(name, tensors[name], facts.scales.get(name))
            weights[name] = _spread(name, flat, facts.masks.get(name), masks or {})
    return weights


def check_update(
    update: Mapping[str, Array],
    base: Mapping[str, Array],
    layers: Collection[str] | None = None,
    *,
    narrower: bool = False,
) -> None:
    """Refuse an update that may not be averaged into this base.

    The base's tensors with a slash in their name belong to the method: they are expected
    whatever the layers, in full. An update of no layers is one of those tensors alone.

    Args:
        update: what a device sent, decoded.
        base: the weights it was asked to train.
        layers: the layers it was asked to send (none: all).
        narrower: whether a tensor may be a leading slice of the base's.

    Raises:
        CodecError: a tensor is missing, foreign, of another shape or dtype, or holds NaN or
            infinity; the message names the first such tensor.
    """
    expected = {n for n in base if "/" in n or layers is None or layer_of(n) in layers}
    if missing := sorted(expected - update.keys()):
        raise CodecError(f"update lacks tensor {missing[0]!r}: send every tensor asked for")
    if foreign := sorted(update.keys() - expected):
        raise CodecError(f"update has tensor {foreign[0]!r}, which was not asked for: refuse it")
    for name in sorted(expected):
        check = check_part if narrower and "/" not in name else check_tensor
        check(name, update[name], base[name])


def check_part(name: str, tensor: Array, whole: Array) -> Array:
    """The leading slice of a tensor that this one stands for: so many first entries each way.

    Raises:
        CodecError: as `check_tensor`, if it is no leading slice or is empty.
    """
    fits = tensor.ndim == whole.ndim and all(
        min(1, size) <= mine <= size for mine, size in zip(tensor.shape, whole.shape, strict=True)
    )
    like = whole[tuple(slice(size) for size in tensor.shape)] if fits else whole
    check_tensor(name, tensor, like)
    return like


def check_tensor(name: str, tensor: Array, like: Array) -> None:
    """Refuse a tensor of another shape or dtype than `like`, or one that is not finite.

    Raises:
        CodecError: naming the tensor, what it is and what was expected.
    """
    check_form(name, tensor, like)
    if not np.isfinite(tensor).all():
        count = int(tensor.size - np.isfinite(tensor).sum())
        raise CodecError(
            f"tensor {name!r} has {count} values that are NaN or infinite; "
            "expected finite numbers: lower the learning rate or look at the data"
        )


def check_form(name: str, tensor: Array, like: Array) -> None:
    """Refuse a tensor of another shape or dtype than `like`; its numbers are not looked at.

    Raises:
        CodecError: as `check_tensor`.
    """
    if tensor.shape != like.shape:
        raise CodecError(
            f"tensor {name!r} has shape {tensor.shape}; expected {like.shape}: "
            "train the model that was sent"
        )
    if tensor.dtype != like.dtype:
        raise CodecError(f"tensor {name!r} is {tensor.dtype}; expected {like.dtype}: convert it")


def _facts_to_json(facts: _Facts) -> str:
    return "" if facts == _Facts() else msgspec.json.encode(facts, order="sorted").decode()


def _facts_from_json(text: str) -> _Facts:
    try:
        return msgspec.json.decode(text or "{}", type=_Facts)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise CodecError(
            f"payload's description is unreadable ({error}): sender and receiver disagree "
            "about the codec; upgrade the older"
        ) from error


def _sorted_float32(weights: Mapping[str, Array]) -> Weights:
    for name, tensor in weights.items():
        if tensor.dtype != np.float32:
            raise CodecError(f"tensor {name!r} is {tensor.dtype}; expected float32: convert it")
    return {name: weights[name] for name in sorted(weights)}


def _keep(weights: Weights, masks: Masks) -> tuple[dict[str, Array], dict[str, str]]:
    """What of these weights travels, and the digests of the masks that decided it."""
    kept: dict[str, Array] = dict(weights)
    digests: dict[str, str] = {}
    for name in sorted(masks.keys() & weights.keys()):
        _check_mask(name, masks[name], weights[name])
        kept[name] = weights[name][masks[name]]
        digests[name] = _mask_digest(masks[name])
    return kept, digests


def _checked(kept: Masks, weights: Mapping[str, Array], masked: Collection[str]) -> Masks:
    for name in sorted(kept.keys() & weights.keys()):
        if name in masked:
            raise CodecError(
                f"tensor {name!r} is masked, and some of its entries shall be kept; "
                "expected one of both: keep entries within the mask"
            )
        _check_mask(name, kept[name], weights[name])
    return kept


def _check_mask(name: str, mask: NDArray[np.bool_], tensor: Array) -> None:
    if mask.dtype != np.bool_ or mask.shape != tensor.shape:
        raise CodecError(
            f"mask of {name!r} is {mask.dtype} of shape {mask.shape}; "
            f"expected bool of shape {tensor.shape}: build it for this model"
        )


def _mask_digest(mask: NDArray[np.bool_]) -> str:
    shape = np.asarray(mask.shape, "<i8").tobytes()
    return digest_of(shape + np.packbits(mask).tobytes())[:16]


def _expand(
    name: str, run: Array, facts: _Facts, like: Mapping[str, Array], *, sparse: bool
) -> Array:
    form, scale = facts.compact[name], facts.scales.get(name)
    if name not in like or name in facts.masks or run.dtype != np.int8 or run.ndim != 1:
        raise CodecError(f"tensor {name!r} is compact; expected no such here: say how large it is")
    if form.kept is not None and not sparse:
        raise CodecError(
            f"tensor {name!r} has only some entries; expected all: send differences, or all"
        )
    dtype = np.float32 if scale is None else np.int8
    entries, at = expand(name, run, form, like[name].shape, dtype)
    values = dequantise(name, entries, scale)
    return values if at is None else scatter(values, at, form.shape)


def _spread(name: str, flat: NDArray[np.float32], digest: str | None, masks: Masks) -> Array:
    if digest is None:
        return flat
    mask = masks.get(name)
    if mask is None or mask.dtype != np.bool_ or _mask_digest(mask) != digest:
        raise CodecError(
            f"tensor {name!r} travelled under mask {digest[:16]!r}, which this side does not "
            "hold: both sides must use the mask of the same plan"
        )
    if flat.shape != (int(mask.sum()),):
        raise CodecError(
            f"tensor {name!r} has shape {flat.shape}; its mask keeps {int(mask.sum())} entries: "
            "refuse it"
        )
    full = np.zeros(mask.shape, np.float32)
    full[mask] = flat
    return full
