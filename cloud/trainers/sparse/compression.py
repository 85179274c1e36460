"""One index for all that is kept of a tensor: its living entries as a short vector.

The index is linear (into the tensor's own order) and int32, so that it costs four bytes a
living entry whatever the tensor's dimensions, and parameters, gradients and moments share it
(SAMO, arXiv:2302.05045, section III-B).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from federation.errors import ConfigError

LARGEST_TENSOR = 2**31 - 1
"""A linear index of int32 reaches no further."""


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """The living entries of one tensor; `index` is None where all of them live."""

    shape: torch.Size
    index: Tensor | None

    @property
    def count(self) -> int:
        """How many entries live."""
        return self.shape.numel() if self.index is None else self.index.numel()

    @property
    def index_bytes(self) -> int:
        """What the index takes."""
        return 0 if self.index is None else self.index.numel() * self.index.element_size()

    def compress(self, dense: Tensor) -> Tensor:
        """The living entries of a tensor of this shape, (count,); a view where all live."""
        flat = dense.reshape(-1)
        return flat if self.index is None else flat.index_select(0, self.index)

    def expand_into(self, dense: Tensor, short: Tensor) -> None:
        """Write living entries into a contiguous tensor of this shape; the others become zero."""
        flat = dense.view(-1)
        if self.index is None:
            flat.copy_(short)
        else:
            flat.zero_().index_add_(0, self.index, short)


def kept_of(mask: Tensor | None, shape: torch.Size) -> Kept:
    """The living entries that a mask names; without a mask, all.

    Raises:
        ConfigError: a tensor with more entries than an int32 counts, or a mask of another shape.
    """
    if mask is None:
        return Kept(shape, None)
    if mask.shape != shape or shape.numel() > LARGEST_TENSOR:
        raise ConfigError(
            f"the mask has shape {tuple(mask.shape)} and the tensor {tuple(shape)}; expected the "
            f"same, with at most {LARGEST_TENSOR} entries: use the masks of this model"
        )
    return Kept(shape, mask.reshape(-1).nonzero().view(-1).to(torch.int32))


def kept_in(parameters: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Kept]:
    """The living entries of each of these tensors, in their order.

    Raises:
        ConfigError: a mask of no tensor here, or one that does not fit its tensor.
    """
    if unknown := sorted(masks.keys() - parameters.keys()):
        raise ConfigError(
            f"there is a mask of {unknown[0]!r} and no such parameter; the model has "
            f"{', '.join(list(parameters)[:5])}...: use the masks of this model"
        )
    return {name: kept_of(masks.get(name), p.shape) for name, p in parameters.items()}
