"""What of a training travels to the hub, and what the hub makes of it.

A device packs what it trained as its plan says: some layers, weights or differences to the
base, all entries or the largest, dense or int8. What did not travel, for whichever of these
reasons, is the *residual*: it is added to the next update, so that it is late and not lost
(error feedback, arXiv:1901.09847, Alg. 2; for layers the residual memory of FedLP). The residual
is what the device wanted to say minus what the hub decodes, so nothing of the codec can be
left out of it by mistake. Of a sparse model what is zero in the base does not travel either, and
needs no index: both sides see where the base is zero.
"""

import math
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from federation.errors import CodecError, ConfigError
from federation.learning.layers import choose_layers, method_part, model_part
from federation.learning.methods import method_named
from federation.learning.submodel import leading_slice
from federation.learning.support import support_of, within_support
from federation.protocol.codec import (
    Weights,
    check_form,
    check_part,
    check_tensor,
    check_update,
    decode,
    encode,
)
from federation.protocol.compact import LARGEST
from federation.protocol.in_place import InPlace
from federation.protocol.messages import LocalPlan, Uplink


def check_uplink(uplink: Uplink) -> None:
    """Refuse an uplink that says nothing sensible.

    Raises:
        ConfigError: an unknown encoding, a share of entries outside (0, 1], or one below 1
            without differences: a weight that is not sent is not zero; or a pace below 0.
    """
    if uplink.encoding not in {"dense", "int8"}:
        raise ConfigError(
            f'uplink.encoding is {uplink.encoding!r}; expected "dense" or "int8": correct it'
        )
    if not 0.0 < uplink.top_k <= 1.0:
        raise ConfigError(
            f"uplink.top_k is {uplink.top_k}; expected a share above 0, at most 1: correct it"
        )
    if not 0.0 <= uplink.pace < math.inf:
        raise ConfigError(
            f"uplink.pace is {uplink.pace}; expected bytes a second, or 0 for no limit: correct it"
        )
    if uplink.top_k < 1.0 and not uplink.delta:
        raise ConfigError(
            f"uplink.top_k is {uplink.top_k} and uplink.delta is false; the largest entries of "
            "the weights are no model: say delta = true"
        )


def pack_update(
    trained: Weights,
    base: Weights,
    plan: LocalPlan,
    residual: Weights,
    state: Weights,
    *,
    in_place: bool = False,
) -> tuple[bytes, Weights]:
    """The bytes of an update, and the residual to hand in at the next training.

    With the default uplink the bytes are those of the trained weights, to the last bit; and
    only then `in_place` has the tensors themselves stand in for their bytes.

    Args:
        trained: the local model. Tensors that the base lacks never travel; the others may
            be leading slices of the base's.
        base: what training began from.
        plan: which layers travel, and how; its seed decides the rounding of int8.
        residual: what the last packing left, by tensor. What it holds of tensors the local
            model lacks this time stays in the new one; what has another shape is forgotten.
        state: the method's tensors, which travel beside the model, dense and in full.
        in_place: whether hub and device share their memory.

    Returns:
        The new residual is empty unless the plan asks for one; else it covers all tensors
        that the local model shares with the base, whether their layer travelled or not.

    Raises:
        ConfigError: an uplink as `check_uplink` refuses, or a layer the local model lacks.
        TrainingError: a tensor that is no leading slice of the base's.
        CodecError: a value that is NaN or infinite.
    """
    check_uplink(plan.uplink)
    shared = {name: tensor for name, tensor in model_part(trained).items() if name in base}
    origin = {name: leading_slice(name, base[name], shared[name].shape) for name in shared}
    owed = residual if plan.uplink.residual else {}
    wanted = {
        name: _wanted(name, shared[name], origin[name], owed.get(name), plan.uplink)
        for name in shared
    }
    support = _support(origin, plan)
    if not in_place:
        for name, tensor in wanted.items():
            check_tensor(name, tensor, origin[name])
    wanted = within_support(wanted, support)
    sent = choose_layers(wanted, plan.layers)
    data = _packed({**sent, **state}, plan, support, in_place=in_place)
    if not plan.uplink.residual:
        return data, {}
    heard = decode(data, support, like=origin, sparse=True)
    # Of a tensor that did not travel the hub assumes the base.
    assumed = {n: np.zeros_like(t) if plan.uplink.delta else t for n, t in origin.items()}
    left = {n: _finite(n, np.subtract, wanted[n], heard.get(n, assumed[n])) for n in wanted}
    absent = {n: t for n, t in owed.items() if n in base and n not in wanted}
    return data, {**absent, **left}


def _support(base: Weights, plan: LocalPlan) -> dict[str, NDArray[np.bool_]]:
    """Where tensors live, of those that do not live entirely; nothing of dense models."""
    if not method_named(plan.method).keeps_zeros:
        return {}
    return {name: alive for name, alive in support_of(base).items() if not alive.all()}


def _packed(
    sent: Weights, plan: LocalPlan, support: Mapping[str, NDArray[np.bool_]], *, in_place: bool
) -> bytes:
    uplink = plan.uplink
    if in_place and not support and uplink.encoding == "dense" and uplink.top_k == 1.0:
        return InPlace(sent, _dense_size(tuple((n, t.shape) for n, t in sent.items()))).as_bytes()
    kept = None
    if uplink.top_k < 1.0:
        kept = {n: _largest(t, uplink.top_k) for n, t in model_part(sent).items()}
        kept |= {n: kept[n] & alive for n, alive in support.items() if n in kept}
    return encode(
        sent,
        encoding=uplink.encoding,
        masks=None if kept is not None else support,
        kept=kept,
        compact=True,
        seed=plan.seed,
    )


@lru_cache(maxsize=64)
def _dense_size(shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> int:
    return len(encode({name: np.zeros(shape, np.float32) for name, shape in shapes}))


def unpack_update(
    data: bytes, base: Weights, plan: LocalPlan, *, narrower: bool = False
) -> Weights:
    """The tensors of an update as they travelled: differences if the plan says so.

    Entries that did not travel are zero differences; layers that did not are absent.

    Args:
        data: what `pack_update` gave on a device.
        base: what the device was sent.
        plan: what it was asked to do.
        narrower: whether its model may be narrower than the base's.

    Raises:
        CodecError: unreadable, another name or shape, NaN or infinity, or some entries of a
            tensor where the plan asks for weights; or life where the base of a method that
            keeps zeros has none.
    """
    support = _support(base, plan)
    update = decode(data, support, like=model_part(base), sparse=plan.uplink.delta)
    check_update(update, base, plan.layers, narrower=narrower)
    for name in support.keys() & update.keys():
        if update[name][~support[name]].any():
            raise CodecError(
                f"tensor {name!r} has entries where the base is zero, and {plan.method} keeps "
                "these: refuse it"
            )
    return update


def absolute(update: Weights, base: Weights, uplink: Uplink) -> Weights:
    """The weights an update proposes, seen from this base.

    A difference is added to the base given here, not to the one it was trained from: so a
    late one changes the newest model as much as it changed its own (FedBuff,
    arXiv:2106.06639, Alg. 1). The method's tensors are never differences. A sum beyond float32
    is its largest number: that a base is huge already is no fault of this update.

    Raises:
        CodecError: a tensor that is no leading slice of the base's.
    """
    if not uplink.delta:
        return dict(update)
    return {
        **{name: _added(name, delta, base) for name, delta in model_part(update).items()},
        **method_part(update),
    }


def _wanted(
    name: str,
    trained: NDArray[np.float32],
    origin: NDArray[np.float32],
    owed: NDArray[np.float32] | None,
    uplink: Uplink,
) -> NDArray[np.float32]:
    """What the device would say of a tensor if it could say all of it."""
    check_form(name, trained, origin)
    wanted = _finite(name, np.subtract, trained, origin) if uplink.delta else trained
    if owed is None or owed.shape != wanted.shape:
        return wanted
    return _finite(name, np.add, wanted, owed)


def _largest(tensor: NDArray[np.float32], share: float) -> NDArray[np.bool_]:
    """Where the largest entries are by magnitude; of equal ones the first in C order."""
    count = min(tensor.size, max(1, round(share * tensor.size)))
    size = np.abs(tensor).reshape(-1)
    if count == size.size:
        return np.ones(tensor.shape, np.bool_)
    bound = np.partition(size, size.size - count)[size.size - count]
    chosen: NDArray[np.bool_] = size > bound
    ties = np.flatnonzero(size == bound)
    chosen[ties[: count - int(chosen.sum())]] = True
    return chosen.reshape(tensor.shape)


def _added(name: str, delta: NDArray[np.float32], base: Weights) -> NDArray[np.float32]:
    if name not in base:
        raise CodecError(f"update has tensor {name!r}, which the base lacks: refuse it")
    with np.errstate(over="ignore"):
        total = check_part(name, delta, base[name]) + delta
    return np.asarray(np.clip(total, -LARGEST, LARGEST))


def _finite(
    name: str, combine: np.ufunc, one: NDArray[np.float32], other: NDArray[np.float32]
) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        result: NDArray[np.float32] = np.asarray(combine(one, other))
    check_tensor(name, result, one)
    return result
