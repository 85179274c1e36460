"""The classifier of sensor windows: expert blocks over patches of the window."""

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from moe_serving.layers.gating import Choice
from moe_serving.layers.moe import MoELayer
from moe_serving.models.attention import rotary_angles
from moe_serving.models.blocks import Block, RotaryAttention, moe_layer
from moe_serving.models.config import ClassifierConfig, check

_ROPE_BASE = 10_000.0


class WindowClassifier(nn.Module):
    """Windows of C channels and L samples to the logits of their classes.

    The window is cut into patches of all channels (PatchTST, arXiv:2211.14730, cuts too, but
    each channel by itself); every patch sees all others, and their mean is classified.
    """

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        check(config)
        self.config = config
        d_head = config.d_model // config.n_heads
        self.patch = nn.Linear(config.n_channels * config.patch_length, config.d_model)
        blocks = (
            Block(
                RotaryAttention(config.d_model, config.n_heads, config.n_heads, d_head),
                moe_layer(config, number),
                config.norm_eps,
            )
            for number in range(config.n_layers)
        )
        self.blocks = cast("Sequence[Block]", nn.ModuleList(blocks))
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.head = nn.Linear(config.d_model, config.n_classes)

    def moe_layers(self) -> Iterator[MoELayer]:
        """The expert layers by their number."""
        return (block.moe for block in self.blocks)

    def forward(self, x_BLC: Tensor, choices: list[Choice] | None = None) -> Tensor:
        """Logits [B, classes] of windows [B, L, C]."""
        config = self.config
        n_patches = config.window_length // config.patch_length
        x_BPD = self.patch(x_BLC.reshape(len(x_BLC), n_patches, -1))
        positions = torch.arange(n_patches, device=x_BLC.device)
        cosine, sine = rotary_angles(config.d_model // config.n_heads, _ROPE_BASE, positions)
        for block in self.blocks:
            x_BPD = block(x_BPD, cosine, sine, choices, is_causal=False)
        logits: Tensor = self.head(self.norm(x_BPD).mean(dim=1))
        return logits
