"""One expert in ONNX Runtime: two `MatMulNBits` of 8 bits with the activation between."""

from dataclasses import dataclass
from typing import Any

import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_serving.kernels.blockwise import block_of, quantise, session
from moe_serving.layers.experts import Activation, ExpertWeights, run_expert

_INT8_ACTIVATIONS = 4
"""The operator's `accuracy_level`: activations are quantised to 8 bits, by row and block."""


@dataclass(frozen=True, slots=True)
class NBitsExpert:
    """A session over one expert; about 7 ms to make."""

    session: onnxruntime.InferenceSession
    size_bytes: int

    def __call__(self, x_MD: Tensor) -> Tensor:
        """Run the session on the rows as they lie in memory."""
        (y_MD,) = self.session.run(None, {"x": x_MD.numpy()})
        return torch.from_numpy(y_MD)


def pack_nbits(weights: ExpertWeights, activation: Activation) -> NBitsExpert:
    """Quantise both matrices in blocks along their rows and make the session."""
    arrays: dict[str, NDArray[Any]] = {}
    for name, weight in (("in", weights.w_in_RD), ("out", weights.w_out_DF)):
        block = block_of(weight.shape[1])
        arrays[f"{name}_bytes"], arrays[f"{name}_scales"] = quantise(weight, block)
    d_model = weights.w_in_RD.shape[1]
    nodes = [
        _product("x", "in", "h", weights.w_in_RD),
        *_activation(activation),
        _product("a", "out", "y", weights.w_out_DF),
    ]
    made = session(nodes, {"x": ("M", d_model)}, ("y", ("M", d_model)), arrays)
    return NBitsExpert(made, sum(array.nbytes for array in arrays.values()))


def is_nbits_usable() -> bool:
    """Whether the runtime has the operator and it computes what it should."""
    generator = torch.Generator().manual_seed(0)
    weights = ExpertWeights(
        torch.randn(64, 32, generator=generator), torch.randn(32, 64, generator=generator)
    )
    x = torch.randn(5, 32, generator=generator)
    try:
        y = pack_nbits(weights, "relu")(x)
    except Exception:  # the runtime raises classes of its own for each status
        return False
    exact = run_expert(x, weights, "relu")
    return bool((y - exact).norm() < 0.05 * exact.norm())


def _product(x: str, weight: str, y: str, matrix: Tensor) -> onnx.NodeProto:
    return onnx.helper.make_node(
        "MatMulNBits",
        [x, f"{weight}_bytes", f"{weight}_scales"],
        [y],
        domain="com.microsoft",
        K=matrix.shape[1],
        N=matrix.shape[0],
        bits=8,
        block_size=block_of(matrix.shape[1]),
        accuracy_level=_INT8_ACTIVATIONS,
    )


def _activation(activation: Activation) -> list[onnx.NodeProto]:
    node = onnx.helper.make_node
    match activation:
        case "relu":
            return [node("Relu", ["h"], ["a"])]
        case "gelu":
            return [node("Gelu", ["h"], ["a"], domain="com.microsoft")]
        case "swiglu":
            return [
                node("Split", ["h"], ["gate", "up"], axis=1, num_outputs=2),
                node("QuickGelu", ["gate"], ["silu"], domain="com.microsoft", alpha=1.0),
                node("Mul", ["silu", "up"], ["a"]),
            ]
