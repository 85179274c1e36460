"""Which rank belongs to which groups: tensor, expert and data parallelism in one mesh.

Ranks lie in a mesh (expert data, expert, tensor), the last index fastest, so that ranks of a tensor
group are neighbours. The first two dimensions together are the data groups of all that is not
an expert (TED, arXiv:2303.06318, section III and Eq. 1).
"""

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from federation.errors import ConfigError

Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of the mesh: G_tensor, G_expert and G_data of experts."""

    tensor: int
    expert: int
    expert_data: int

    @property
    def data(self) -> int:
        """The data-parallel size of what is not an expert."""
        return self.expert * self.expert_data

    @property
    def ranks(self) -> int:
        """All ranks."""
        return self.tensor * self.data


def shape_for(ranks: int, *, tensor: int, expert: int, n_experts: int) -> Shape:
    """The mesh of so many ranks.

    Raises:
        ConfigError: sizes that do not come out even, with the equation that fails.
    """
    if min(ranks, tensor, expert, n_experts) < 1:
        raise ConfigError(
            f"ranks {ranks}, tensor {tensor}, expert {expert} and {n_experts} experts; expected 1 "
            "or more of each: correct [parallel]"
        )
    if ranks % (tensor * expert):
        raise ConfigError(
            f"G_tensor * G_expert * G_expert_data = G fails: {tensor} * {expert} * "
            f"{ranks / (tensor * expert):g} = {ranks}, and sizes are whole: start a multiple of "
            f"{tensor * expert} processes, or correct [parallel]"
        )
    if n_experts % expert:
        raise ConfigError(
            f"E / G_expert = {n_experts} / {expert} is not whole; every rank of an expert group "
            "holds as many experts: correct parallel.expert or moe.n_experts"
        )
    return Shape(tensor, expert, ranks // (tensor * expert))


def rank_tables(shape: Shape) -> dict[str, Groups]:
    """The groups of each kind, each with its ranks in order; as DeepSpeed's tables."""
    places = [
        [[_rank(shape, d, e, t) for t in range(shape.tensor)] for e in range(shape.expert)]
        for d in range(shape.expert_data)
    ]
    data, expert, tensor = range(shape.expert_data), range(shape.expert), range(shape.tensor)
    return {
        "tensor": tuple(tuple(places[d][e]) for d in data for e in expert),
        "expert": tuple(tuple(places[d][e][t] for e in expert) for t in tensor for d in data),
        "expert_data": tuple(tuple(places[d][e][t] for d in data) for t in tensor for e in expert),
        "data": tuple(tuple(places[d][e][t] for d in data for e in expert) for t in tensor),
    }


def _rank(shape: Shape, expert_data: int, expert: int, tensor: int) -> int:
    return (expert_data * shape.expert + expert) * shape.tensor + tensor


@dataclass(frozen=True, slots=True)
class Mesh:
    """This rank's groups, and its place in each."""

    shape: Shape
    tensor: dist.ProcessGroup
    expert: dist.ProcessGroup
    expert_data: dist.ProcessGroup
    data: dist.ProcessGroup

    @property
    def tensor_rank(self) -> int:
        """This rank's shard of each split matrix."""
        return dist.get_rank(self.tensor)

    @property
    def expert_rank(self) -> int:
        """Which block of experts this rank holds."""
        return dist.get_rank(self.expert)

    @property
    def data_rank(self) -> int:
        """Which share of a batch this rank sees; ranks of a tensor group see the same."""
        return dist.get_rank(self.data)


def open_mesh(shape: Shape, device: str = "cpu") -> Mesh:
    """The mesh over all ranks of the default group, which must be as many as the shape has.

    Raises:
        ConfigError: they are not.
    """
    if dist.get_world_size() != shape.ranks:
        raise ConfigError(
            f"the mesh has {shape.ranks} ranks and {dist.get_world_size()} processes run; expected "
            "as many: start them with torchrun --nproc-per-node"
        )
    names = ("expert_data", "expert", "tensor")
    sizes = (shape.expert_data, shape.expert, shape.tensor)
    mesh = init_device_mesh(device, sizes, mesh_dim_names=names)
    data: DeviceMesh = mesh["expert_data", "expert"]._flatten("data")  # noqa: SLF001 - torch's own name
    return Mesh(
        shape=shape,
        tensor=mesh.get_group("tensor"),
        expert=mesh.get_group("expert"),
        expert_data=mesh.get_group("expert_data"),
        data=data.get_group(),
    )
