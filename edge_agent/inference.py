"""Inference on the device: an ONNX model, exchanged without a gap. No torch."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from federation.errors import DataError, StoreError


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A model with all that belongs to it, so that a swap exchanges everything at once."""

    run: Callable[[NDArray[np.float32]], NDArray[np.float32]]
    sample_shape: tuple[int, ...]
    labels: tuple[str, ...]


class Predictor:
    """Predicts with the newest model; `predict` and `swap` may run on different threads."""

    def __init__(self, path: Path | str) -> None:
        """Load a model.

        Raises:
            StoreError: a file that is absent, or is not a model with `x` and `logits`.
        """
        self._loaded = _load(Path(path))

    @property
    def labels(self) -> tuple[str, ...]:
        """What the classes are called, in the order of the logits (empty: not said)."""
        return self._loaded.labels

    def predict(self, x: NDArray[Any]) -> NDArray[np.float32]:
        """The logits (N, classes) of samples (N, ...), N >= 1, shaped as training takes them.

        A sample may also come flat, or without dimensions of one; a model of flat samples takes
        any shape of as many numbers.

        Raises:
            DataError: no samples, or samples of another shape than the model takes.
        """
        return _infer(self._loaded, x)

    def classify(self, x: NDArray[Any]) -> list[str]:
        """The label of each sample; the number of the class where labels are not said.

        Raises:
            DataError: as `predict`.
        """
        loaded = self._loaded
        classes = _infer(loaded, x).argmax(axis=1)
        return [loaded.labels[c] if loaded.labels else str(c) for c in classes]

    def swap(self, path: Path | str) -> None:
        """Predict with another model from now on; calls under way finish with the old one.

        Raises:
            StoreError: as at first; the old model stays.
        """
        self._loaded = _load(Path(path))


def _infer(loaded: _Loaded, x: NDArray[Any]) -> NDArray[np.float32]:
    samples = np.asarray(x, np.float32)
    shape = loaded.sample_shape
    if samples.size and samples.ndim > 1 and _is_alike(samples.shape[1:], shape):
        samples = samples.reshape(-1, *shape)
    if samples.shape[1:] != shape or samples.size == 0 or samples.ndim == 0:
        raise DataError(
            f"samples have shape {samples.shape}; the model takes (N, "
            f"{', '.join(map(str, shape))}): give one sample or more, the samples first"
        )
    return loaded.run(samples)


def _is_alike(given: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a sample of the one shape may be read as the other, as `check_samples` has it."""
    if 1 in (len(given), len(wanted)):
        return math.prod(given) == math.prod(wanted)
    return [size for size in given if size > 1] == [size for size in wanted if size > 1]


def _load(path: Path) -> _Loaded:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    # A device predicts a few samples at a time: a growing arena would only hold memory.
    options.enable_cpu_mem_arena = False
    try:
        # Read here, so that a file replaced later cannot reach the session.
        content = path.read_bytes()
        session = onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
        names = [n.name for n in (*session.get_inputs(), *session.get_outputs())]
        labels = json.loads(session.get_modelmeta().custom_metadata_map.get("labels", "[]"))
    # onnxruntime's errors share no base below Exception.
    except Exception as error:
        raise StoreError(
            f"model file {path} cannot be loaded ({_first_line(error)}); expected an ONNX model: "
            "fetch it again"
        ) from error
    if names != ["x", "logits"] or not isinstance(labels, list):
        raise StoreError(
            f"model file {path} has inputs and outputs {', '.join(names)}; expected x and logits: "
            "export it with headwater"
        )

    def run(samples: NDArray[np.float32]) -> NDArray[np.float32]:
        return session.run(["logits"], {"x": samples})[0]  # type: ignore[no-any-return]

    return _Loaded(run, tuple(session.get_inputs()[0].shape[1:]), tuple(map(str, labels)))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
