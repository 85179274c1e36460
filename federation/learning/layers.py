"""Which tensors make up a layer, and which layers travel.

A layer is what carries one module's parameters: all tensors whose names agree up to the last
dot. `classifier.weight` and `classifier.bias` are the layer `classifier`.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import TypeVar

from federation.errors import ConfigError
from federation.protocol.codec import layer_of

Tensor = TypeVar("Tensor")


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
