"""The encoder-decoder for translation: Switch Transformers' architecture, served in rows."""

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from federation.errors import DataError
from moe_serving.layers.gating import Choice
from moe_serving.layers.initial import draw_normal
from moe_serving.layers.moe import MoELayer
from moe_serving.models.blocks import embedding
from moe_serving.models.config import TranslationConfig, check
from moe_serving.models.rows import KVCache, group_rows
from moe_serving.models.translation_blocks import RelativeBias, TranslationBlock, TranslationCache


class Encoder(nn.Module):
    """The stack that reads the source."""

    def __init__(self, config: TranslationConfig) -> None:
        super().__init__()
        numbers = {layer: number for number, layer in enumerate(config.encoder_moe)}
        self.bias = RelativeBias(config, is_causal=False)
        blocks = (
            TranslationBlock(config, numbers.get(layer), is_decoder=False)
            for layer in range(config.n_encoder_layers)
        )
        self.blocks = cast("Sequence[TranslationBlock]", nn.ModuleList(blocks))
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)

    def forward(self, x_BLD: Tensor, padding_B11L: Tensor, choices: list[Choice] | None) -> Tensor:
        """A whole batch; `padding_B11L` is minus infinity where there is no source."""
        places = torch.arange(x_BLD.shape[1], device=x_BLD.device)
        scores = self.bias(places, places) + padding_B11L
        for block in self.blocks:
            x_BLD = block(x_BLD, scores, None, choices)
        encoded: Tensor = self.norm(x_BLD)
        return encoded


class Decoder(nn.Module):
    """The stack that writes the target."""

    def __init__(self, config: TranslationConfig) -> None:
        super().__init__()
        first = len(config.encoder_moe)
        numbers = {layer: first + number for number, layer in enumerate(config.decoder_moe)}
        self.bias = RelativeBias(config, is_causal=True)
        blocks = (
            TranslationBlock(config, numbers.get(layer), is_decoder=True)
            for layer in range(config.n_decoder_layers)
        )
        self.blocks = cast("Sequence[TranslationBlock]", nn.ModuleList(blocks))
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)

    def forward(
        self, x_BLD: Tensor, source: tuple[Tensor, Tensor], choices: list[Choice] | None
    ) -> Tensor:
        """A whole batch; `source` is the encoder's answer and the scores of its padding."""
        places = torch.arange(x_BLD.shape[1], device=x_BLD.device)
        scores = self.bias(places, places).masked_fill(places > places[:, None], -torch.inf)
        for block in self.blocks:
            x_BLD = block(x_BLD, scores[None], source, choices)
        decoded: Tensor = self.norm(x_BLD)
        return decoded


class EncoderDecoder(nn.Module):
    """Source tokens and the target so far to the logits of the target's next token."""

    def __init__(self, config: TranslationConfig) -> None:
        super().__init__()
        check(config)
        self.config = config
        self.embedding = embedding(config.vocabulary_size, config.d_model)
        draw_normal(self.embedding.weight, 1)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.head = nn.Linear(config.d_model, config.vocabulary_size, bias=False)
        if config.is_tied:
            self.head.weight = self.embedding.weight

    def moe_layers(self) -> Iterator[MoELayer]:
        """The expert layers by their number: the encoder's, then the decoder's."""
        blocks = (*self.encoder.blocks, *self.decoder.blocks)
        return (block.moe for block in blocks if isinstance(block.moe, MoELayer))

    def forward(
        self, source_BS: Tensor, target_BL: Tensor, choices: list[Choice] | None = None
    ) -> Tensor:
        """Logits [B, L, V] of the token after each of the target; gradients flow.

        The source is padded with `pad_id`; the target begins with `start_id`.
        """
        is_padding = (source_BS == self.config.pad_id)[:, None, None, :]
        padding_B11S = torch.zeros_like(is_padding, dtype=self.embedding.weight.dtype)
        padding_B11S = padding_B11S.masked_fill(is_padding, -torch.inf)
        source = self.encoder(self.embedding(source_BS), padding_B11S, choices)
        x_BLD = self.decoder(self.embedding(target_BL), (source, padding_B11S), choices)
        return self._logits(x_BLD)

    def new_cache(self, n_slots: int, max_length: int | None = None) -> TranslationCache:
        """A cache for this many translations at a time."""
        config, weight = self.config, self.embedding.weight
        length = min(max_length or config.max_length, config.max_length)
        own, sources = (
            KVCache(
                config.n_decoder_layers,
                n_slots,
                config.n_heads,
                length,
                config.d_head,
                device=weight.device,
                dtype=weight.dtype,
            )
            for _ in range(2)
        )
        return TranslationCache(own, sources)

    @torch.inference_mode()
    def encode(
        self, tokens_N: Tensor, positions_N: Tensor, slots_N: Tensor, cache: TranslationCache
    ) -> None:
        """Read whole sources, several at a time, and keep for each slot what its decoder needs.

        Raises:
            DataError: Rows that the cache has no place for, not in order, or not from position 0.
        """
        rows = group_rows(positions_N, slots_N, cache.sources.n_slots, cache.sources.max_length)
        runs = (*rows.long, *(run for group in rows.single for run in group))
        for run in runs:
            if run.first:
                raise DataError(f"the source of slot {run.slot} begins at {run.first}, not at 0")
        x_ND = self.embedding(tokens_N)
        for block in self.encoder.blocks:
            x_ND = block.step_source(x_ND, runs, self.encoder.bias)
        x_ND = self.encoder.norm(x_ND)
        for layer, block in enumerate(self.decoder.blocks):
            cache.sources.write(layer, rows, *block.source_memory(x_ND))
        for run in runs:
            cache.source_lengths[run.slot] = run.rows

    @torch.inference_mode()
    def step(
        self,
        tokens_N: Tensor,
        positions_N: Tensor,
        slots_N: Tensor,
        cache: TranslationCache,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Logits [N, V] after each row of the targets; the arguments are `DecoderLM.step`'s.

        The sources of the slots were encoded before; position 0 holds `start_id`.
        """
        rows = group_rows(positions_N, slots_N, cache.own.n_slots, cache.own.max_length)
        x_ND = self.embedding(tokens_N)
        for layer, block in enumerate(self.decoder.blocks):
            x_ND = block.step(x_ND, layer, rows, cache, self.decoder.bias)
        if wanted is not None:
            x_ND = x_ND[wanted]
        return self._logits(self.decoder.norm(x_ND))

    def _logits(self, x: Tensor) -> Tensor:
        # T5 scales what meets the embedding again (arXiv:1910.10683, as its first code does).
        scale = self.config.d_model**-0.5 if self.config.is_tied else 1.0
        logits: Tensor = self.head(x * scale)
        return logits
