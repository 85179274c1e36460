"""Torch to ONNX, checked: what is exported computes what was trained."""

import io
import json
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import nn

from federation.errors import TrainingError
from federation.learning.models import build_model, input_shape, load_weights
from federation.protocol.codec import Weights
from federation.protocol.messages import ModelSpec

INPUT, OUTPUT, LABELS = "x", "logits", "labels"
"""The names of the graph's input and output, and the metadata key of the labels (JSON)."""

PARITY = 1e-4
"""The largest difference of logits let through, absolute below 1 and relative above."""

_OPSET = 17


def export_onnx(
    spec: ModelSpec, weights: Weights, *, example: NDArray[Any], labels: Sequence[str] = ()
) -> bytes:
    """The model as an ONNX file: `x` (batch, ...) float32 to `logits` (batch, classes).

    Its logits on the example are compared with torch's, for the whole batch and for one
    sample alone.

    Args:
        spec: which model.
        weights: its weights.
        example: a few real samples, first dimension N >= 1, as the model takes them or flat.
        labels: what the classes are called; they travel in the file.

    Raises:
        ConfigError: a model the zoo does not have.
        TrainingError: weights, example or labels that do not fit the model, or logits that
            differ by more than `PARITY`.
    """
    samples = _as_input(spec, example)
    model = load_weights(build_model(spec), weights).eval()
    with torch.inference_mode():
        expected = model(torch.tensor(samples)).numpy()
    if labels and len(labels) != expected.shape[1]:
        raise TrainingError(
            f"{len(labels)} labels for {expected.shape[1]} classes; expected one each, or none"
        )
    content = _with_labels(_trace(model, samples), labels)
    _check_parity(content, samples, expected)
    _check_parity(content, samples[:1], expected[:1])
    return content


def _as_input(spec: ModelSpec, example: NDArray[Any]) -> NDArray[np.float32]:
    shape = input_shape(spec)
    try:
        samples = np.asarray(example, np.float32).reshape(-1, *shape)
    except ValueError:
        samples = np.empty((0, *shape), np.float32)
    if len(samples) == 0 or len(samples) != len(example):
        raise TrainingError(
            f"example has shape {np.shape(example)}; model {spec.name!r} takes samples of shape "
            f"{shape}: give one sample or more"
        )
    return samples


def _trace(model: nn.Module, samples: NDArray[np.float32]) -> bytes:
    file = io.BytesIO()
    # The exporter that records a run, not the one built on torch.export: for these models
    # it takes a tenth of the time and 140 MB less, and the check below trusts neither.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        torch.onnx.export(
            model,
            (torch.tensor(samples[:2]),),
            file,  # type: ignore[arg-type]  # this exporter also takes an open file
            dynamo=False,
            opset_version=_OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_axes={INPUT: {0: "batch"}, OUTPUT: {0: "batch"}},
        )
    return file.getvalue()


def _with_labels(content: bytes, labels: Sequence[str]) -> bytes:
    proto = onnx.load_from_string(content)
    onnx.helper.set_model_props(proto, {LABELS: json.dumps(list(labels))})
    onnx.checker.check_model(proto)
    return bytes(proto.SerializeToString())


def _check_parity(
    content: bytes, samples: NDArray[np.float32], expected: NDArray[np.float32]
) -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    logits = session.run([OUTPUT], {INPUT: samples})[0]
    difference = float(np.abs(logits - expected).max())
    allowed = PARITY * max(1.0, float(np.abs(expected).max()))
    if not difference <= allowed:
        raise TrainingError(
            f"the exported model's logits differ by {difference:.2g} on {len(samples)} samples; "
            f"expected at most {allowed:.2g}: do not release it"
        )
