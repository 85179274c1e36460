"""Attention over whole batches, for training, and over rows with a cache, for serving."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_serving.models.rows import KVCache, Rows, Run

Bias: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Positions of queries [..., Q] and of keys [L] to what is added to the scores [..., H, Q, L]."""


def rotary_angles(d_head: int, base: float, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of RoPE (arXiv:2104.09864), [..., d_head], halves side by side."""
    exponents = torch.arange(0, d_head, 2, device=positions.device, dtype=torch.float32) / d_head
    angles = positions[..., None].float() * base**-exponents
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn pairs (i, i + d/2) of [..., H, d_head] by their positions' angles."""
    left, right = x.chunk(2, dim=-1)
    turned = torch.cat([-right, left], dim=-1)
    return x * cosine[..., None, :].to(x.dtype) + turned * sine[..., None, :].to(x.dtype)


def attend(
    q_QHd: Tensor, k_LHd: Tensor, v_LHd: Tensor, scores: Tensor | None, scale: float | None = None
) -> Tensor:
    """One sequence, every row to every other: [Q, H, d] -> [Q, H, d]."""
    q, k, v = (t.transpose(0, 1)[None] for t in (q_QHd, k_LHd, v_LHd))
    return _attention(q, k, v, scores, scale)[0].transpose(0, 1)


def attend_rows(
    q_NHd: Tensor,
    cache: KVCache,
    layer: int,
    rows: Rows,
    *,
    scale: float | None = None,
    bias: Bias | None = None,
) -> Tensor:
    """Each row attends to its own sequence up to itself: [N, H, d] -> [N, H, d].

    The rows' own keys and values must be in the cache already. Sequences that go on by one token
    are done together, each prompt by itself.
    """
    y_NHd = torch.empty_like(q_NHd)
    for group in rows.single:
        at = [run.start for run in group]
        y_NHd[at] = _attend_single(q_NHd[at], cache, layer, group, scale, bias)
    for run in rows.long:
        q_HQd = q_NHd[run.start : run.end].transpose(0, 1)
        y_NHd[run.start : run.end] = _attend_long(q_HQd, cache, layer, run, scale, bias).transpose(
            0, 1
        )
    return y_NHd


def _attend_single(
    q_BHd: Tensor,
    cache: KVCache,
    layer: int,
    runs: tuple[Run, ...],
    scale: float | None,
    bias: Bias | None,
) -> Tensor:
    length = max(run.length for run in runs)
    k, v = cache.read(layer, runs, length)
    places_L = torch.arange(length, device=q_BHd.device)
    last_B1 = torch.tensor([[run.first] for run in runs], device=q_BHd.device)
    mask_B11L = (places_L > last_B1)[:, None, None, :]
    scores = torch.zeros((), device=q_BHd.device, dtype=q_BHd.dtype)
    if bias is not None:
        scores = bias(last_B1, places_L)
    scores = scores.masked_fill(mask_B11L, -torch.inf)
    return _attention(q_BHd[:, :, None], k, v, scores, scale)[:, :, 0]


def _attend_long(
    q_HQd: Tensor, cache: KVCache, layer: int, run: Run, scale: float | None, bias: Bias | None
) -> Tensor:
    k, v = cache.read(layer, [run], run.length)
    if run.first == 0 and bias is None:
        return _attention(q_HQd[None], k, v, None, scale, is_causal=True)[0]
    places_L = torch.arange(run.length, device=q_HQd.device)
    queries_Q = places_L[run.first :]
    scores = torch.zeros((), device=q_HQd.device, dtype=q_HQd.dtype)
    if bias is not None:
        scores = bias(queries_Q, places_L)
    scores = scores.masked_fill(places_L > queries_Q[:, None], -torch.inf)
    return _attention(q_HQd[None], k, v, scores, scale)[0]


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: Tensor | None,
    scale: float | None,
    *,
    is_causal: bool = False,
) -> Tensor:
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=scores,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
