"""How tensors of a model are cut into a rank's shards, and joined to whole ones again."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cloud.trainers.parallel.attention import SPLIT_BY, TensorAttention
from cloud.trainers.parallel.experts import ShardedExperts
from cloud.trainers.parallel.mesh import Mesh

WRAPPED = "_checkpoint_wrapped_module."
"""What recomputation puts into the names of parameters."""


@dataclass(frozen=True, slots=True)
class Cut:
    """A parameter of the model on one device, and how this rank's shard of it was cut.

    `shared` is on every rank whole; `rows` and `columns` are split over the tensor group along
    the first and second dimension; `experts_in` and `experts_out` over the expert group by
    expert, and over the tensor group by the expert's rows, `parts` of them side by side.
    """

    parameter: nn.Parameter
    kind: Literal["shared", "rows", "columns", "experts_in", "experts_out"] = "shared"
    parts: int = 1

    @property
    def is_expert(self) -> bool:
        """Whether ranks of a data group hold different ones."""
        return self.kind.startswith("experts")


def cuts_of(model: nn.Module) -> dict[str, Cut]:
    """The cut of each parameter, under the name it has in the model on one device."""
    found = {}
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        owner, plain = model.get_submodule(path), name.replace(WRAPPED, "")
        above, _, last = path.rpartition(".")
        if isinstance(owner, ShardedExperts):
            kind: Literal["experts_in", "experts_out"] = (
                "experts_in" if leaf == "w_in_ERD" else "experts_out"
            )
            found[plain] = Cut(parameter, kind, owner.parts)
        elif isinstance(model.get_submodule(above), TensorAttention):
            found[plain] = Cut(parameter, "rows" if SPLIT_BY[last] == 0 else "columns")
        else:
            found[plain] = Cut(parameter)
    return found


def join(mine: Tensor, cut: Cut, mesh: Mesh) -> Tensor:
    """The whole tensor of which every rank has its shard; all ranks call this together."""
    match cut.kind:
        case "shared":
            return mine.clone()
        case "rows":
            return torch.cat(_all(mine, mesh.tensor), dim=0)
        case "columns":
            return torch.cat(_all(mine, mesh.tensor), dim=1)
        case "experts_in":
            split = [
                torch.unflatten(share, 1, (cut.parts, -1)) for share in _all(mine, mesh.tensor)
            ]
            joined = torch.cat(split, dim=2).flatten(1, 2)
        case "experts_out":
            joined = torch.cat(_all(mine, mesh.tensor), dim=2)
    return torch.cat(_all(joined, mesh.expert), dim=0)


def split(whole: Tensor, cut: Cut, mesh: Mesh) -> Tensor:
    """This rank's shard of a whole tensor."""
    ranks, rank = mesh.shape.tensor, mesh.tensor_rank
    match cut.kind:
        case "shared":
            return whole
        case "rows":
            return whole.chunk(ranks, dim=0)[rank]
        case "columns":
            return whole.chunk(ranks, dim=1)[rank]
        case _:
            return _split_experts(whole, cut, mesh)


def _split_experts(whole: Tensor, cut: Cut, mesh: Mesh) -> Tensor:
    ranks, rank = mesh.shape.tensor, mesh.tensor_rank
    local = whole.chunk(mesh.shape.expert, dim=0)[mesh.expert_rank]
    if cut.kind == "experts_out":
        return local.chunk(ranks, dim=2)[rank]
    return torch.unflatten(local, 1, (cut.parts, ranks, -1))[:, :, rank].flatten(1, 2)


def whole_weights(model: nn.Module, mesh: Mesh, *, gradients: bool = False) -> dict[str, Tensor]:
    """The weights of the model on one device (or their gradients), on every rank.

    A rank's shards go to all; for checkpoints and results, not for every step.
    """
    found = {}
    for name, cut in cuts_of(model).items():
        mine = cut.parameter.grad if gradients else cut.parameter.detach()
        found[name] = join(torch.zeros_like(cut.parameter) if mine is None else mine, cut, mesh)
    return found


def _all(mine: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    if dist.get_world_size(group) == 1:
        return [mine]
    shares = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shares, mine.contiguous(), group=group)
    return shares
