"""Which tensors make up a layer, and which layers travel.

A layer is what carries one module's parameters: all tensors whose names agree up to the last
dot. `classifier.weight` and `classifier.bias` are the layer `classifier`. A tensor whose name
has a slash is of no layer: it belongs to the method, and travels beside the model.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import TypeVar

from federation.errors import ConfigError
from federation.protocol.codec import layer_of

Tensor = TypeVar("Tensor")

TAUGHT = "taught"
"""Tensors of this prefix lie beside one device's base: what its teacher says of each of its local
samples, `taught/<what>` of shape (N, ...), and in `taught/digest` which samples those are. They
go to the device, and nothing of that name comes back."""

_LEVEL = re.compile(r"(?:stage|exit)([1-9]\d*)(?:[._]|$)")


def group_layers(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The tensor names of each layer, layers in the order in which they first appear."""
    layers: dict[str, tuple[str, ...]] = {}
    for name in names:
        layers[layer_of(name)] = (*layers.get(layer_of(name), ()), name)
    return layers


def choose_layers(
    weights: Mapping[str, Tensor], layers: Collection[str] | None
) -> dict[str, Tensor]:
    """The tensors of these layers only (none named: all of them).

    Raises:
        ConfigError: a layer the model does not have.
    """
    if layers is None:
        return dict(weights)
    known = group_layers(weights)
    if unknown := sorted(set(layers) - known.keys()):
        raise ConfigError(
            f"no layer {unknown[0]!r} in this model; it has {', '.join(known)}: "
            "name layers of the model in the plan"
        )
    return {name: tensor for name, tensor in weights.items() if layer_of(name) in layers}


def model_part(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's own tensors, in order."""
    return {name: tensor for name, tensor in tensors.items() if "/" not in name}


def method_part(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that travel beside the model and back, in order."""
    return {n: t for n, t in tensors.items() if "/" in n and not n.startswith(f"{TAUGHT}/")}


def taught_part(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a teacher says to one device, in order."""
    return {n: t for n, t in tensors.items() if n.startswith(f"{TAUGHT}/")}


def sample_part(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of that, what has a row for each local sample, by its name without the prefix."""
    said = {n.removeprefix(f"{TAUGHT}/"): t for n, t in taught_part(tensors).items()}
    return {name: tensor for name, tensor in said.items() if name != "digest"}


def level_of(layer: str) -> int | None:
    """The level from which devices train this layer; None for what only the whole model has.

    `stage3.conv4` and the head `exit3_classifier` are of level 3.
    """
    found = _LEVEL.match(layer)
    return int(found[1]) if found else None


def has_exits(names: Collection[str]) -> bool:
    """Whether a model of these tensors has heads that stop short of its depth."""
    deepest = deepest_level(names)
    return any(name.startswith("exit") and (level_of(name) or deepest) < deepest for name in names)


def deepest_level(names: Iterable[str]) -> int:
    """The number of levels of the model with these tensors (0: it has none)."""
    return max((level_of(layer_of(name)) or 0 for name in names), default=0)


def layers_up_to(names: Iterable[str], level: int) -> tuple[str, ...]:
    """The layers of this level and those below, in order."""
    return tuple(
        layer
        for layer in group_layers(names)
        if (of := level_of(layer)) is not None and of <= level
    )
