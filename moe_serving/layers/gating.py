"""Dynamic gating: which experts a token goes to, and the order that groups them.

"Towards MoE Deployment" (arXiv:2303.06182), section on dynamic gating: the (token, expert)
pairs are sorted by expert and counted. No expert has a capacity, so nothing is padded and
nothing is dropped, and what a token gets does not depend on the tokens beside it.

Names of tensors end in their shape; `moe_serving.layers` has the legend.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_serving.layers.initial import draw_normal


@dataclass(frozen=True, slots=True)
class Choice:
    """What the router says of each token. Gradients flow through weights and logits."""

    expert_TK: Tensor
    weight_TK: Tensor
    logits_TE: Tensor


@dataclass(frozen=True, slots=True)
class Plan:
    """The assignments in order of their expert; inside one expert, in order of their token.

    Attributes:
        order_N: place of the assignment in the flattened [T, K] choice.
        token_N: the token it belongs to.
        weight_N: what the expert's answer counts for.
        counts_E: assignments of each expert.
        offsets_E: where each expert's assignments end; they begin where the last one's end.
    """

    order_N: Tensor
    token_N: Tensor
    weight_N: Tensor
    counts_E: Tensor
    offsets_E: Tensor


class Router(nn.Module):
    """Softmax over the logits of one linear map, then the K most probable experts.

    With `is_normalised` the K weights sum to 1 (Mixtral); without, a weight is the expert's
    probability among all (Switch, arXiv:2101.03961, Eq. 2). Always computed in float32.
    """

    def __init__(
        self, d_model: int, n_experts: int, top_k: int, *, is_normalised: bool = True
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_experts, d_model))
        self.top_k = top_k
        self.is_normalised = is_normalised
        draw_normal(self.weight, d_model)

    @property
    def n_experts(self) -> int:
        """How many experts there are to choose from."""
        return self.weight.shape[0]

    def forward(self, x_TD: Tensor) -> Choice:
        """Choose for each token."""
        logits_TE = F.linear(x_TD.float(), self.weight.float())
        return choose(logits_TE, self.top_k, is_normalised=self.is_normalised)


def choose(logits_TE: Tensor, top_k: int, *, is_normalised: bool) -> Choice:
    """The K most probable experts of each token, most probable first."""
    probability_TE = logits_TE.softmax(dim=-1)
    weight_TK, expert_TK = probability_TE.topk(top_k, dim=-1)
    if is_normalised:
        weight_TK = weight_TK / weight_TK.sum(dim=-1, keepdim=True)
    return Choice(expert_TK, weight_TK, logits_TE)


def sort_by_expert(choice: Choice) -> Plan:
    """The plan of a choice: one stable sort and one count, O(N log N)."""
    top_k = choice.expert_TK.shape[1]
    expert_N, order_N = choice.expert_TK.flatten().sort(stable=True)
    counts_E = torch.bincount(expert_N, minlength=choice.logits_TE.shape[1])
    return Plan(
        order_N=order_N,
        token_N=order_N // top_k,
        weight_N=choice.weight_TK.flatten()[order_N],
        counts_E=counts_E,
        offsets_E=counts_E.cumsum(0),
    )


def route(x_TD: Tensor, router: Router) -> Plan:
    """Choose and sort: all that the experts and whoever places or buffers them need."""
    return sort_by_expert(router(x_TD))


def balance_loss(choice: Choice) -> Tensor:
    """Switch Transformers' auxiliary loss (arXiv:2101.03961, Eq. 4-6): 1 if all is even.

    Departs from the paper: with K > 1 the share of an expert counts all K assignments.
    """
    n_experts = choice.logits_TE.shape[1]
    counts_E = torch.bincount(choice.expert_TK.flatten(), minlength=n_experts)
    share_E = counts_E / max(1, choice.expert_TK.numel())
    probability_E = choice.logits_TE.softmax(dim=-1).mean(dim=0)
    return n_experts * (share_E * probability_E).sum()


def z_loss(choice: Choice) -> Tensor:
    """The mean squared log-sum-exp of the logits (ST-MoE, arXiv:2202.08906, Eq. 5)."""
    return choice.logits_TE.logsumexp(dim=-1).square().mean()
