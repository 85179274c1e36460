"""What a model is built from: frozen records, JSON in a checkpoint's `config.json`."""

from typing import TypeAlias

import msgspec

from federation.errors import ConfigError
from moe_serving.layers.experts import Activation, ExpertShape


class DecoderConfig(msgspec.Struct, frozen=True, kw_only=True, tag="lm", tag_field="kind"):
    """A decoder language model in Mixtral's shape (arXiv:2401.04088).

    Rotary positions, grouped-query attention, RMS norms, an expert layer in every block.
    """

    vocabulary_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_expert: int
    n_experts: int
    top_k: int
    max_length: int
    activation: Activation = "swiglu"
    is_normalised: bool = True
    is_tied: bool = False
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5


class TranslationConfig(
    msgspec.Struct, frozen=True, kw_only=True, tag="translation", tag_field="kind"
):
    """An encoder-decoder in the shape of Switch Transformers (arXiv:2101.03961) and T5.

    Relative positions, attention without scaling, RMS norms; `encoder_moe` and `decoder_moe`
    name the layers whose feed-forward part is an expert layer, the others' is dense.
    """

    vocabulary_size: int
    d_model: int
    n_heads: int
    d_head: int
    d_expert: int
    n_encoder_layers: int
    n_decoder_layers: int
    encoder_moe: tuple[int, ...]
    decoder_moe: tuple[int, ...]
    n_experts: int
    top_k: int
    max_length: int
    activation: Activation = "relu"
    is_normalised: bool = False
    is_tied: bool = True
    relative_buckets: int = 32
    relative_distance: int = 128
    norm_eps: float = 1e-6
    pad_id: int = 0
    start_id: int = 0
    end_id: int = 1


class ClassifierConfig(
    msgspec.Struct, frozen=True, kw_only=True, tag="classifier", tag_field="kind"
):
    """A classifier of sensor windows: patches of the window, expert blocks, the mean, a head."""

    n_channels: int
    window_length: int
    patch_length: int
    n_classes: int
    d_model: int
    n_layers: int
    n_heads: int
    d_expert: int
    n_experts: int
    top_k: int = 1
    activation: Activation = "gelu"
    is_normalised: bool = False
    norm_eps: float = 1e-5


ModelConfig: TypeAlias = DecoderConfig | TranslationConfig | ClassifierConfig


def expert_shape(config: ModelConfig) -> ExpertShape:
    """The shape all experts of the model have."""
    return ExpertShape(config.d_model, config.d_expert, config.activation)


def moe_layers(config: ModelConfig) -> int:
    """How many expert layers the model has; they are numbered from 0, an encoder's first."""
    if isinstance(config, TranslationConfig):
        return len(config.encoder_moe) + len(config.decoder_moe)
    return config.n_layers


def check(config: ModelConfig) -> None:
    """Refuse what no model can be built from.

    Raises:
        ConfigError: A size is not positive, or two of them do not go together.
    """
    fields = {name: getattr(config, name) for name in config.__struct_fields__}
    sizes = {name: v for name, v in fields.items() if _is_size(name)}
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"{name} is {size}; it must be at least 1")
    if config.top_k > config.n_experts:
        raise ConfigError(f"top_k is {config.top_k}, but there are {config.n_experts} experts")
    match config:
        case DecoderConfig():
            if config.d_head % 2:
                raise ConfigError(f"d_head is {config.d_head}; rotary positions need it even")
            _check_divides(config.n_kv_heads, config.n_heads, "n_kv_heads", "n_heads")
        case TranslationConfig():
            _check_within(config.encoder_moe, config.n_encoder_layers, "encoder_moe")
            _check_within(config.decoder_moe, config.n_decoder_layers, "decoder_moe")
        case ClassifierConfig():
            _check_divides(
                config.patch_length, config.window_length, "patch_length", "window_length"
            )
            _check_divides(2 * config.n_heads, config.d_model, "twice n_heads", "d_model")


def _is_size(name: str) -> bool:
    sizes = ("n_", "d_", "top_k", "vocabulary_size", "max_length", "window_length", "patch_length")
    return name.startswith(sizes) or name.startswith("relative_")


def _check_divides(part: int, whole: int, part_name: str, whole_name: str) -> None:
    if whole % part:
        raise ConfigError(f"{part_name} is {part}, which does not divide {whole_name}, {whole}")


def _check_within(places: tuple[int, ...], n_layers: int, name: str) -> None:
    if list(places) != sorted(set(places)) or any(not 0 <= p < n_layers for p in places):
        raise ConfigError(
            f"{name} is {list(places)}; it must rise, with layers from 0 to {n_layers - 1}"
        )
