"""What a method may look at, of members side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from federation.learning.cohort.task import Member
from federation.learning.layers import method_part, sample_part
from federation.learning.losses.objective import Scene
from federation.learning.methods import method_named
from federation.learning.models import ForwardPass

CPU = torch.device("cpu")


def scene_of(members: Sequence[Member], model: nn.Module, base: Tensor) -> Scene:
    """The scene of these members, with their bases (K, P)."""
    task, rows = members[0].task, len(members)
    state = {
        name: torch.tensor(tensor).expand(rows, *tensor.shape)
        for name, tensor in method_part(task.weights).items()
    }
    memory = {
        name: torch.from_numpy(np.stack([member.remembered[name] for member in members]))
        for name in members[0].remembered
    }
    taught = {name: _side_by_side(members, name) for name in sample_part(task.weights)}
    return Scene(
        plan=task.plan,
        params=method_named(task.plan.method).settings(task.plan.params),
        counts=torch.from_numpy(np.stack([member.counts for member in members])),
        model=model,
        base=base,
        state=state,
        memory=memory,
        taught=taught,
    )


def _side_by_side(members: Sequence[Member], name: str) -> Tensor:
    """What teachers say of all samples, (K, N, ...), 0 where a member has fewer than N."""
    each = [sample_part(member.task.weights)[name] for member in members]
    said = torch.zeros((len(members), max(map(len, each)), *each[0].shape[1:]))
    for row, tensor in enumerate(each):
        said[row, : len(tensor)] = torch.from_numpy(tensor)
    return said


def part_of(scene: Scene, rows: slice, device: torch.device = CPU) -> Scene:
    """The scene of some of its members, on a device."""

    def part(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor[rows].to(device) for name, tensor in tensors.items()}

    return replace(
        scene,
        counts=scene.counts[rows].to(device),
        base=scene.base[rows].to(device),
        state=part(scene.state),
        memory=part(scene.memory),
        taught=part(scene.taught),
    )


def all_labels(members: Sequence[Member]) -> Tensor:
    """The labels of all local samples, (K, N), -1 where a member has fewer than N."""
    labels = torch.full((len(members), max(member.samples for member in members)), -1)
    for row, member in enumerate(members):
        labels[row, : member.samples] = torch.tensor(member.task.data.y)
    return labels


def all_features(run: ForwardPass, members: Sequence[Member], batch: int = 256) -> Tensor:
    """What the classifier gets for all local samples, (K, N, d)."""
    samples = max(member.samples for member in members)
    parts = []
    for start in range(0, samples, batch):
        width = min(batch, samples - start)
        entries = members[0].task.data.x[0].size
        x = torch.zeros((len(members), width, entries))
        for row, member in enumerate(members):
            piece = member.task.data.x[start : start + width]
            x[row, : len(piece)] = torch.tensor(piece).reshape(len(piece), entries)
        parts.append(run(x)[0])
    return torch.cat(parts, 1)
