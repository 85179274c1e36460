"""One expert as a session of ONNX Runtime, in float32 or with 8-bit weights.

The runtime lays float32 weights out once for its own product, as oneDNN does, through a public
interface; on a machine with AVX2 but no AVX-512 it is the faster of the two at every number
of rows. In 8 bits each product is a `MatMulNBits`, which is faster still where reading weights
is what takes the time.
"""

from dataclasses import dataclass
from typing import Any

import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_serving.kernels.blockwise import INT8_ACTIVATIONS, block_of, quantise, session
from moe_serving.layers.experts import Activation, ExpertWeights, Pack, run_expert


@dataclass(frozen=True, slots=True)
class SessionExpert:
    """A session over one expert; about 7 ms to make, 15 µs to enter."""

    session: onnxruntime.InferenceSession
    size_bytes: int

    def __call__(self, x_MD: Tensor) -> Tensor:
        """Run the session on the rows as they lie in memory."""
        (y_MD,) = self.session.run(["y"], {"x": x_MD.float().numpy()})
        return torch.from_numpy(y_MD).to(x_MD.dtype)


def pack_runtime(weights: ExpertWeights, activation: Activation) -> SessionExpert:
    """Make the session; it keeps the weights once, in its own layout."""
    arrays = {
        name: weight.detach().float().contiguous().numpy()
        for name, weight in zip(("in", "out"), weights, strict=True)
    }
    nodes = [
        onnx.helper.make_node("Gemm", ["x", "in"], ["h"], transB=1),
        *_activation(activation),
        onnx.helper.make_node("Gemm", ["a", "out"], ["y"], transB=1),
    ]
    return _expert(nodes, weights, arrays)


def pack_nbits(weights: ExpertWeights, activation: Activation) -> SessionExpert:
    """Quantise both matrices in blocks along their rows and make the session."""
    arrays: dict[str, NDArray[Any]] = {}
    for name, weight in zip(("in", "out"), weights, strict=True):
        block = block_of(weight.shape[1])
        arrays[f"{name}_bytes"], arrays[f"{name}_scales"] = quantise(weight, block)
    nodes = [
        _product("x", "in", "h", weights.w_in_RD),
        *_activation(activation),
        _product("a", "out", "y", weights.w_out_DF),
    ]
    return _expert(nodes, weights, arrays)


def is_runtime_usable() -> bool:
    """Whether the runtime takes our graphs and agrees with torch."""
    return _agrees(pack_runtime, 1e-5)


def is_nbits_usable() -> bool:
    """Whether the runtime has the 8-bit product and it is close to the exact one."""
    return _agrees(pack_nbits, 0.1)


def _expert(
    nodes: list[onnx.NodeProto], weights: ExpertWeights, arrays: dict[str, NDArray[Any]]
) -> SessionExpert:
    d_model = weights.w_in_RD.shape[1]
    made = session(nodes, {"x": ("M", d_model)}, ("y", ("M", d_model)), arrays)
    return SessionExpert(made, sum(array.nbytes for array in arrays.values()))


def _agrees(pack: Pack, tolerance: float) -> bool:
    generator = torch.Generator().manual_seed(0)
    w_in, w_out = (torch.randn(shape, generator=generator) for shape in ((128, 32), (32, 64)))
    weights, x = ExpertWeights(w_in, w_out), torch.randn(5, 32, generator=generator)
    try:
        y = pack(weights, "swiglu")(x)
    except Exception:  # the runtime raises classes of its own for each status
        return False
    exact = run_expert(x, weights, "swiglu")
    return bool((y - exact).norm() < tolerance * exact.norm())


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
        accuracy_level=INT8_ACTIVATIONS,
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
