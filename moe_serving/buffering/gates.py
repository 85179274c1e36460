"""The next layer's gate, asked early: which experts will be needed while others still run.

The input of a mixture layer is close to the input of the next one, for each block only adds to
it; so the next layer's router, applied to this layer's input, foresees part of its choice.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor

from moe_serving.layers.gating import Plan
from moe_serving.layers.moe import MoELayer, Watch

Expect: TypeAlias = Callable[[int, Sequence[int]], None]
"""Told a layer's number and experts, likeliest first: `BufferedStore.expect`."""


def watch_next_gates(layers: Sequence[MoELayer], expect: Expect) -> None:
    """Makes each layer but the last foresee the next one's experts.

    After the last layer the first comes round with the next tokens, which nobody knows yet.
    """
    for layer, following in pairwise(layers):
        add_watch(layer, _foresight(following, expect))


def add_watch(layer: MoELayer, watch: Watch) -> None:
    """Adds a listener to a layer, after those it has."""
    before = layer.watch
    if before is None:
        layer.watch = watch
        return

    def both(number: int, x_TD: Tensor, plan: Plan) -> None:
        before(number, x_TD, plan)
        watch(number, x_TD, plan)

    layer.watch = both


def foresee(x_TD: Tensor, following: MoELayer) -> list[int]:
    """Lists the experts the next layer would choose for this input, most wanted first."""
    with torch.no_grad():
        choice = following.router(x_TD)
    demand_E = torch.zeros(following.n_experts, dtype=torch.float32, device=x_TD.device)
    demand_E.index_add_(0, choice.expert_TK.flatten(), choice.weight_TK.flatten().float())
    wanted = int((demand_E > 0).sum())
    experts: list[int] = demand_E.argsort(descending=True, stable=True)[:wanted].tolist()
    return experts


def _foresight(following: MoELayer, expect: Expect) -> Watch:
    def watch(_number: int, x_TD: Tensor, _plan: Plan) -> None:
        expect(following.number, foresee(x_TD, following))

    return watch
