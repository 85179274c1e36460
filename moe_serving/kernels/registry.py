"""The one registry of kernels: by name, or the best for a device and a precision."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeAlias

import torch

from federation.errors import ConfigError
from moe_serving.kernels.grouped import is_grouped_usable, pack_grouped
from moe_serving.kernels.int8 import is_int8_usable, pack_int8
from moe_serving.kernels.onednn import is_onednn_usable, pack_onednn
from moe_serving.kernels.plain import pack_plain
from moe_serving.kernels.qmoe import is_qmoe_usable, pack_qmoe
from moe_serving.kernels.runtime import (
    is_nbits_usable,
    is_runtime_usable,
    pack_nbits,
    pack_runtime,
)
from moe_serving.layers.experts import (
    Activation,
    Experts,
    ExpertWeights,
    GroupedExperts,
    PackedExpert,
    ResidentStore,
    StoredExperts,
)
from moe_serving.layers.moe import MoELayer

Precision: TypeAlias = Literal["exact", "8bit"]


@dataclass(frozen=True, slots=True)
class Kernel:
    """A way to compute experts, one by one or a layer's together; it has one of the two.

    Attributes:
        name: what configurations call it.
        device: the device it is for.
        precision: `exact` is the checkpoint's own precision, to rounding.
        is_usable: whether it works here; asked once.
        pack: one expert's weights to what runs it.
        pack_layer: all experts of a layer, and its top K, to what runs them.
    """

    name: str
    device: Literal["cpu", "cuda"]
    precision: Precision
    is_usable: Callable[[], bool]
    pack: Callable[[ExpertWeights, Activation], PackedExpert] | None = None
    pack_layer: Callable[[GroupedExperts, int], Experts] | None = None


@cache
def kernels() -> dict[str, Kernel]:
    """Every kernel by its name, the better of a device and precision before the worse."""
    known = (
        Kernel("runtime", "cpu", "exact", cache(is_runtime_usable), pack=pack_runtime),
        Kernel("onednn", "cpu", "exact", cache(is_onednn_usable), pack=pack_onednn),
        Kernel("plain", "cpu", "exact", lambda: True, pack=pack_plain),
        Kernel("grouped_mm", "cuda", "exact", cache(is_grouped_usable), pack_layer=pack_grouped),
        Kernel("plain_cuda", "cuda", "exact", torch.cuda.is_available, pack=pack_plain),
        Kernel("qmoe", "cpu", "8bit", cache(is_qmoe_usable), pack_layer=pack_qmoe),
        Kernel("nbits", "cpu", "8bit", cache(is_nbits_usable), pack=pack_nbits),
        Kernel("int8", "cpu", "8bit", cache(is_int8_usable), pack=pack_int8),
    )
    return {kernel.name: kernel for kernel in known}


def kernel_named(name: str) -> Kernel:
    """The kernel of this name.

    Raises:
        ConfigError: There is none, or it does not work on this machine.
    """
    kernel = kernels().get(name)
    if kernel is None:
        raise ConfigError(f"no kernel is called {name!r}; there are {', '.join(kernels())}")
    if not kernel.is_usable():
        raise ConfigError(f"kernel {name!r} does not work here; `plain` does everywhere")
    return kernel


def best_kernel(
    device: str = "cpu", precision: Precision = "exact", *, is_single: bool = False
) -> Kernel:
    """The first usable kernel for a device (`cpu` or `cuda`) and precision.

    Args:
        device: where the layer runs.
        precision: how exact the answers must be.
        is_single: whether it must run experts one by one, as a store needs them.

    Raises:
        ConfigError: None is usable.
    """
    for kernel in kernels().values():
        fits = kernel.device == device and kernel.precision == precision
        if fits and not (is_single and kernel.pack is None) and kernel.is_usable():
            return kernel
    raise ConfigError(f"no {precision} kernel for {device!r} works here")


def serve_resident(layers: Iterable[MoELayer], kernel: Kernel) -> None:
    """Pack every layer's experts and serve from them; the trainable weights go one by one."""
    for layer in layers:
        grouped = layer.experts
        if not isinstance(grouped, GroupedExperts):
            raise ConfigError(f"layer {layer.number} is served from a store already")
        layer.serve_from(_packed(layer, grouped, kernel))


def _packed(layer: MoELayer, grouped: GroupedExperts, kernel: Kernel) -> Experts:
    if kernel.pack_layer is not None:
        return kernel.pack_layer(grouped, layer.router.top_k)
    pack = kernel.pack
    if pack is None:
        raise ConfigError(f"kernel {kernel.name!r} can run neither an expert nor a layer")
    experts = [
        pack(grouped.weights_of(e), grouped.shape.activation) for e in range(layer.n_experts)
    ]
    return StoredExperts(ResidentStore([experts]), layer=0)
