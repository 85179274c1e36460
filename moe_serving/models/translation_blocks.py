"""What encoder and decoder of a translator are made of, as T5 and Switch Transformers have it."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_serving.layers.experts import activate
from moe_serving.layers.gating import Choice
from moe_serving.layers.initial import draw_normal
from moe_serving.layers.moe import MoELayer
from moe_serving.models.attention import attend, attend_rows
from moe_serving.models.blocks import moe_layer
from moe_serving.models.config import TranslationConfig, expert_shape
from moe_serving.models.rows import KVCache, Rows, Run


class RelativeBias(nn.Module):
    """T5's bias of attention by distance (arXiv:1910.10683), in buckets that grow with it."""

    def __init__(self, config: TranslationConfig, *, is_causal: bool) -> None:
        super().__init__()
        self.n_buckets = config.relative_buckets
        self.distance = config.relative_distance
        self.is_causal = is_causal
        self.weight = nn.Parameter(torch.empty(config.relative_buckets, config.n_heads))
        draw_normal(self.weight, config.d_model)

    def forward(self, queries_Q: Tensor, keys_L: Tensor) -> Tensor:
        """Positions [..., Q] and [L] to a bias [..., H, Q, L]."""
        buckets = self._bucket(keys_L - queries_Q[..., None])
        bias: Tensor = self.weight[buckets].movedim(-1, -3)
        return bias

    def _bucket(self, offset: Tensor) -> Tensor:
        n_buckets = self.n_buckets
        first = torch.zeros_like(offset)
        if self.is_causal:
            distance = (-offset).clamp(min=0)
        else:
            n_buckets //= 2
            first = (offset > 0) * n_buckets
            distance = offset.abs()
        exact = n_buckets // 2
        growth = math.log(self.distance / exact)
        far = exact + (torch.log(distance / exact) / growth * (n_buckets - exact)).nan_to_num(
            neginf=0
        ).long().clamp(max=n_buckets - 1 - exact)
        return first + torch.where(distance < exact, distance, far)


class Attention(nn.Module):
    """Attention without biases of its own and without scaling, as T5 has it."""

    def __init__(self, config: TranslationConfig) -> None:
        super().__init__()
        width = config.n_heads * config.d_head
        self.heads = (config.n_heads, config.d_head)
        self.q = nn.Linear(config.d_model, width, bias=False)
        self.k = nn.Linear(config.d_model, width, bias=False)
        self.v = nn.Linear(config.d_model, width, bias=False)
        self.o = nn.Linear(width, config.d_model, bias=False)

    def queries(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., H, d_head]."""
        q: Tensor = self.q(x).unflatten(-1, self.heads)
        return q

    def memory(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of [..., D], [..., H, d_head] each."""
        return self.k(x).unflatten(-1, self.heads), self.v(x).unflatten(-1, self.heads)

    def forward(self, x_BQD: Tensor, memory_BLD: Tensor, scores: Tensor) -> Tensor:
        """A whole batch; `scores` [B or 1, H or 1, Q, L] is added before the softmax."""
        q = self.queries(x_BQD).transpose(1, 2)
        k, v = (t.transpose(1, 2) for t in self.memory(memory_BLD))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=scores, scale=1.0)
        answer: Tensor = self.o(y.transpose(1, 2).flatten(2))
        return answer


class DenseFeedForward(nn.Module):
    """What layers without experts have: one expert that everybody goes to."""

    def __init__(self, config: TranslationConfig) -> None:
        super().__init__()
        shape = expert_shape(config)
        self.activation = shape.activation
        self.w_in = nn.Linear(shape.d_model, shape.rows_in, bias=False)
        self.w_out = nn.Linear(shape.d_expert, shape.d_model, bias=False)

    def forward(self, x_TD: Tensor, choices: list[Choice] | None = None) -> Tensor:  # noqa: ARG002
        """[T, D] -> [T, D]."""
        y_TD: Tensor = self.w_out(activate(self.w_in(x_TD), self.activation))
        return y_TD


class TranslationCache:
    """What a step of the decoder remembers: its own keys and values, and the sources'.

    `source_lengths` says, by slot, how long each source is.
    """

    def __init__(self, own: KVCache, sources: KVCache) -> None:
        self.own = own
        self.sources = sources
        self.source_lengths = [0] * own.n_slots

    @property
    def size_bytes(self) -> int:
        """What it takes of memory."""
        return self.own.size_bytes + self.sources.size_bytes


class TranslationBlock(nn.Module):
    """Self-attention, in a decoder attention to the source, and a feed-forward part."""

    def __init__(self, config: TranslationConfig, number: int | None, *, is_decoder: bool) -> None:
        super().__init__()
        eps = config.norm_eps
        self.attention_norm = nn.RMSNorm(config.d_model, eps=eps)
        self.attention = Attention(config)
        self.source_norm = nn.RMSNorm(config.d_model, eps=eps) if is_decoder else None
        self.source_attention = Attention(config) if is_decoder else None
        self.moe_norm = nn.RMSNorm(config.d_model, eps=eps)
        self.moe: MoELayer | DenseFeedForward
        if number is None:
            self.moe = DenseFeedForward(config)
        else:
            self.moe = moe_layer(config, number)

    def forward(
        self,
        x_BLD: Tensor,
        scores: Tensor,
        source: tuple[Tensor, Tensor] | None,
        choices: list[Choice] | None,
    ) -> Tensor:
        """A whole batch; `source` is the encoder's answer and the scores of its padding."""
        normed = self.attention_norm(x_BLD)
        x_BLD = x_BLD + self.attention(normed, normed, scores)
        if (
            source is not None
            and self.source_norm is not None
            and self.source_attention is not None
        ):
            x_BLD = x_BLD + self.source_attention(self.source_norm(x_BLD), *source)
        y_TD: Tensor = self.moe(self.moe_norm(x_BLD).flatten(0, 1), choices)
        return x_BLD + y_TD.view_as(x_BLD)

    def source_memory(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A decoder's keys and values of the encoder's answer."""
        if self.source_attention is None:
            raise TypeError("an encoder's block attends to no source")
        return self.source_attention.memory(x)

    def step_source(self, x_ND: Tensor, runs: tuple[Run, ...], bias: RelativeBias) -> Tensor:
        """Rows of many sources, each of which sees the whole of its own."""
        normed = self.attention_norm(x_ND)
        q, (k, v) = self.attention.queries(normed), self.attention.memory(normed)
        y_NHd = torch.empty_like(q)
        for run in runs:
            part = slice(run.start, run.end)
            places = torch.arange(run.rows, device=q.device)
            y_NHd[part] = attend(q[part], k[part], v[part], bias(places, places), scale=1.0)
        x_ND = x_ND + self.attention.o(y_NHd.flatten(1))
        y_ND: Tensor = self.moe(self.moe_norm(x_ND))
        return x_ND + y_ND

    def step(
        self, x_ND: Tensor, layer: int, rows: Rows, cache: TranslationCache, bias: RelativeBias
    ) -> Tensor:
        """Rows of many targets."""
        normed = self.attention_norm(x_ND)
        cache.own.write(layer, rows, *self.attention.memory(normed))
        q = self.attention.queries(normed)
        y_NHd = attend_rows(q, cache.own, layer, rows, scale=1.0, bias=bias)
        x_ND = x_ND + self.attention.o(y_NHd.flatten(1))
        if self.source_attention is not None and self.source_norm is not None:
            q = self.source_attention.queries(self.source_norm(x_ND))
            y_NHd = _attend_sources(q, layer, rows, cache)
            x_ND = x_ND + self.source_attention.o(y_NHd.flatten(1))
        y_ND: Tensor = self.moe(self.moe_norm(x_ND))
        return x_ND + y_ND


def _attend_sources(q_NHd: Tensor, layer: int, rows: Rows, cache: TranslationCache) -> Tensor:
    y_NHd = torch.empty_like(q_NHd)
    for group in rows.single:
        at = [run.start for run in group]
        lengths = torch.tensor([[cache.source_lengths[run.slot]] for run in group])
        length = int(lengths.max())
        k, v = cache.sources.read(layer, group, length)
        is_seen = torch.arange(length) < lengths
        scores = torch.zeros((), device=q_NHd.device, dtype=q_NHd.dtype)
        scores = scores.masked_fill(~is_seen[:, None, None, :].to(q_NHd.device), -torch.inf)
        y = F.scaled_dot_product_attention(q_NHd[at][:, :, None], k, v, scores, scale=1.0)
        y_NHd[at] = y[:, :, 0]
    for run in rows.long:
        part = slice(run.start, run.end)
        k, v = cache.sources.read(layer, [run], cache.source_lengths[run.slot])
        q_HQd = q_NHd[part].transpose(0, 1)
        y = F.scaled_dot_product_attention(q_HQd[None], k, v, scale=1.0)[0]
        y_NHd[part] = y.transpose(0, 1)
    return y_NHd
