"""What a cohort is asked to train, and which of it can be trained side by side."""

import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from federation.learning.data import LocalData
from federation.learning.layers import method_part, sample_part
from federation.learning.losses import LIKENESSES
from federation.learning.methods import method_named
from federation.learning.models import check_samples, sizes_of
from federation.learning.samples import check_taught
from federation.learning.submodel import OWN, RESIDUAL
from federation.learning.training import count_steps, total_steps
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

    `counts`, (classes,), are the local samples of each class, `remembered` is what a method may
    look at of the memory.
    """

    place: int
    task: Task
    samples: int
    steps: int
    counts: NDArray[np.float32]
    remembered: Weights


class Sorter:
    """Sees through the tasks of a cohort, and puts together those that are alike.

    What is alike in many plans is looked at once.
    """

    def __init__(self) -> None:
        self._classes: dict[Hashable, int] = {}
        self._groups: dict[Hashable, list[Member]] = {}

    def add(self, place: int, task: Task) -> None:
        """Take up this task.

        Raises:
            TrainingError: what `train_locally` would refuse before it builds the model.
            ConfigError: likewise.
        """
        plan, data = task.plan, task.data
        kind = _kind(plan)
        samples, entries = data.samples, data.x.shape[1:]
        if (classes := self._classes.get((kind, entries))) is None:
            check_samples(plan.model, data)
            total_steps(plan, samples)
            method_named(plan.method).settings(plan.params)
            classes = self._classes[kind, entries] = sizes_of(plan.model)["classes"]
        check_taught(task.weights, data)
        if samples == 0 or data.y.min() < 0 or data.y.max() >= classes:
            check_samples(plan.model, data)
        counts = np.bincount(data.y, minlength=classes).astype(np.float32)
        kept = _remembered(task.memory) if task.memory else {}
        member = Member(place, task, samples, count_steps(plan, samples), counts, kept)
        self._groups.setdefault((kind, _likeness(member)), []).append(member)

    def groups(self) -> Iterator[list[Member]]:
        """Members that are alike, those with the most steps first."""
        for group in self._groups.values():
            yield sorted(group, key=lambda member: -member.steps)


def _kind(plan: LocalPlan) -> Hashable:
    """What plans must have in common: all but the seed, and the layers that travel."""
    return (
        (plan.model.name, *sorted(plan.model.sizes.items())),
        (plan.method, *sorted(plan.params.items())),
        (plan.epochs, plan.max_steps, plan.batch_size),
        (plan.learning_rate, plan.momentum, plan.weight_decay),
    )


def _likeness(member: Member) -> Hashable:
    """What else, so that one objective can be that of all."""
    task = member.task
    counted = LIKENESSES.get(method_named(task.plan.method).loss)
    return (
        math.prod(task.data.x.shape[1:]),
        tuple(sorted((name, tensor.shape) for name, tensor in member.remembered.items())),
        # What the hub sends beside the model is looked at as one.
        id(task.weights) if method_part(task.weights) else 0,
        tuple((name, said.shape[1:]) for name, said in sample_part(task.weights).items()),
        counted(torch.from_numpy(member.counts)) if counted is not None else 0,
    )


def _remembered(memory: Weights) -> Weights:
    hidden = {OWN, RESIDUAL}
    return {name: t for name, t in memory.items() if name.partition("/")[0] not in hidden}
