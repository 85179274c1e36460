"""Experts: their weights, their mathematics, and where a layer gets them from.

An expert is two matrices with an activation between them, without biases. The first matrix
of a gated one holds the gate's F rows, then the F rows that it gates. Names of tensors end in
their shape; `moe_serving.layers` has the legend.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_serving.layers.gating import Plan
from moe_serving.layers.initial import draw_normal

Activation: TypeAlias = Literal["relu", "gelu", "swiglu"]


class ExpertWeights(NamedTuple):
    """The two matrices of one expert."""

    w_in_RD: Tensor
    w_out_DF: Tensor


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """What all experts of a layer have in common."""

    d_model: int
    d_expert: int
    activation: Activation

    @property
    def rows_in(self) -> int:
        """Rows of the first matrix."""
        return 2 * self.d_expert if self.activation == "swiglu" else self.d_expert

    @property
    def parameters(self) -> int:
        """Weights of one expert."""
        return (self.rows_in + self.d_expert) * self.d_model

    def split(self, flat_P: Tensor) -> ExpertWeights:
        """The two matrices, as views, of the weights as they lie in a file: first, then second."""
        first = self.rows_in * self.d_model
        w_in, w_out = flat_P[:first], flat_P[first:]
        return ExpertWeights(
            w_in.view(self.rows_in, self.d_model), w_out.view(self.d_model, self.d_expert)
        )


def activate(h_MR: Tensor, activation: Activation) -> Tensor:
    """What lies between the two matrices: [M, R] -> [M, F]."""
    match activation:
        case "relu":
            return F.relu(h_MR)
        case "gelu":
            return F.gelu(h_MR)
        case "swiglu":
            gate_MF, up_MF = h_MR.chunk(2, dim=-1)
            return F.silu(gate_MF) * up_MF


def run_expert(x_MD: Tensor, weights: ExpertWeights, activation: Activation) -> Tensor:
    """One expert in plain torch: the reference for every kernel, and what training uses."""
    return F.linear(activate(F.linear(x_MD, weights.w_in_RD), activation), weights.w_out_DF)


class PackedExpert(Protocol):
    """An expert as a kernel wants it: rows in, rows out, both [M, D] with M at least 1."""

    @property
    def size_bytes(self) -> int:
        """What it takes of memory."""
        ...

    def __call__(self, x_MD: Tensor) -> Tensor:
        """Run the expert; the answer is new memory."""
        ...


@runtime_checkable
class ExpertStore(Protocol):
    """Where layers get their experts from."""

    def visit(self, layer: int, counts_E: Sequence[int]) -> Iterator[tuple[int, PackedExpert]]:
        """Each expert with a positive count, once, in whatever order they become ready.

        The layer runs an expert before it asks for the next: what came before may be gone then.
        """
        ...


class Experts(Protocol):
    """A layer's experts together: what `MoELayer` hands its plan to."""

    def __call__(self, x_TD: Tensor, plan: Plan) -> Tensor:
        """The weighted sum of the experts' answers, [T, D]."""
        ...


class GroupedExperts(nn.Module):
    """All experts of a layer as two parameters; the path that gradients flow through."""

    def __init__(self, n_experts: int, shape: ExpertShape) -> None:
        super().__init__()
        self.shape = shape
        self.w_in_ERD = nn.Parameter(torch.empty(n_experts, shape.rows_in, shape.d_model))
        self.w_out_EDF = nn.Parameter(torch.empty(n_experts, shape.d_model, shape.d_expert))
        draw_normal(self.w_in_ERD, shape.d_model)
        draw_normal(self.w_out_EDF, shape.d_expert)

    def weights_of(self, expert: int) -> ExpertWeights:
        """Views of one expert's matrices."""
        return ExpertWeights(self.w_in_ERD[expert], self.w_out_EDF[expert])

    def forward(self, x_TD: Tensor, plan: Plan) -> Tensor:
        """Gather once, one pair of products per active expert, one weighted sum."""
        x_ND = x_TD[plan.token_N]
        ends_E = plan.offsets_E.tolist()
        starts_E = [0, *ends_E[:-1]]
        answers = [
            run_expert(x_ND[start:end], self.weights_of(expert), self.shape.activation)
            for expert, (start, end) in enumerate(zip(starts_E, ends_E, strict=True))
            if end > start
        ]
        if not answers:
            return torch.zeros_like(x_TD)
        y_ND = torch.cat(answers) * plan.weight_N[:, None].to(x_TD.dtype)
        return torch.zeros_like(x_TD).index_add(0, plan.token_N, y_ND)


@dataclass(frozen=True, slots=True)
class StoredExperts:
    """The experts of layer number `layer`, visited in a store. For inference only.

    Answers are laid down in the plan's order before they are summed: a store may yield experts
    in any order and the bits of the result are the same.
    """

    store: ExpertStore
    layer: int

    @torch.no_grad()
    def __call__(self, x_TD: Tensor, plan: Plan) -> Tensor:
        """Run each active expert once on all of its rows."""
        x_ND = x_TD[plan.token_N]
        y_ND = torch.empty_like(x_ND)
        weight_N1 = plan.weight_N[:, None].to(x_TD.dtype)
        counts, ends = plan.counts_E.tolist(), plan.offsets_E.tolist()
        for expert, run in self.store.visit(self.layer, counts):
            end = ends[expert]
            start = end - counts[expert]
            torch.mul(run(x_ND[start:end]), weight_N1[start:end], out=y_ND[start:end])
        return torch.zeros_like(x_TD).index_add_(0, plan.token_N, y_ND)


Pack: TypeAlias = Callable[[ExpertWeights, Activation], PackedExpert]


class ResidentStore:
    """All experts of all layers, packed once and kept in memory."""

    def __init__(self, layers: Sequence[Sequence[PackedExpert]]) -> None:
        self._layers = [list(experts) for experts in layers]

    @property
    def size_bytes(self) -> int:
        """What all experts together take of memory."""
        return sum(expert.size_bytes for experts in self._layers for expert in experts)

    def visit(self, layer: int, counts_E: Sequence[int]) -> Iterator[tuple[int, PackedExpert]]:
        """The active experts by their number, as in the paper."""
        experts = self._layers[layer]
        return ((e, experts[e]) for e, count in enumerate(counts_E) if count)
