"""Real checkpoints: Mixtral's and Switch Transformers' folders as Hugging Face lays them out.

Only `config.json` and safetensors files are read, one or several with an index; never a
pickled `pytorch_model.bin`.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from federation.errors import ConfigError, StoreError
from moe_serving.checkpoint import State, check_finite, fill
from moe_serving.models.config import DecoderConfig, ModelConfig, TranslationConfig, check
from moe_serving.models.families import Model, build

Name: TypeAlias = str
Sources: TypeAlias = dict[Name, Name | list[list[Name]]]
"""Our tensor: their tensor; or, by expert, their tensors to put one under the other."""

_SWITCH_MAX_LENGTH = 512
_SWITCH_ACTIVATIONS = {"relu": "relu", "gelu": "gelu"}


class _Rope(msgspec.Struct):
    rope_theta: float = 10_000.0
    rope_type: str = "default"


class _Mixtral(msgspec.Struct, tag="mixtral", tag_field="model_type"):
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_local_experts: int
    num_experts_per_tok: int
    max_position_embeddings: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    sliding_window: int | None = None
    rope_theta: float | None = None
    rope_parameters: _Rope | None = None


class _Switch(msgspec.Struct, tag="switch_transformers", tag_field="model_type"):
    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    num_experts: int
    num_decoder_layers: int | None = None
    encoder_sparse_step: int = 0
    decoder_sparse_step: int = 0
    dense_act_fn: str = "relu"
    layer_norm_epsilon: float = 1e-6
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    router_bias: bool = False
    tie_word_embeddings: bool = True
    pad_token_id: int = 0
    eos_token_id: int = 1
    decoder_start_token_id: int | None = None


def load_huggingface(folder: Path, *, dtype: torch.dtype = torch.float32) -> Model:
    """Build the model of a Hugging Face folder; `checkpoint.save` then writes it as ours.

    Departs from the original: Switch drops what exceeds `expert_capacity`; here nothing is
    dropped, so answers are equal where theirs drop nothing.

    Raises:
        StoreError: Another family, an option that we do not have, or files that are absent,
            damaged or not of this shape.
    """
    config, sources = _translated(folder)
    with torch.device("meta"):
        model = build(config)
    if not isinstance(model.config, DecoderConfig | TranslationConfig):
        raise TypeError("only language models and translators come from there")
    tensors = _Tensors(folder)
    state: State = {}
    for name, expected in model.state_dict().items():
        if name == "head.weight" and model.config.is_tied:
            continue
        state[name] = _gathered(tensors, sources[name]).to(dtype)
        if state[name].shape != expected.shape:
            raise StoreError(
                f"{folder}: what should be {name} is {list(state[name].shape)}; "
                f"config.json makes it {list(expected.shape)}"
            )
        check_finite(f"{folder}: {name}", state[name])
    fill(model, state)
    return model


class _Tensors:
    """The tensors of a folder by name, wherever its index says they are."""

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        self._folder = folder
        self._files: dict[str, str] | None = None
        if index.exists():
            self._files = _decoded(index, dict[str, Any]).get("weight_map", {})

    def read(self, name: Name) -> Tensor:
        file = "model.safetensors" if self._files is None else self._files.get(name)
        if file is None:
            raise StoreError(f"{self._folder} lacks {name}")
        path = self._folder / Path(file).name
        try:
            with safe_open(path, framework="pt") as opened:
                tensor: Tensor = opened.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise StoreError(f"{path}: {name} cannot be read: {error}") from error
        return tensor.clone()


def _gathered(tensors: _Tensors, source: Name | list[list[Name]]) -> Tensor:
    if isinstance(source, str):
        return tensors.read(source)
    try:
        return torch.stack([torch.cat([tensors.read(n) for n in names]) for names in source])
    except RuntimeError as error:
        raise StoreError(f"experts from {source[0][0]} on differ in shape: {error}") from error


def _decoded(path: Path, kind: Any) -> Any:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise StoreError(
            f"{path} describes no Mixtral or Switch Transformers model: {error}"
        ) from error


def _translated(folder: Path) -> tuple[ModelConfig, Sources]:
    path = folder / "config.json"
    record: _Mixtral | _Switch = _decoded(path, _Mixtral | _Switch)
    config: DecoderConfig | TranslationConfig
    if isinstance(record, _Mixtral):
        config = _decoder_config(path, record)
        sources = dict(_decoder_sources(config))
    else:
        config = _translation_config(path, record)
        sources = dict(_translation_sources(config))
    try:
        check(config)
    except ConfigError as error:
        raise StoreError(f"{path}: {error}") from error
    return config, sources


def _demand(path: Path, option: str, *, value: object, only: Callable[[Any], bool]) -> None:
    if not only(value):
        raise StoreError(f"{path} sets {option} to {value!r}, which is not supported")


def _decoder_config(path: Path, record: _Mixtral) -> DecoderConfig:
    rope = record.rope_parameters or _Rope(record.rope_theta or 10_000.0)
    window = record.sliding_window
    longest = record.max_position_embeddings
    _demand(path, "hidden_act", value=record.hidden_act, only=lambda v: v == "silu")
    _demand(path, "rope_type", value=rope.rope_type, only=lambda v: v == "default")
    _demand(path, "sliding_window", value=window, only=lambda v: v is None or v >= longest)
    return DecoderConfig(
        vocabulary_size=record.vocab_size,
        d_model=record.hidden_size,
        n_layers=record.num_hidden_layers,
        n_heads=record.num_attention_heads,
        n_kv_heads=record.num_key_value_heads or record.num_attention_heads,
        d_head=record.head_dim or record.hidden_size // record.num_attention_heads,
        d_expert=record.intermediate_size,
        n_experts=record.num_local_experts,
        top_k=record.num_experts_per_tok,
        max_length=longest,
        is_tied=record.tie_word_embeddings,
        rope_base=rope.rope_theta,
        norm_eps=record.rms_norm_eps,
    )


def _decoder_sources(config: DecoderConfig) -> Iterator[tuple[Name, Name | list[list[Name]]]]:
    yield "embedding.weight", "model.embed_tokens.weight"
    yield "norm.weight", "model.norm.weight"
    yield "head.weight", "lm_head.weight"
    for layer in range(config.n_layers):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        yield f"{ours}.attention_norm.weight", f"{theirs}.input_layernorm.weight"
        yield f"{ours}.moe_norm.weight", f"{theirs}.post_attention_layernorm.weight"
        for part in "qkvo":
            yield f"{ours}.attention.{part}.weight", f"{theirs}.self_attn.{part}_proj.weight"
        moe = f"{theirs}.block_sparse_moe"
        experts = [f"{moe}.experts.{e}" for e in range(config.n_experts)]
        yield f"{ours}.moe.router.weight", f"{moe}.gate.weight"
        yield (
            f"{ours}.moe.experts.w_in_ERD",
            [[f"{e}.w1.weight", f"{e}.w3.weight"] for e in experts],
        )
        yield f"{ours}.moe.experts.w_out_EDF", [[f"{e}.w2.weight"] for e in experts]


def _translation_config(path: Path, record: _Switch) -> TranslationConfig:
    act = record.dense_act_fn
    _demand(path, "dense_act_fn", value=act, only=lambda v: v in _SWITCH_ACTIVATIONS)
    _demand(path, "router_bias", value=record.router_bias, only=lambda v: not v)
    n_decoder = record.num_decoder_layers or record.num_layers
    return TranslationConfig(
        vocabulary_size=record.vocab_size,
        d_model=record.d_model,
        n_heads=record.num_heads,
        d_head=record.d_kv,
        d_expert=record.d_ff,
        n_encoder_layers=record.num_layers,
        n_decoder_layers=n_decoder,
        encoder_moe=_sparse(record.num_layers, record.encoder_sparse_step),
        decoder_moe=_sparse(n_decoder, record.decoder_sparse_step),
        n_experts=record.num_experts,
        top_k=1,
        max_length=_SWITCH_MAX_LENGTH,
        activation="gelu" if act == "gelu" else "relu",
        is_tied=record.tie_word_embeddings,
        relative_buckets=record.relative_attention_num_buckets,
        relative_distance=record.relative_attention_max_distance,
        norm_eps=record.layer_norm_epsilon,
        pad_id=record.pad_token_id,
        start_id=record.decoder_start_token_id or record.pad_token_id,
        end_id=record.eos_token_id,
    )


def _sparse(n_layers: int, step: int) -> tuple[int, ...]:
    """Which layers have experts: each, or the second of every `step`."""
    if step <= 1:
        return tuple(range(n_layers)) if step == 1 else ()
    return tuple(layer for layer in range(n_layers) if layer % step == 1)


def _translation_sources(
    config: TranslationConfig,
) -> Iterator[tuple[Name, Name | list[list[Name]]]]:
    yield "embedding.weight", "shared.weight"
    yield "head.weight", "lm_head.weight"
    stacks = (
        ("encoder", config.n_encoder_layers, config.encoder_moe),
        ("decoder", config.n_decoder_layers, config.decoder_moe),
    )
    for stack, n_layers, moe in stacks:
        first = f"{stack}.block.0.layer.0.SelfAttention"
        yield f"{stack}.bias.weight", f"{first}.relative_attention_bias.weight"
        yield f"{stack}.norm.weight", f"{stack}.final_layer_norm.weight"
        for layer in range(n_layers):
            n_experts = config.n_experts if layer in moe else 0
            yield from _block_sources(stack, layer, n_experts)


def _block_sources(
    stack: str, layer: int, n_experts: int
) -> Iterator[tuple[Name, Name | list[list[Name]]]]:
    ours, theirs = f"{stack}.blocks.{layer}", f"{stack}.block.{layer}.layer"
    yield f"{ours}.attention_norm.weight", f"{theirs}.0.layer_norm.weight"
    for part in "qkvo":
        yield f"{ours}.attention.{part}.weight", f"{theirs}.0.SelfAttention.{part}.weight"
    last = 1
    if stack == "decoder":
        last = 2
        yield f"{ours}.source_norm.weight", f"{theirs}.1.layer_norm.weight"
        for part in "qkvo":
            source = f"{theirs}.1.EncDecAttention.{part}.weight"
            yield f"{ours}.source_attention.{part}.weight", source
    yield f"{ours}.moe_norm.weight", f"{theirs}.{last}.layer_norm.weight"
    mlp = f"{theirs}.{last}.mlp"
    if not n_experts:
        yield f"{ours}.moe.w_in.weight", f"{mlp}.wi.weight"
        yield f"{ours}.moe.w_out.weight", f"{mlp}.wo.weight"
        return
    experts = [f"{mlp}.experts.expert_{e}" for e in range(n_experts)]
    yield f"{ours}.moe.router.weight", f"{mlp}.router.classifier.weight"
    yield f"{ours}.moe.experts.w_in_ERD", [[f"{e}.wi.weight"] for e in experts]
    yield f"{ours}.moe.experts.w_out_EDF", [[f"{e}.wo.weight"] for e in experts]
