"""From logits to tokens, for many sequences at once.

Each sequence draws from its own generator, one number a token, so an answer depends on its seed
and not on who is served beside it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_serving.requests import Generate, Scored


def choose(logits_NV: Tensor, works: Sequence[Generate], draws: Sequence[float]) -> list[int]:
    """The next token of each sequence; `draws` are uniform in [0, 1), one each."""
    chosen: list[int] = logits_NV.argmax(dim=-1).tolist()
    drawn = [n for n, work in enumerate(works) if work.temperature > 0]
    if drawn:
        found = _draw(logits_NV[drawn], [works[n] for n in drawn], [draws[n] for n in drawn])
        for n, token in zip(drawn, found, strict=True):
            chosen[n] = token
    return chosen


def _draw(logits_NV: Tensor, works: Sequence[Generate], draws: Sequence[float]) -> list[int]:
    """By the inverse of the distribution function, likeliest first, cut where `top_p` is full."""
    heat_N1 = torch.tensor([[work.temperature] for work in works], dtype=torch.float32)
    top_N1 = torch.tensor([[work.top_p] for work in works], dtype=torch.float64)
    sorted_NV, tokens_NV = (logits_NV.float() / heat_N1.to(logits_NV.device)).sort(
        dim=-1, descending=True
    )
    filled_NV = sorted_NV.softmax(dim=-1).double().cumsum(dim=-1).cpu()
    # The first token stays whatever top_p is; of the others those that begin below it.
    kept_N1 = (filled_NV < top_N1).sum(dim=-1, keepdim=True).clamp(max=filled_NV.shape[1] - 1)
    wanted_N1 = torch.tensor(draws, dtype=torch.float64)[:, None] * filled_NV.gather(1, kept_N1)
    places_N1 = torch.searchsorted(filled_NV, wanted_N1, right=True)
    places_N1 = torch.minimum(places_N1, kept_N1)
    found: list[int] = tokens_NV.cpu().gather(1, places_N1)[:, 0].tolist()
    return found


def score(logits_NV: Tensor, tokens: Sequence[int], top: Sequence[int]) -> list[Scored]:
    """Each row's token with its log-probability, and with its `top` likeliest rivals."""
    logprobs_NV = logits_NV.float().log_softmax(dim=-1)
    picked = logprobs_NV.gather(1, torch.tensor(tokens, device=logits_NV.device)[:, None])
    most = min(max(top, default=0), logits_NV.shape[1])
    likeliest = logprobs_NV.topk(most, dim=-1) if most else None
    scored = []
    for n, (token, logprob) in enumerate(zip(tokens, picked[:, 0].tolist(), strict=True)):
        rivals: tuple[tuple[int, float], ...] = ()
        if likeliest is not None and top[n] > 0:
            ids = likeliest.indices[n, : top[n]].tolist()
            rivals = tuple(zip(ids, likeliest.values[n, : top[n]].tolist(), strict=True))
        scored.append(Scored(token, logprob, rivals))
    return scored
