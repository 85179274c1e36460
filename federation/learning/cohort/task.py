"""What a cohort is asked to train, and which of it can be trained side by side."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
import torch
from torch import Tensor

from federation.learning.data import LocalData
from federation.learning.layers import method_part
from federation.learning.losses import LIKENESSES
from federation.learning.methods import method_named
from federation.learning.models import check_samples, sizes_of
from federation.learning.submodel import OWN, RESIDUAL
from federation.learning.training import total_steps
from federation.protocol.codec import Weights
from federation.protocol.messages import LocalPlan


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """One client's training: what `train_locally` is given."""

    weights: Weights
    data: LocalData
    plan: LocalPlan
    memory: Weights = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """A task of a cohort, seen through: its place there, its steps, and its label counts.

    `remembered` is what a method may look at of the memory.
    """

    place: int
    task: Task
    steps: int
    counts: Tensor
    remembered: Weights

    @property
    def samples(self) -> int:
        """The local samples."""
        return self.task.data.samples


def see_through(place: int, task: Task) -> Member:
    """The task as a member of a cohort.

    Raises:
        TrainingError: what `train_locally` would refuse before it builds the model.
        ConfigError: likewise.
    """
    plan, data = task.plan, task.data
    steps = total_steps(plan, data.samples)
    check_samples(plan.model, data)
    counts = np.bincount(data.y, minlength=sizes_of(plan.model)["classes"])
    kept = {
        name: tensor
        for name, tensor in task.memory.items()
        if name.partition("/")[0] not in {OWN, RESIDUAL}
    }
    return Member(place, task, steps, torch.tensor(counts, dtype=torch.float32), kept)


def likeness(member: Member) -> Hashable:
    """What all members of a group have in common, so that one objective can be that of all."""
    task, plan = member.task, member.task.plan
    model = plan.model.name, tuple(sorted(plan.model.sizes.items()))
    numbers = plan.epochs, plan.max_steps, plan.batch_size, plan.learning_rate
    memory = tuple(sorted((name, t.shape) for name, t in member.remembered.items()))
    counted = LIKENESSES.get(method_named(plan.method).loss)
    return (
        model,
        *numbers,
        plan.momentum,
        plan.weight_decay,
        plan.method,
        tuple(sorted(plan.params.items())),
        math.prod(task.data.x.shape[1:]),
        memory,
        # What the hub sends beside the model is looked at as one.
        id(task.weights) if method_part(task.weights) else 0,
        counted(member.counts) if counted is not None else 0,
    )


def groups_of(members: Sequence[Member]) -> list[list[Member]]:
    """Members that are alike, those with the most steps first."""
    groups: dict[Hashable, list[Member]] = {}
    for member in members:
        groups.setdefault(likeness(member), []).append(member)
    return [sorted(group, key=lambda m: -m.steps) for group in groups.values()]


def same_plan(plan: LocalPlan) -> LocalPlan:
    """The plan without what may differ between members of a group."""
    return msgspec.structs.replace(plan, seed=0, layers=None)
