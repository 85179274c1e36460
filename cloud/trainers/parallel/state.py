"""The state of a sharded model: every rank steps a share of it, a tile at a time.

ZeRO, stage 1: gradients are reduced and scattered over the data group, each rank keeps float32
parameters and moments of its share only, and what it stepped is gathered (TED,
arXiv:2303.06318, section III). Experts have a data group of their own, E times smaller, so their
share is E times larger; up-cast at once it would be a spike of memory that grows with E. So the
step walks over it in tiles of fixed size, with one float32 buffer (section IV).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cloud.trainers.parallel.mesh import Mesh
from cloud.trainers.parallel.shards import Cut, cuts_of, join, split
from cloud.trainers.plans import OptimizerPlan
from cloud.trainers.state import make_optimizer
from federation.errors import TrainingError

TILE = 178_956_971
"""Parameters a tile: at 6 bytes each (float32 and 16 bits) that is one GiB. The paper's text says
1.8 million; its code has this number."""


@dataclass(slots=True, eq=False)
class Share:
    """One group's parameters, flat: `gradient` and `flat` are whole, `master` is this rank's."""

    cuts: dict[str, Cut]
    spans: dict[str, slice]
    group: dist.ProcessGroup
    flat: Tensor
    gradient: Tensor
    master: Tensor
    optimizers: list[torch.optim.Optimizer]

    @property
    def own(self) -> slice:
        """Where this rank's share lies in the flat vectors."""
        start = dist.get_rank(self.group) * len(self.master)
        return slice(start, start + len(self.master))


class ShardedState:
    """As `cloud.trainers.state.TrainingState`, for a model that `parallelize` has split.

    Args:
        model: on the device it shall train on.
        mesh: over which it was split.
        plan: the optimizer.
        compute: the type the model computes with.
        tile: so many parameters are stepped at a time.
    """

    def __init__(
        self,
        model: nn.Module,
        mesh: Mesh,
        plan: OptimizerPlan,
        *,
        compute: torch.dtype = torch.float32,
        tile: int = TILE,
    ) -> None:
        self._mesh, self._compute = mesh, compute
        cuts = cuts_of(model)
        self.shares = [
            self._share({n: c for n, c in cuts.items() if c.is_expert is kind}, group, plan, tile)
            for kind, group in ((False, mesh.data), (True, mesh.expert_data))
        ]
        self.reduced_bytes = 0
        self.peak_buffer_bytes = 0

    def _share(
        self, cuts: dict[str, Cut], group: dist.ProcessGroup, plan: OptimizerPlan, tile: int
    ) -> Share:
        spans, start = {}, 0
        for name, cut in cuts.items():
            spans[name] = slice(start, start + cut.parameter.numel())
            start = spans[name].stop
        ranks = dist.get_world_size(group)
        each = -(-start // ranks)
        device = next((cut.parameter.device for cut in cuts.values()), None)
        whole = torch.zeros(each * ranks, device=device)
        for name, cut in cuts.items():
            whole[spans[name]] = cut.parameter.detach().float().reshape(-1)
        rank = dist.get_rank(group)
        master = whole[rank * each : (rank + 1) * each].clone()
        flat = whole.to(self._compute)
        gradient = torch.zeros_like(flat)
        for name, cut in cuts.items():
            cut.parameter.grad = None
            cut.parameter.data = flat[spans[name]].view(cut.parameter.shape)
            cut.parameter.grad = gradient[spans[name]].view(cut.parameter.shape)
        optimizers = [make_optimizer(part, plan) for part in torch.split(master, tile)]
        return Share(cuts, spans, group, flat, gradient, master, optimizers)

    def step(self, learning_rate: float) -> None:
        """Reduce over data groups, step this rank's shares, and gather the new parameters."""
        for share in self.shares:
            mine = self._scattered(share)
            # An expert's gradient already adds up the tokens of its whole expert group, so a mean
            # over the batch divides by the data ranks of all that is no expert, here too.
            mine.div_(self._mesh.shape.data)
            start = 0
            for vector, optimizer in _tiles(share):
                self._step_tile(mine[start : start + len(vector)], vector, optimizer, learning_rate)
                start += len(vector)
            share.gradient.zero_()
            _publish(share, self._compute)

    def _scattered(self, share: Share) -> Tensor:
        mine = torch.empty_like(share.master, dtype=self._compute)
        if dist.get_world_size(share.group) == 1:
            return mine.copy_(share.gradient)
        dist.reduce_scatter_single(mine, share.gradient, group=share.group)
        self.reduced_bytes += share.gradient.numel() * share.gradient.element_size()
        return mine

    def _step_tile(
        self,
        gradient: Tensor,
        vector: Tensor,
        optimizer: torch.optim.Optimizer,
        learning_rate: float,
    ) -> None:
        """Up-cast one tile's gradient, step it, and let the buffer go."""
        vector.grad = gradient.float()
        self.peak_buffer_bytes = max(self.peak_buffer_bytes, _bytes(vector.grad))
        for settings in optimizer.param_groups:
            settings["lr"] = learning_rate
        optimizer.step()
        vector.grad = None

    def sizes(self) -> dict[str, int]:
        """The bytes of each kind of state on this rank."""
        sizes = dict.fromkeys(("parameters", "gradients", "master", "moments"), 0)
        for share in self.shares:
            sizes["parameters"] += _bytes(share.flat)
            sizes["gradients"] += _bytes(share.gradient)
            sizes["master"] += _bytes(share.master)
            for optimizer in share.optimizers:
                for moments in optimizer.state.values():
                    sizes["moments"] += sum(_bytes(m) for m in moments.values() if m is not None)
        sizes["temporary"] = self.peak_buffer_bytes
        return sizes

    def weights(self) -> dict[str, Tensor]:
        """The master parameters of the model on one device, float32; all ranks call this."""
        return {
            name.removeprefix("master/"): tensor
            for name, tensor in self.tensors().items()
            if name.startswith("master/")
        }

    def tensors(self) -> dict[str, Tensor]:
        """All state of the model on one device, whatever the mesh: what a checkpoint keeps."""
        found: dict[str, Tensor] = {}
        for share in self.shares:
            for kind, mine in _vectors(share).items():
                whole = _gathered(mine, share.group)
                for name, cut in share.cuts.items():
                    local = whole[share.spans[name]].view(cut.parameter.shape)
                    found[f"{kind}/{name}"] = join(local, cut, self._mesh)
            steps = [m["step"] for o in share.optimizers for m in o.state.values() if "step" in m]
            if steps:
                found["step"] = steps[0].clone()
        return found

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from `tensors` of the same model, split over whatever mesh.

        Raises:
            TrainingError: tensors of another model.
        """
        for share in self.shares:
            kinds = {name.partition("/")[0] for name in tensors if "/" in name}
            own = {kind: self._own(share, kind, tensors) for kind in sorted(kinds)}
            with torch.no_grad():
                share.master.copy_(own.pop("master"))
            start = 0
            for vector, optimizer in _tiles(share):
                window = slice(start, start + len(vector))
                optimizer.state[vector] = {
                    kind: all_[window].to(vector.device, copy=True) for kind, all_ in own.items()
                }
                if "step" in tensors:
                    optimizer.state[vector]["step"] = tensors["step"].clone()
                start = window.stop
            _publish(share, self._compute)

    def _own(self, share: Share, kind: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """This rank's share of one kind of state."""
        whole = torch.zeros(len(share.flat))
        for name, cut in share.cuts.items():
            found = tensors.get(f"{kind}/{name}")
            local = None if found is None else split(found, cut, self._mesh)
            if local is None or local.shape != cut.parameter.shape:
                raise TrainingError(
                    f"the checkpoint has no {kind} of {name!r} that fits; expected shards of shape "
                    f"{tuple(cut.parameter.shape)}: resume with the same model, or start over"
                )
            whole[share.spans[name]] = local.reshape(-1)
        return whole[share.own]


def _tiles(share: Share) -> Iterator[tuple[Tensor, torch.optim.Optimizer]]:
    """The tiles of this rank's share, each a view with its optimizer."""
    for optimizer in share.optimizers:
        yield optimizer.param_groups[0]["params"][0], optimizer


def _publish(share: Share, compute: torch.dtype) -> None:
    """Give the model, and the other ranks, what this one has stepped."""
    share.flat[share.own] = share.master.to(compute)
    if dist.get_world_size(share.group) > 1:
        mine = share.flat[share.own].clone()
        dist.all_gather_single(share.flat, mine, group=share.group)


def _vectors(share: Share) -> dict[str, Tensor]:
    """This rank's share of each kind of state, whole over its tiles."""
    found = {"master": share.master}
    for kind in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
        parts = [o.state[v][kind] for v, o in _tiles(share) if o.state[v].get(kind) is not None]
        if parts:
            found[kind] = torch.cat(parts)
    return found


def _gathered(mine: Tensor, group: dist.ProcessGroup) -> Tensor:
    if dist.get_world_size(group) == 1:
        return mine
    whole = torch.empty(
        len(mine) * dist.get_world_size(group), dtype=mine.dtype, device=mine.device
    )
    dist.all_gather_single(whole, mine.contiguous(), group=group)
    return whole


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
