"""All experts of a layer in one operator of ONNX Runtime: `QMoE`, 8 bits in blocks.

The layer's own plan decides: the operator is given the chosen experts' weights and zero for all
others, so that it chooses the same ones and mixes them alike.
"""

from dataclasses import dataclass
from typing import Any

import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_serving.kernels.blockwise import INT8_ACTIVATIONS, block_of, quantise, session
from moe_serving.layers.experts import ExpertShape, GroupedExperts
from moe_serving.layers.gating import Plan, choose, sort_by_expert

_ROUTER_WEIGHTS = 14
"""Place of the operator's input that says what each expert counts for."""
_SWIGLU: dict[str, Any] = {"swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0}
"""Rows of gate and gated interleaved; the ordinary SwiGLU, not GPT-OSS's."""


@dataclass(frozen=True, slots=True)
class QMoELayer:
    """A session over all experts of a layer."""

    session: onnxruntime.InferenceSession
    size_bytes: int

    @torch.no_grad()
    def __call__(self, x_TD: Tensor, plan: Plan) -> Tensor:
        """Lay the weights of the plan out by token and expert, and run the session."""
        n_experts = plan.counts_E.shape[0]
        expert_N = torch.arange(n_experts).repeat_interleave(plan.counts_E)
        weight_TE = torch.zeros(x_TD.shape[0], n_experts)
        weight_TE[plan.token_N, expert_N] = plan.weight_N
        fed = {"x": x_TD.detach().float().numpy(), "weights": weight_TE.numpy()}
        (y_TD,) = self.session.run(None, fed)
        return torch.from_numpy(y_TD).to(x_TD.dtype)


def pack_qmoe(grouped: GroupedExperts, top_k: int) -> QMoELayer:
    """Quantise all matrices in blocks along their rows and make the session."""
    shape, n_experts = grouped.shape, grouped.w_in_ERD.shape[0]
    w_in = grouped.w_in_ERD.detach()
    if shape.activation == "swiglu":
        # The operator wants a row of the gate, then the row that it gates.
        w_in = torch.stack(w_in.chunk(2, dim=1), dim=2).flatten(1, 2)
    block = min(block_of(shape.d_model), block_of(shape.d_expert))
    arrays: dict[str, NDArray[Any]] = {}
    for name, weight in (("in", w_in), ("out", grouped.w_out_EDF)):
        quantised, scales = quantise(weight, block)
        arrays[f"{name}_bytes"] = quantised.reshape(*weight.shape)
        arrays[f"{name}_scales"] = scales
    names = ["x", "weights", "in_bytes", "in_scales", "", "out_bytes", "out_scales"]
    node = onnx.helper.make_node(
        "QMoE",
        [*names, *([""] * (_ROUTER_WEIGHTS - len(names))), "weights"],
        ["y"],
        domain="com.microsoft",
        k=top_k,
        expert_weight_bits=8,
        block_size=block,
        accuracy_level=INT8_ACTIVATIONS,
        normalize_routing_weights=0,
        activation_type=shape.activation,
        **(_SWIGLU if shape.activation == "swiglu" else {}),
    )
    inputs = {"x": ("T", shape.d_model), "weights": ("T", n_experts)}
    made = session([node], inputs, ("y", ("T", shape.d_model)), arrays)
    return QMoELayer(made, sum(array.nbytes for array in arrays.values()))


def is_qmoe_usable() -> bool:
    """Whether the runtime has the operator and it computes what it should."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        grouped = GroupedExperts(4, ExpertShape(32, 64, "swiglu"))
    for weight in grouped.parameters():
        weight.data.normal_(generator=generator)
    choice = choose(torch.randn(9, 4, generator=generator), 2, is_normalised=False)
    x_TD, plan = torch.randn(9, 32, generator=generator), sort_by_expert(choice)
    try:
        y_TD = pack_qmoe(grouped, top_k=2)(x_TD, plan)
    except Exception:  # the runtime raises classes of its own for each status
        return False
    exact_TD = grouped(x_TD, plan)
    return bool((y_TD - exact_TD).norm() < 0.1 * exact_TD.norm())
