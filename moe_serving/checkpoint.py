"""A model in a folder: `config.json` and `model.safetensors`, checked in every respect.

The experts of a layer are one tensor [E, P]: expert e's first matrix, then its second, in C
order. So one expert is one range of bytes in the file, and whoever keeps only some experts in
memory reads one with a single positional read (`expert_ranges`).
"""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from federation.errors import ConfigError, StoreError
from moe_serving.layers.experts import ExpertShape, ExpertStore, GroupedExperts
from moe_serving.models.classifier import WindowClassifier
from moe_serving.models.config import ModelConfig, check, expert_shape
from moe_serving.models.families import Model, build

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

State: TypeAlias = dict[str, Tensor]

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True, slots=True)
class ExpertRanges:
    """Where each expert lies in the file.

    Attributes:
        path: the file.
        shape: what the bytes of one expert mean; `shape.split` makes matrices of them.
        dtype: the type of the weights.
        offsets: byte at which an expert begins, by layer and expert.
        size_bytes: bytes of one expert.
    """

    path: Path
    shape: ExpertShape
    dtype: torch.dtype
    offsets: tuple[tuple[int, ...], ...]
    size_bytes: int


def save(model: Model, folder: Path) -> None:
    """Write the model's record and weights; the folder is made if it is not there.

    Raises:
        StoreError: The model is served from a store and has no weights of its own, or the
            folder cannot be written.
    """
    state: State = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    if _is_tied(model):
        del state["head.weight"]
    for prefix, experts in _experts(model).items():
        if not isinstance(experts, GroupedExperts):
            raise StoreError(f"{prefix} has no weights any more; save a model before serving it")
        matrices = (state.pop(f"{prefix}.w_in_ERD"), state.pop(f"{prefix}.w_out_EDF"))
        state[prefix] = torch.cat([w.flatten(1) for w in matrices], dim=1)
    record = msgspec.json.format(msgspec.json.encode(model.config))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(state, folder / WEIGHTS_FILE)
        (folder / CONFIG_FILE).write_bytes(record + b"\n")
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{folder} cannot be written: {error}") from error


def load(folder: Path, *, store: ExpertStore | None = None) -> Model:
    """Build the model of a folder.

    With a store the experts' bytes are not read: the layers ask the store for them. Without,
    the model is as it was saved and can be trained; `kernels.registry.serve_resident` packs it.

    Raises:
        StoreError: A file is absent, truncated or damaged; a tensor is missing, unknown, of
            another shape or type, or holds values that are not finite.
    """
    model = _build_empty(load_config(folder))
    prefixes = list(_experts(model))
    state = _read(folder / WEIGHTS_FILE, _expected_shapes(model), prefixes if store else ())
    if store is None:
        for prefix in prefixes:
            state |= _split(prefix, state.pop(prefix), model)
    else:
        for layer in model.moe_layers():
            layer.serve_from(store)
    fill(model, state)
    return model


def fill(model: Model, state: State) -> None:
    """Make these tensors the model's parameters, without a copy, and set it to answer."""
    is_tied = _is_tied(model)
    if is_tied:
        state = state | {"head.weight": state["embedding.weight"]}
    model.load_state_dict(state, assign=True)
    if is_tied and not isinstance(model, WindowClassifier):
        model.head.weight = model.embedding.weight
    model.eval()


def load_config(folder: Path) -> ModelConfig:
    """The record of the model in this folder.

    Raises:
        StoreError: It is absent, not JSON, or not the record of a model.
    """
    path = folder / CONFIG_FILE
    try:
        config: ModelConfig = msgspec.json.decode(path.read_bytes(), type=ModelConfig)
        check(config)
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise StoreError(f"{path} is not the record of a model: {error}") from error
    except ConfigError as error:
        raise StoreError(f"{path}: {error}") from error
    return config


def expert_ranges(folder: Path) -> ExpertRanges:
    """Where the experts of a saved model lie.

    Raises:
        StoreError: As `load`, but the values of tensors are not read.
    """
    config = load_config(folder)
    model, path, shape = _build_empty(config), folder / WEIGHTS_FILE, expert_shape(config)
    prefixes = list(_experts(model))
    with _opened(path) as file:
        _check_header(path, file, _expected_shapes(model))
    begin, header = _header(path)
    dtype = _DTYPES[header[prefixes[0]]["dtype"]] if prefixes else torch.float32
    size_bytes = shape.parameters * dtype.itemsize
    starts = [begin + header[prefix]["data_offsets"][0] for prefix in prefixes]
    offsets = tuple(
        tuple(start + expert * size_bytes for expert in range(config.n_experts)) for start in starts
    )
    return ExpertRanges(path, shape, dtype, offsets, size_bytes)


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse a tensor that no answer should come from.

    Raises:
        StoreError: It holds NaN or infinity.
    """
    if not bool(torch.isfinite(tensor).all()):
        raise StoreError(
            f"{name} holds NaN or infinity; the model was saved from a failed training"
        )


def _build_empty(config: ModelConfig) -> Model:
    with torch.device("meta"):
        return build(config)


def _is_tied(model: Model) -> bool:
    return not isinstance(model, WindowClassifier) and model.config.is_tied


def _experts(model: Model) -> dict[str, object]:
    """The experts of every layer, by the name of their tensor in the file."""
    names = {module: name for name, module in model.named_modules()}
    return {f"{names[layer]}.experts": layer.experts for layer in model.moe_layers()}


def _expected_shapes(model: Model) -> dict[str, list[int]]:
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    if _is_tied(model):
        del shapes["head.weight"]
    parameters = expert_shape(model.config).parameters
    for prefix in _experts(model):
        del shapes[f"{prefix}.w_in_ERD"], shapes[f"{prefix}.w_out_EDF"]
        shapes[prefix] = [model.config.n_experts, parameters]
    return shapes


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error}") from error
    except SafetensorError as error:
        raise StoreError(
            f"{path} is no whole safetensors file: {error}; fetch or export it again"
        ) from error


def _check_header(path: Path, file: Any, expected: dict[str, list[int]]) -> None:
    names = set(file.keys())
    if missing := sorted(expected.keys() - names):
        raise StoreError(f"{path} lacks {missing[0]} and {len(missing) - 1} others of the model")
    if unknown := sorted(names - expected.keys()):
        raise StoreError(f"{path} holds {unknown[0]}, which the model has no place for")
    dtypes = set()
    for name, shape in expected.items():
        part = file.get_slice(name)
        dtypes.add(part.get_dtype())
        if part.get_shape() != shape:
            raise StoreError(f"{path}: {name} is {part.get_shape()}; the model needs {shape}")
    if len(dtypes) > 1 or not dtypes <= _DTYPES.keys():
        raise StoreError(
            f"{path} has tensors of {', '.join(sorted(dtypes))}; "
            f"all must be one of {', '.join(_DTYPES)}"
        )


def _read(path: Path, expected: dict[str, list[int]], skipped: Collection[str]) -> State:
    state: State = {}
    with _opened(path) as file:
        _check_header(path, file, expected)
        for name in expected.keys() - set(skipped):
            # A copy: the tensor of a mapped file dies with the file.
            state[name] = file.get_tensor(name).clone()
            check_finite(f"{path}: {name}", state[name])
    return state


def _split(prefix: str, experts_EP: Tensor, model: Model) -> State:
    shape = expert_shape(model.config)
    first = shape.rows_in * shape.d_model
    w_in = experts_EP[:, :first].reshape(-1, shape.rows_in, shape.d_model)
    w_out = experts_EP[:, first:].reshape(-1, shape.d_model, shape.d_expert)
    return {f"{prefix}.w_in_ERD": w_in, f"{prefix}.w_out_EDF": w_out}


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the tensors begin, and what the file says of each. It has been opened before."""
    with path.open("rb") as file:
        size_bytes = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(size_bytes))
    return 8 + size_bytes, header
