"""8-bit weights in blocks of a row, and ONNX Runtime graphs over them.

A block of 128 weights of one row shares a scale; a byte is the weight over it, plus 128. The
graphs are a few hundred bytes: the weights are handed to a session beside the graph, so they
are in memory once, as the session lays them out. The session's products quantise activations
by row and block, so what a row gets hardly depends on the rows beside it (1.6e-5 on average).
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from torch import Tensor

from federation.errors import ConfigError

INT8_ACTIVATIONS = 4
"""The operators' `accuracy_level`: activations are quantised to 8 bits, by row and block."""

_MIDDLE = 128
_OPSETS = (("", 21), ("com.microsoft", 1))
_IR_VERSION = 10

Arrays: TypeAlias = Mapping[str, NDArray[Any]]


def block_of(width: int) -> int:
    """The largest block that divides rows of this width: 128, 64, 32 or 16.

    Raises:
        ConfigError: None of them does.
    """
    for size in (128, 64, 32, 16):
        if width % size == 0:
            return size
    raise ConfigError(
        f"rows of {width} weights cannot be cut into blocks of 16 or more; kernel `int8` needs none"
    )


def quantise(weight: Tensor, block: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """[..., n, k] to bytes [..., n, k / block, block] and scales [..., n, k / block]."""
    values = weight.detach().float().numpy()
    blocks = values.reshape(*values.shape[:-1], -1, block)
    scales = np.abs(blocks).max(axis=-1) / (_MIDDLE - 1)
    scales[scales == 0] = 1
    rounded = np.rint(blocks / scales[..., None]) + _MIDDLE
    return rounded.astype(np.uint8), scales.astype(np.float32)


def session(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Sequence[str | int]],
    output: tuple[str, Sequence[str | int]],
    weights: Arrays,
) -> onnxruntime.InferenceSession:
    """A session of one thread over these nodes; it keeps what it needs of the weights."""
    values = [_value(name, shape) for name, shape in inputs.items()]
    tensors = [_elsewhere(name, array) for name, array in weights.items()]
    graph = onnx.helper.make_graph(nodes, "experts", values, [_value(*output)], tensors)
    opsets = [onnx.helper.make_opsetid(*opset) for opset in _OPSETS]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    options.log_severity_level = 3
    handed = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in weights.values()]
    options.add_external_initializers(list(weights), handed)
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _value(name: str, shape: Sequence[str | int]) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)


def _elsewhere(name: str, array: NDArray[Any]) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name=name, dims=array.shape)
    tensor.data_type = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="handed over beside the graph")
    return tensor
