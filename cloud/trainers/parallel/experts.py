"""Experts over ranks: each holds some experts, and of each one a tensor group's share.

The path of a token (TED, arXiv:2303.06318, Fig. 3): to the rank of its expert (all-to-all), through
this rank's share of the expert's rows, summed over the tensor group (all-reduce), and back
(all-to-all). Nothing is padded and nothing dropped, so sizes are exchanged first.

With `drops_duplicates` the ranks of a tensor group, which all have the same tokens, send a share
each, and the experts' side gathers them (section V-A).

Departs from the paper: any number of experts that the expert group divides, top-k, no capacity;
and a token's share is a row, not a piece of a padded buffer.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cloud.trainers.parallel.collectives import (
    copy_to,
    drop,
    exchange,
    exchange_counts,
    gather,
    gather_counts,
    reduce_from,
)
from cloud.trainers.parallel.mesh import Mesh
from federation.errors import ConfigError
from moe_serving.layers.experts import ExpertShape, ExpertWeights, GroupedExperts, run_expert
from moe_serving.layers.gating import Plan


@dataclass(frozen=True, slots=True)
class Bound:
    """Assignments in order of their expert: their token's row, their weight, how many for each."""

    row_N: Tensor
    weight_N: Tensor
    counts_E: Tensor


class ShardedExperts(nn.Module):
    """This rank's part of a layer's experts, where `moe_serving.layers` has all of them."""

    def __init__(self, whole: GroupedExperts, mesh: Mesh, *, drops_duplicates: bool) -> None:
        super().__init__()
        ranks, each = mesh.shape.tensor, whole.shape.d_expert // mesh.shape.tensor
        if each * ranks != whole.shape.d_expert:
            raise ConfigError(
                f"moe.d_expert = {whole.shape.d_expert} is no multiple of parallel.tensor = "
                f"{ranks}; every rank has as many rows: correct one of them"
            )
        self.shape, self._mesh, self._drops = whole.shape, mesh, drops_duplicates and ranks > 1
        self._own = ExpertShape(whole.shape.d_model, each, whole.shape.activation)
        local = len(whole.w_in_ERD) // mesh.shape.expert
        mine = slice(mesh.expert_rank * local, (mesh.expert_rank + 1) * local)
        self.parts = whole.shape.rows_in // whole.shape.d_expert
        # Gate and what it gates are split alike, so that a share is an expert of its own.
        w_in = torch.unflatten(whole.w_in_ERD.detach()[mine], 1, (self.parts, ranks, each))
        w_out = torch.unflatten(whole.w_out_EDF.detach()[mine], 2, (ranks, each))
        rank = mesh.tensor_rank
        self.w_in_ERD = nn.Parameter(w_in[:, :, rank].flatten(1, 2).clone())
        self.w_out_EDF = nn.Parameter(w_out[:, :, rank].clone())

    def forward(self, x_TD: Tensor, plan: Plan) -> Tensor:
        """[T, D] -> [T, D], with this rank's tokens; ranks of a tensor group have the same."""
        if not self._drops:
            return self._served(x_TD, Bound(plan.token_N, plan.weight_N, plan.counts_E))
        group, ranks = self._mesh.tensor, self._mesh.shape.tensor
        short = -len(x_TD) % ranks
        mine_TD = drop(nn.functional.pad(x_TD, (0, 0, 0, short)), group)
        y_TD = self._served(mine_TD, self._share(plan, len(x_TD), short))
        return gather(y_TD, group)[: len(x_TD)]

    def _share(self, plan: Plan, tokens: int, short: int) -> Bound:
        """The plan of this rank's share of the tokens, whose rows count from 0."""
        group = self._mesh.tensor
        n_experts, top_k = len(plan.counts_E), len(plan.order_N) // max(1, tokens)
        expert_N = torch.repeat_interleave(
            torch.arange(n_experts, device=plan.order_N.device), plan.counts_E
        )
        expert_TK = torch.empty_like(expert_N).index_copy(0, plan.order_N, expert_N)
        weight_TK = torch.zeros_like(plan.weight_N).index_copy(0, plan.order_N, plan.weight_N)
        padded = nn.functional.pad(weight_TK.view(tokens, top_k), (0, 0, 0, short))
        weight_SK = drop(padded, group)
        start = dist.get_rank(group) * len(weight_SK)
        stop = min(start + len(weight_SK), tokens)
        expert_SK = expert_TK.view(tokens, top_k)[start:stop].flatten()
        sorted_N, order_N = expert_SK.sort(stable=True)
        return Bound(
            row_N=order_N // top_k,
            weight_N=weight_SK[: max(0, stop - start)].flatten()[order_N],
            counts_E=torch.bincount(sorted_N, minlength=n_experts),
        )

    def _served(self, x_TD: Tensor, bound: Bound) -> Tensor:
        """Rows to their experts and back, weighed and added up."""
        group, ranks = self._mesh.expert, self._mesh.shape.expert
        counts_RE = bound.counts_E.view(ranks, -1)
        arriving_RE = exchange_counts(counts_RE, group)
        sent, received = counts_RE.sum(1).tolist(), arriving_RE.sum(1).tolist()
        x_MD = exchange(x_TD[bound.row_N], received, sent, group)
        y_MD = self._answered(x_MD, arriving_RE)
        y_ND = exchange(y_MD, sent, received, group)
        weighed_ND = y_ND * bound.weight_N[:, None].to(y_ND.dtype)
        return torch.zeros_like(x_TD).index_add(0, bound.row_N, weighed_ND)

    def _answered(self, x_MD: Tensor, counts_RE: Tensor) -> Tensor:
        """The experts' answers to rows that came from ranks, in the order in which they came."""
        if not self._drops:
            order, counts_E = _by_expert(counts_RE)
            return self._run(x_MD[order], counts_E)[order.argsort()]
        # All shares of the tensor group, padded to the longest: gathers want equal sizes.
        group = self._mesh.tensor
        counts_SRE = gather_counts(counts_RE.flatten(), group).view(-1, *counts_RE.shape)
        rows_S = counts_SRE.flatten(1).sum(1)
        longest = int(rows_S.max())
        padded = nn.functional.pad(x_MD, (0, 0, 0, longest - len(x_MD)))
        valid = torch.arange(longest, device=x_MD.device)[None] < rows_S[:, None]
        x_all = gather(padded, group)[valid.flatten()]
        order, counts_E = _by_expert(counts_SRE.flatten(0, 1))
        y_all = self._run(x_all[order], counts_E)[order.argsort()]
        spread = torch.zeros(len(valid) * longest, y_all.shape[1], dtype=y_all.dtype)
        spread = spread.to(y_all.device).index_copy(0, valid.flatten().nonzero().view(-1), y_all)
        return drop(spread, group)[: len(x_MD)]

    def _run(self, x_MD: Tensor, counts_E: list[int]) -> Tensor:
        """This rank's share of each expert, summed over the tensor group."""
        x_MD = copy_to(x_MD, self._mesh.tensor)
        parts = [
            run_expert(
                rows, ExpertWeights(self.w_in_ERD[e], self.w_out_EDF[e]), self._own.activation
            )
            for e, rows in enumerate(torch.split(x_MD, counts_E))
        ]
        return reduce_from(torch.cat(parts), self._mesh.tensor)


def _by_expert(counts_SE: Tensor) -> tuple[Tensor, list[int]]:
    """The order that sorts rows, which came by sender and then by expert, by expert alone."""
    senders, experts = counts_SE.shape
    ids = torch.arange(experts, device=counts_SE.device).repeat(senders)
    expert_M = torch.repeat_interleave(ids, counts_SE.flatten())
    return expert_M.argsort(stable=True), counts_SE.sum(0).tolist()
