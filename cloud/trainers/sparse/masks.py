"""Which entries of a network live: magnitude pruning and early-bird tickets.

Matrices and kernels are pruned; vectors (biases, normalisations) and embeddings stay dense, for
they are few and losing an entry costs much. A mask is a bool tensor in the shape of its tensor,
true where an entry lives.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from federation.errors import ConfigError

Masks: TypeAlias = Mapping[str, Tensor]
Scope: TypeAlias = Literal["layer", "model"]

MEMORY = 5
"""So many of the newest masks are compared (Early-Bird Tickets, arXiv:1909.11957, section 4)."""

CLOSE = 0.1
"""Masks nearer than this to each other are one ticket (same section)."""


def prunable(model: nn.Module) -> tuple[str, ...]:
    """The names of the parameters that may be pruned, in the model's order."""
    embedded = {
        f"{name}.weight" if name else "weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    }
    return tuple(
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and name not in embedded
    )


def magnitude_masks(
    model: nn.Module, sparsity: float, *, scope: Scope = "layer"
) -> dict[str, Tensor]:
    """Keep the entries of largest magnitude.

    Args:
        model: its `prunable` parameters are looked at.
        sparsity: the share of entries that die, 0 to below 1.
        scope: whether each tensor loses this share, or all together do. SAMO's memory model
            takes every layer alike. At least one entry of each tensor lives in either case.

    Raises:
        ConfigError: a sparsity out of range.
    """
    if not 0.0 <= sparsity < 1.0:
        raise ConfigError(
            f"sparsity is {sparsity}; expected a share of entries from 0 to below 1: correct it"
        )
    sizes = {
        name: parameter.detach().abs().float()
        for name, parameter in model.named_parameters()
        if name in set(prunable(model))
    }
    if scope == "layer":
        return {name: _largest(size, sparsity) for name, size in sizes.items()}
    joined = torch.cat([size.reshape(-1) for size in sizes.values()])
    joint = torch.split(_largest(joined, sparsity), [size.numel() for size in sizes.values()])
    masks = {
        name: mask.view_as(size).clone()
        for (name, size), mask in zip(sizes.items(), joint, strict=True)
    }
    for name, mask in masks.items():
        if not mask.any():
            mask.view(-1)[sizes[name].argmax()] = True
    return masks


def _largest(size: Tensor, sparsity: float) -> Tensor:
    """True at the entries of largest size; of equal ones those that come first."""
    count = max(1, size.numel() - round(sparsity * size.numel()))
    order = size.reshape(-1).sort(descending=True, stable=True).indices
    mask = torch.zeros(size.numel(), dtype=torch.bool, device=size.device)
    mask[order[:count]] = True
    return mask.view_as(size)


def distance(one: Masks, other: Masks) -> float:
    """The share of entries on which two masks of one model disagree, 0 to 1 (Hamming)."""
    differing = sum(int((one[name] ^ other[name]).sum()) for name in one)
    return differing / max(1, sum(mask.numel() for mask in one.values()))


@dataclass(frozen=True, slots=True, eq=False)
class EarlyBird:
    """Watches the mask that pruning now would give, and says when it has settled.

    Early-Bird Tickets (arXiv:1909.11957): the newest `MEMORY` masks, one an epoch, are all
    within `CLOSE` of each other. Departs from the paper: it prunes channels by the scale of
    their batch normalisation; here single entries by magnitude, which is what SAMO's networks
    without normalisation need (the SAMO paper does not say how it made those masks).
    """

    seen: tuple[Masks, ...] = ()

    def after(self, masks: Masks) -> "EarlyBird":
        """The same watch, having seen one more mask."""
        return EarlyBird((*self.seen, masks)[-MEMORY:])

    @property
    def farthest(self) -> float:
        """The largest distance between two of the masks kept; 1 until there are enough."""
        if len(self.seen) < MEMORY:
            return 1.0
        return max(distance(one, other) for one, other in combinations(self.seen, 2))

    @property
    def has_settled(self) -> bool:
        """Whether the ticket is drawn: the newest mask is the one to train with."""
        return self.farthest < CLOSE


def apply_masks(model: nn.Module, masks: Masks) -> None:
    """Make every dead entry zero, in place."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in masks:
                parameter.mul_(masks[name])


def save_masks(masks: Masks, path: Path) -> None:
    """Keep masks as one safetensors file, one bit an entry; the file is whole or not there."""
    packed = {name: np.packbits(mask.cpu().numpy().reshape(-1)) for name, mask in masks.items()}
    shapes = {name: ",".join(map(str, mask.shape)) for name, mask in masks.items()}
    part = path.with_name(f"{path.name}.part")
    save_file(packed, part, metadata=shapes)
    part.replace(path)


def load_masks(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """The masks in a file of `save_masks`.

    Raises:
        ConfigError: the file cannot be read, or holds masks of another model.
    """
    try:
        packed = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{path} is no file of masks ({error}); expected one that pruning wrote: check the path"
        ) from error
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    masks = {}
    for name, bits in packed.items():
        shape = shapes.get(name)
        if shape is None or len(bits) != -(-shape.numel() // 8):
            raise ConfigError(
                f"{path} has a mask of {name!r} with {8 * len(bits)} bits; the model has "
                f"{sorted(shapes)[:5]}...: use the masks of this model"
            )
        entries = np.unpackbits(bits, count=shape.numel()).astype(np.bool_)
        masks[name] = torch.from_numpy(entries).view(shape)
    return masks


def kept_share(masks: Masks, names: Iterable[str] | None = None) -> float:
    """The share of entries that live, over these tensors (None: all that have a mask)."""
    chosen = [masks[name] for name in (masks if names is None else names)]
    return sum(int(mask.sum()) for mask in chosen) / max(1, sum(mask.numel() for mask in chosen))
