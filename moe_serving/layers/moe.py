"""The layer itself: route, then let the experts answer."""

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor, nn

from moe_serving.layers.experts import (
    Experts,
    ExpertShape,
    ExpertStore,
    GroupedExperts,
    StoredExperts,
)
from moe_serving.layers.gating import Choice, Plan, Router, sort_by_expert

Watch: TypeAlias = Callable[[int, Tensor, Plan], None]
"""Told the layer's number, its input x_TD and the plan, before the experts run."""


class MoELayer(nn.Module):
    """A mixture-of-experts feed-forward layer that drops and pads nothing.

    It is born with `GroupedExperts`, which can be trained. For serving, `serve_from` puts other
    experts in their place and lets the parameters go. `watch` is told each plan: recorders
    of activations and prefetchers listen there.
    """

    def __init__(
        self,
        number: int,
        n_experts: int,
        top_k: int,
        shape: ExpertShape,
        *,
        is_normalised: bool = True,
    ) -> None:
        super().__init__()
        self.number = number
        self.shape = shape
        self.router = Router(shape.d_model, n_experts, top_k, is_normalised=is_normalised)
        self.experts: Experts = GroupedExperts(n_experts, shape)
        self.watch: Watch | None = None

    @property
    def n_experts(self) -> int:
        """How many experts the layer has."""
        return self.router.n_experts

    def serve_from(self, experts: Experts | ExpertStore) -> None:
        """Answer with these experts from now on, and let the trainable ones go."""
        del self.experts  # a registered module gives its name only to another module
        if isinstance(experts, ExpertStore):
            self.experts = StoredExperts(experts, self.number)
        else:
            self.experts = experts

    def forward(self, x_TD: Tensor, choices: list[Choice] | None = None) -> Tensor:
        """[T, D] -> [T, D]; what the router said is appended to `choices`, for the losses."""
        choice = self.router(x_TD)
        if choices is not None:
            choices.append(choice)
        plan = sort_by_expert(choice)
        if self.watch is not None:
            self.watch(self.number, x_TD, plan)
        return self.experts(x_TD, plan)
