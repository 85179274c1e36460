"""8-bit experts in torch: weights by output row, activations by their own row.

torch's dynamic 8-bit products scale the activations of a whole tensor alike, so what a row gets
depends on the rows beside it (1.7 % on average). Here each row is divided by its own largest
magnitude first and the product gets a fixed scale: integers add up the same way wherever a
row stands, and its answer has the same bits alone and in any batch.

Without VNNI the product adds two 8-bit products in 16 bits, where they saturate. That is found
out at start, and then one side has 7 bits: the activations, or, where a gated activation makes
their tails long, the weights. The operations are torch's quantised ones for x86; where they
are absent the kernel is not usable.
"""

import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from moe_serving.layers.experts import Activation, ExpertWeights, activate

_TINY = 1e-30


@dataclass(frozen=True, slots=True)
class Int8Expert:
    """An expert with both matrices in 8 bits, packed; its activations are made 8-bit by row."""

    w_in: Any
    w_out: Any
    activation: Activation
    levels_in: int
    levels_out: int
    size_bytes: int

    def __call__(self, x_MD: Tensor) -> Tensor:
        """Two integer products; what is between them is float32."""
        dtype, x_MD = x_MD.dtype, x_MD.float()
        scale_M1 = x_MD.abs().amax(dim=1, keepdim=True).clamp_min_(_TINY)
        rows = (x_MD / scale_M1, *_signed(self.levels_in))
        if self.activation == "relu":
            # relu(s h) = s relu(h), and its answer needs no levels below zero
            h_MF = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_relu_output_fp32(
                *rows, self.w_in
            )
            top_M1 = h_MF.amax(dim=1, keepdim=True).clamp_min_(_TINY)
            y_MD = _product(h_MF.div_(top_M1), 1 / self.levels_out, 0, self.w_out)
            return y_MD.mul_(scale_M1.mul_(top_M1)).to(dtype)
        h_MF = activate(_product(*rows, self.w_in).mul_(scale_M1), self.activation)
        top_M1 = h_MF.abs().amax(dim=1, keepdim=True).clamp_min_(_TINY)
        y_MD = _product(h_MF.div_(top_M1), *_signed(self.levels_out), self.w_out)
        return y_MD.mul_(top_M1).to(dtype)


def pack_int8(weights: ExpertWeights, activation: Activation) -> Int8Expert:
    """Quantise each output row to steps of its largest magnitude / 127 (or 63), and pack."""
    size_bytes = sum(w.numel() + 4 * w.shape[0] for w in weights)
    levels = _levels()
    w_in = _pack(weights.w_in_RD.detach().float(), 127)
    if activation == "relu" or levels == 255:
        w_out, levels_out = _pack(weights.w_out_DF.detach().float(), 127), levels
    else:
        w_out, levels_out = _pack(weights.w_out_DF.detach().float(), 63), 255
    return Int8Expert(w_in, w_out, activation, levels, levels_out, size_bytes)


def is_int8_usable() -> bool:
    """Whether torch has the operations here and they compute what they should."""
    try:
        return _levels() > 0
    except (AttributeError, RuntimeError):
        return False


@cache
def _levels() -> int:
    """How many levels activations may have before sums saturate: 255, 127, or 0 if neither."""
    weight = torch.ones(16, 64)
    packed = _pack(weight, 127)
    for levels in (255, 127):
        product = _product(torch.ones(3, 64), 1 / levels, 0, packed)
        if torch.allclose(product, torch.full_like(product, 64.0), rtol=1e-3):
            return levels
    return 0


def _signed(levels: int) -> tuple[float, int]:
    """Scale and zero point of activations from -1 to 1 in so many levels."""
    middle = (levels + 1) // 2
    return 1 / (middle - 1), middle


def _pack(weight: Tensor, steps: int) -> Any:
    scale = weight.abs().amax(dim=1).clamp_min(_TINY) / steps
    quantised = (weight / scale[:, None]).round().to(torch.int8)
    zeros = torch.zeros(len(scale), dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch means to drop this type one day
        per_row = torch._make_per_channel_quantized_tensor(  # noqa: SLF001
            quantised, scale.double(), zeros, 0
        )
    return torch.ops.quantized.linear_prepack(per_row, None)


def _product(x: Tensor, scale: float, zero_point: int, packed: Any) -> Tensor:
    y: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
        x, scale, zero_point, packed
    )
    return y
