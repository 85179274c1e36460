"""The block that decoder and classifier are made of: rotary attention, then experts."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_serving.layers.gating import Choice
from moe_serving.layers.moe import MoELayer
from moe_serving.models.attention import attend_rows, rotate
from moe_serving.models.config import ModelConfig, expert_shape
from moe_serving.models.rows import KVCache, Rows


def moe_layer(config: ModelConfig, number: int) -> MoELayer:
    """Expert layer `number` of the model of this record."""
    return MoELayer(
        number,
        config.n_experts,
        config.top_k,
        expert_shape(config),
        is_normalised=config.is_normalised,
    )


def embedding(n_tokens: int, d_model: int) -> nn.Embedding:
    """An embedding whose weights nobody has drawn yet; torch's own always draws them."""
    return nn.Embedding(n_tokens, d_model, _weight=torch.empty(n_tokens, d_model))


class RotaryAttention(nn.Module):
    """Grouped-query self-attention with rotary positions and no biases."""

    def __init__(self, d_model: int, n_heads: int, n_kv_heads: int, d_head: int) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.d_head = n_heads, n_kv_heads, d_head
        self.q = nn.Linear(d_model, n_heads * d_head, bias=False)
        self.k = nn.Linear(d_model, n_kv_heads * d_head, bias=False)
        self.v = nn.Linear(d_model, n_kv_heads * d_head, bias=False)
        self.o = nn.Linear(n_heads * d_head, d_model, bias=False)

    def project(self, x: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of [..., D] as [..., H, d_head], the first two rotated."""
        q = rotate(self.q(x).unflatten(-1, (self.n_heads, self.d_head)), cosine, sine)
        k = rotate(self.k(x).unflatten(-1, (self.n_kv_heads, self.d_head)), cosine, sine)
        return q, k, self.v(x).unflatten(-1, (self.n_kv_heads, self.d_head))

    def forward(self, x_BLD: Tensor, cosine: Tensor, sine: Tensor, *, is_causal: bool) -> Tensor:
        """A whole batch of sequences of one length."""
        q, k, v = (t.transpose(1, 2) for t in self.project(x_BLD, cosine, sine))
        y = F.scaled_dot_product_attention(
            q, k, v, is_causal=is_causal, enable_gqa=self.n_heads != self.n_kv_heads
        )
        answer: Tensor = self.o(y.transpose(1, 2).flatten(2))
        return answer


class Block(nn.Module):
    """Norm, attention, norm, experts; both parts added to what came in."""

    def __init__(
        self,
        attention: RotaryAttention,
        moe: MoELayer,
        norm_eps: float,
    ) -> None:
        super().__init__()
        d_model = moe.shape.d_model
        self.attention_norm = nn.RMSNorm(d_model, eps=norm_eps)
        self.attention = attention
        self.moe_norm = nn.RMSNorm(d_model, eps=norm_eps)
        self.moe = moe

    def forward(
        self,
        x_BLD: Tensor,
        cosine: Tensor,
        sine: Tensor,
        choices: list[Choice] | None,
        *,
        is_causal: bool,
    ) -> Tensor:
        """A whole batch."""
        x_BLD = x_BLD + self.attention(
            self.attention_norm(x_BLD), cosine, sine, is_causal=is_causal
        )
        y_TD: Tensor = self.moe(self.moe_norm(x_BLD).flatten(0, 1), choices)
        return x_BLD + y_TD.view_as(x_BLD)

    def step(
        self, x_ND: Tensor, angles: tuple[Tensor, Tensor], layer: int, rows: Rows, cache: KVCache
    ) -> Tensor:
        """Rows of many sequences."""
        q, k, v = self.attention.project(self.attention_norm(x_ND), *angles)
        cache.write(layer, rows, k, v)
        x_ND = x_ND + self.attention.o(attend_rows(q, cache, layer, rows).flatten(1))
        y_ND: Tensor = self.moe(self.moe_norm(x_ND))
        return x_ND + y_ND
