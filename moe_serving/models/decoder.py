"""The decoder language model: Mixtral's architecture, trained in batches, served in rows."""

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from moe_serving.layers.gating import Choice
from moe_serving.layers.initial import draw_normal
from moe_serving.layers.moe import MoELayer
from moe_serving.models.attention import rotary_angles
from moe_serving.models.blocks import Block, RotaryAttention, embedding, moe_layer
from moe_serving.models.config import DecoderConfig, check
from moe_serving.models.rows import KVCache, group_rows


class DecoderLM(nn.Module):
    """Tokens to the logits of the next one."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        check(config)
        self.config = config
        self.embedding = embedding(config.vocabulary_size, config.d_model)
        draw_normal(self.embedding.weight, config.d_model)
        blocks = (_block(config, number) for number in range(config.n_layers))
        self.blocks = cast("Sequence[Block]", nn.ModuleList(blocks))
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.head = nn.Linear(config.d_model, config.vocabulary_size, bias=False)
        if config.is_tied:
            self.head.weight = self.embedding.weight

    def moe_layers(self) -> Iterator[MoELayer]:
        """The expert layers by their number."""
        return (block.moe for block in self.blocks)

    def forward(self, tokens_BL: Tensor, choices: list[Choice] | None = None) -> Tensor:
        """Logits [B, L, V] of the token after each; gradients flow."""
        positions = torch.arange(tokens_BL.shape[1], device=tokens_BL.device)
        cosine, sine = rotary_angles(self.config.d_head, self.config.rope_base, positions)
        x_BLD = self.embedding(tokens_BL)
        for block in self.blocks:
            x_BLD = block(x_BLD, cosine, sine, choices, is_causal=True)
        logits: Tensor = self.head(self.norm(x_BLD))
        return logits

    def new_cache(self, n_slots: int, max_length: int | None = None) -> KVCache:
        """A cache for this many sequences at a time."""
        config, weight = self.config, self.embedding.weight
        length = min(max_length or config.max_length, config.max_length)
        return KVCache(
            config.n_layers,
            n_slots,
            config.n_kv_heads,
            length,
            config.d_head,
            device=weight.device,
            dtype=weight.dtype,
        )

    @torch.inference_mode()
    def step(
        self,
        tokens_N: Tensor,
        positions_N: Tensor,
        slots_N: Tensor,
        cache: KVCache,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Logits [N, V] after each row, prompts and going sequences mixed.

        Args:
            tokens_N: tokens of the rows.
            positions_N: where each stands in its sequence; what is before it was in earlier steps.
            slots_N: which sequence of the cache each belongs to.
            cache: what earlier steps left; this one's keys and values are added.
            wanted: rows whose logits are wanted, all if None. A prompt needs only its last.

        Raises:
            DataError: Rows that the cache has no place for, or not in order.
        """
        rows = group_rows(positions_N, slots_N, cache.n_slots, cache.max_length)
        angles = rotary_angles(self.config.d_head, self.config.rope_base, positions_N)
        x_ND = self.embedding(tokens_N)
        for layer, block in enumerate(self.blocks):
            x_ND = block.step(x_ND, angles, layer, rows, cache)
        if wanted is not None:
            x_ND = x_ND[wanted]
        logits: Tensor = self.head(self.norm(x_ND))
        return logits


def _block(config: DecoderConfig, number: int) -> Block:
    attention = RotaryAttention(config.d_model, config.n_heads, config.n_kv_heads, config.d_head)
    return Block(attention, moe_layer(config, number), config.norm_eps)
