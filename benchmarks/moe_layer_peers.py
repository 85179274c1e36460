"""The peers of our expert layer: other people's layers, and static gating as it used to be.

All share one layer's weights and choose the same experts: the router's weight picks the first
E numbers of a token, so a token carries the logits that the case wants it to have.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import onnx
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import MixtralConfig, SwitchTransformersConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersSparseMLP,
)

from moe_serving.kernels.blockwise import session
from moe_serving.layers.experts import GroupedExperts, activate
from moe_serving.layers.gating import Router

Run: TypeAlias = Callable[[Tensor], Tensor]


def static_einsum(router: Router, grouped: GroupedExperts, capacity: int) -> Run:
    """GShard's gating (arXiv:2006.16668, Algorithm 1): masks [T, E, C], and einsum twice.

    With a capacity of the largest load nothing is dropped, and the answer is ours.
    """

    def run(x_TD: Tensor) -> Tensor:
        dispatch_TEC, combine_TEC = _masks(router, x_TD, capacity)
        x_ECD = torch.einsum("tec,td->ecd", dispatch_TEC, x_TD)
        h_ECF = activate(torch.bmm(x_ECD, grouped.w_in_ERD.mT), grouped.shape.activation)
        y_ECD = torch.bmm(h_ECF, grouped.w_out_EDF.mT)
        return torch.einsum("tec,ecd->td", combine_TEC, y_ECD)

    return run


def padded_bmm(router: Router, grouped: GroupedExperts, capacity: int) -> Run:
    """Static gating without masks, as Tutel does it: scattered into [E, C, D], padded."""

    def run(x_TD: Tensor) -> Tensor:
        choice = router(x_TD)
        place_TK = _places(choice.expert_TK, router.n_experts)
        slot_TK = choice.expert_TK * capacity + place_TK
        x_SD = x_TD.new_zeros(router.n_experts * capacity, x_TD.shape[1])
        x_SD[slot_TK] = x_TD[:, None]
        x_ECD = x_SD.view(router.n_experts, capacity, -1)
        h_ECF = activate(torch.bmm(x_ECD, grouped.w_in_ERD.mT), grouped.shape.activation)
        y_SD = torch.bmm(h_ECF, grouped.w_out_EDF.mT).flatten(0, 1)
        mixed_TD: Tensor = (y_SD[slot_TK] * choice.weight_TK[..., None]).sum(dim=1)
        return mixed_TD

    return run


def mixtral_block(router: Router, grouped: GroupedExperts, implementation: str) -> Run:
    """The Mixtral block of transformers over our weights; `implementation` runs its experts."""
    shape = grouped.shape
    config = MixtralConfig(
        hidden_size=shape.d_model,
        intermediate_size=shape.d_expert,
        num_local_experts=router.n_experts,
        num_experts_per_tok=router.top_k,
    )
    config._experts_implementation = implementation  # noqa: SLF001  its own argument of this name
    with torch.device("meta"):
        block = MixtralSparseMoeBlock(config)  # type: ignore[no-untyped-call]
    weights = {
        "gate.weight": router.weight,
        "experts.gate_up_proj": grouped.w_in_ERD,
        "experts.down_proj": grouped.w_out_EDF,
    }
    block.load_state_dict(weights, assign=True)
    block.eval()
    return lambda x_TD: block(x_TD[None])[0]


def switch_block(router: Router, grouped: GroupedExperts) -> Run:
    """The Switch block of transformers over our weights, with room for every token."""
    shape = grouped.shape
    config = SwitchTransformersConfig(
        d_model=shape.d_model,
        d_ff=shape.d_expert,
        num_experts=router.n_experts,
        expert_capacity=1_000_000,
        dense_act_fn=shape.activation,
    )
    with torch.device("meta"):
        block = SwitchTransformersSparseMLP(config)
    weights = {"router.classifier.weight": router.weight}
    for expert in range(router.n_experts):
        w_in, w_out = grouped.weights_of(expert)
        weights[f"experts.expert_{expert}.wi.weight"] = torch.nn.Parameter(w_in)
        weights[f"experts.expert_{expert}.wo.weight"] = torch.nn.Parameter(w_out)
    block.load_state_dict(weights, assign=True)
    block.eval()
    return lambda x_TD: block(x_TD[None])[0]


def runtime_moe(router: Router, grouped: GroupedExperts) -> Run:
    """ONNX Runtime's `MoE` operator in float32; it takes the router's logits."""
    shape = grouped.shape
    w_in = grouped.w_in_ERD.detach()
    swiglu: dict[str, Any] = {}
    if shape.activation == "swiglu":
        w_in = torch.stack(w_in.chunk(2, dim=1), dim=2).flatten(1, 2)
        swiglu = {"swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0}
    node = onnx.helper.make_node(
        "MoE",
        ["x", "logits", "in", "", "out"],
        ["y"],
        domain="com.microsoft",
        k=router.top_k,
        normalize_routing_weights=int(router.is_normalised),
        activation_type=shape.activation,
        **swiglu,
    )
    inputs = {"x": ("T", shape.d_model), "logits": ("T", router.n_experts)}
    weights = {"in": w_in.contiguous().numpy(), "out": grouped.w_out_EDF.detach().numpy()}
    made = session([node], inputs, ("y", ("T", shape.d_model)), weights)

    def run(x_TD: Tensor) -> Tensor:
        logits_TE = F.linear(x_TD, router.weight)
        (y_TD,) = made.run(None, {"x": x_TD.numpy(), "logits": logits_TE.numpy()})
        return torch.from_numpy(y_TD)

    return run


def zipf_tokens(tokens: int, d_model: int, n_experts: int, exponent: float, seed: int) -> Tensor:
    """Tokens whose logits are Zipf-distributed popularity plus Gumbel noise, and noise besides.

    Expert ranks are shuffled, as popular experts have no order in a real model.
    """
    rng = np.random.default_rng(seed)
    popularity_E = -exponent * np.log(rng.permutation(n_experts) + 1)
    x_TD = rng.standard_normal((tokens, d_model), dtype=np.float32)
    x_TD[:, :n_experts] = popularity_E + rng.gumbel(size=(tokens, n_experts))
    return torch.from_numpy(x_TD)


def _masks(router: Router, x_TD: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    choice = router(x_TD)
    place_TK = _places(choice.expert_TK, router.n_experts)
    dispatch_TEC = x_TD.new_zeros(x_TD.shape[0], router.n_experts, capacity)
    combine_TEC = torch.zeros_like(dispatch_TEC)
    for expert_T, place_T, weight_T in zip(
        choice.expert_TK.T, place_TK.T, choice.weight_TK.T, strict=True
    ):
        mask_TEC = (
            F.one_hot(expert_T, router.n_experts)[:, :, None]
            * F.one_hot(place_T, capacity)[:, None, :]
        ).to(x_TD.dtype)
        dispatch_TEC += mask_TEC
        combine_TEC += weight_T[:, None, None] * mask_TEC
    return dispatch_TEC, combine_TEC


def _places(expert_TK: Tensor, n_experts: int) -> Tensor:
    """The place of each assignment in its expert's queue: all first choices, then the second."""
    expert_N = expert_TK.T.flatten()
    before_NE = F.one_hot(expert_N, n_experts).cumsum(0)
    place_N = before_NE.gather(1, expert_N[:, None])[:, 0] - 1
    return place_N.view(expert_TK.T.shape).T
