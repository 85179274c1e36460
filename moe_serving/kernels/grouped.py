"""All experts of a layer in two grouped products: the kernel for CUDA.

The counts stay on the device: a layer asks nothing of the host. torch has a fused kernel for
bfloat16 from compute capability 9.0 and a slower way for the rest.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_serving.layers.experts import Activation, GroupedExperts, activate
from moe_serving.layers.gating import Plan


@dataclass(frozen=True, slots=True)
class GroupedLayer:
    """All experts' matrices, as the product wants them: [E, D, R] and [E, F, D] by strides."""

    w_in_EDR: Tensor
    w_out_EFD: Tensor
    activation: Activation
    top_k: int

    @property
    def size_bytes(self) -> int:
        """The weights' bytes."""
        return self.w_in_EDR.nbytes + self.w_out_EFD.nbytes

    @torch.no_grad()
    def __call__(self, x_TD: Tensor, plan: Plan) -> Tensor:
        """Gather, two grouped products, and the weighted sum in the order of the choice."""
        ends_E = plan.offsets_E.to(torch.int32)
        h_NR = F.grouped_mm(x_TD[plan.token_N], self.w_in_EDR, offs=ends_E)
        y_ND = F.grouped_mm(activate(h_NR, self.activation), self.w_out_EFD, offs=ends_E)
        y_ND = y_ND * plan.weight_N[:, None].to(y_ND.dtype)
        # Back to [T, K, D] and a sum over K: atomic additions would come in any order.
        in_order = torch.empty_like(y_ND).index_copy_(0, plan.order_N, y_ND)
        return in_order.view(x_TD.shape[0], self.top_k, x_TD.shape[1]).sum(dim=1)


def pack_grouped(grouped: GroupedExperts, top_k: int) -> GroupedLayer:
    """The layer's own parameters, transposed by their strides only."""
    return GroupedLayer(
        grouped.w_in_ERD.detach().transpose(1, 2),
        grouped.w_out_EDF.detach().transpose(1, 2),
        grouped.shape.activation,
        top_k,
    )


def is_grouped_usable() -> bool:
    """Whether torch has a CUDA device and the product."""
    return torch.cuda.is_available() and hasattr(F, "grouped_mm")
