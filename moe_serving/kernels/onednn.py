"""Experts whose weights oneDNN has laid out for its own product, once.

Where experts live, at a few to a few hundred rows, torch's product of a plain f32 matrix is
well below what the core can do, for MKL lays the weights out anew each time (20 to 30 % on a
core with AVX2, 18 to 45 % with AVX-512). Packed weights serve every number of rows; the packing
is told none, for a hint of one row halves the speed at 4 to 16. The two operations are private
to torch (its compiler freezes models with them), so they are looked for and checked against
`F.linear` before they are used.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_serving.layers.experts import Activation, ExpertWeights

_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class OneDNNExpert:
    """An expert with both matrices packed. The activation of `relu` and `gelu` is fused."""

    w_in: Tensor
    w_out: Tensor
    d_expert: int
    activation: Activation
    size_bytes: int

    def __call__(self, x_MD: Tensor) -> Tensor:
        """Two packed products and the activation."""
        if self.activation == "swiglu":
            h_MR = _linear(x_MD.float(), self.w_in)
            h_MF = F.silu(h_MR[:, : self.d_expert]).mul_(h_MR[:, self.d_expert :])
        else:
            h_MF = _linear(x_MD.float(), self.w_in, self.activation)
        return _linear(h_MF, self.w_out).to(x_MD.dtype)


def pack_onednn(weights: ExpertWeights, activation: Activation) -> OneDNNExpert:
    """Lay both matrices out anew; costs about the time of reading them ten times."""
    w_in, w_out = (_pack(w.detach().float().contiguous()) for w in weights)
    size_bytes = sum(4 * w.numel() for w in weights)
    return OneDNNExpert(w_in, w_out, weights.w_out_DF.shape[1], activation, size_bytes)


def is_onednn_usable() -> bool:
    """Whether torch has the operations here and they agree with `F.linear`."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 40, generator=generator)
    try:
        packed = _pack(weight)
        return all(_agrees(rows, weight, packed, generator) for rows in (1, 5, 33))
    except (AttributeError, RuntimeError):
        return False


def _agrees(rows: int, weight: Tensor, packed: Tensor, generator: torch.Generator) -> bool:
    x = torch.randn(rows, weight.shape[1], generator=generator)
    pairs = (
        (_linear(x, packed), F.linear(x, weight)),
        (_linear(x, packed, "relu"), F.relu(F.linear(x, weight))),
        (_linear(x, packed, "gelu"), F.gelu(F.linear(x, weight))),
    )
    return all(torch.allclose(a, b, rtol=_TOLERANCE, atol=10 * _TOLERANCE) for a, b in pairs)


def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)  # noqa: SLF001
    return packed


def _linear(x: Tensor, packed: Tensor, activation: str = "none") -> Tensor:
    algorithm = "none" if activation == "gelu" else ""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, None, activation, [], algorithm)  # noqa: SLF001
    return y
