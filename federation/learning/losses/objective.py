"""What one method minimises on one device: terms, what they may look at, what they leave.

All of it may also be of K devices at once, which only sit side by side: then every tensor has a
first dimension K more than is said here, and a term gives (K,) in place of a scalar. So terms
count dimensions from the last.

Two kinds of term: an `OutputTerm` looks at one forward pass and is differentiated by autograd; a
`WeightTerm` looks at the weights themselves, knows its own gradient and adds it in place, which
for all weights in one flat vector costs two operations.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor, nn

from federation.protocol.codec import Weights
from federation.protocol.messages import LocalPlan


@dataclass(frozen=True, slots=True, eq=False)
class Pass:
    """One forward pass over a batch of B samples.

    `features`, (B, d), is what the classifier gets; `logits` are (B, classes). `exits` are the
    logits of every exit of a model that has several, the deepest last; else it is empty.
    `shares`, (K, B), are of K devices only: the part of each sample in its device's mean, 0
    where a smaller batch is filled up. `indices`, (B,), say which of the local samples these are.
    """

    x: Tensor
    labels: Tensor
    features: Tensor
    logits: Tensor
    exits: tuple[Tensor, ...] = ()
    shares: Tensor | None = None
    indices: Tensor | None = None


def batch_mean(values: Tensor, shares: Tensor | None) -> Tensor:
    """The mean over the batch, the last dimension of these values, with a pass's shares."""
    return values.mean(-1) if shares is None else (values * shares).sum(-1)


OutputTerm: TypeAlias = Callable[[Pass], Tensor]
"""The mean over the batch, a scalar."""

Value: TypeAlias = float | Tensor
"""What a term over the weights comes to: a number, or (K,) of K devices."""

WeightTerm: TypeAlias = Callable[[Tensor, Tensor, Tensor], Value]
"""(weights, base, gradient), each (P,): add to the gradient, return the term's value."""


def inner(one: Tensor, other: Tensor) -> Value:
    """The inner product of two vectors (P,), or of each of K pairs of them."""
    if one.ndim == 1:
        return float(torch.dot(one, other))
    return (one * other).sum(-1)


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """What a method may look at before the first step of a training on one device.

    `params` are the method's numbers, all of them. `counts`, (classes,), float32, are the local
    samples of each class. `model` is the one in training, with the weights it begins from;
    its last module is `classifier`. `base` is those weights as one vector (P,), in the order of
    `model.named_parameters()`. `state` are the hub's tensors beside the model, `memory` what
    this device kept of its last training in the same run, both by name. `taught`, (N, ...), are
    those of the hub's tensors that say something of each of the N local samples.
    """

    plan: LocalPlan
    params: Mapping[str, float]
    counts: Tensor
    model: nn.Module
    base: Tensor
    state: Mapping[str, Tensor]
    memory: Mapping[str, Tensor]
    taught: Mapping[str, Tensor] = field(default_factory=dict)

    def flat(self, tensors: Mapping[str, Tensor], prefix: str) -> Tensor:
        """The tensors `<prefix>/<parameter>` as one vector (P,); zero where there is none."""
        devices = self.base.shape[:-1]
        parts = [
            tensors.get(f"{prefix}/{name}", torch.zeros_like(parameter)).reshape(*devices, -1)
            for name, parameter in self.model.named_parameters()
        ]
        return torch.cat([part.detach() for part in parts], -1)

    def named(self, flat: Tensor, prefix: str) -> Weights:
        """The other way: the vector (P,) as arrays `<prefix>/<parameter>`."""
        named = {f"{prefix}/{name}": piece for name, piece in self._pieces(flat)}
        return {name: piece.numpy().copy() for name, piece in named.items()}

    def frozen(self) -> nn.Module:
        """A copy of the model with the weights it begins from, which no step changes: a teacher."""
        teacher = copy.deepcopy(self.model).requires_grad_(requires_grad=False).eval()
        for parameter, (_, piece) in zip(
            teacher.parameters(), self._pieces(self.base), strict=True
        ):
            parameter.data.copy_(piece)
        return teacher

    def windows(self) -> Iterator[tuple[str, slice]]:
        """Each parameter's part of a vector (P,), by the parameter's name."""
        start, devices = 0, max(1, math.prod(self.base.shape[:-1]))
        for name, parameter in self.model.named_parameters():
            stop = start + parameter.numel() // devices
            yield name, slice(start, stop)
            start = stop

    def _pieces(self, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Each parameter's part of a vector (P,), in its shape, by the parameter's name."""
        shapes = [parameter.shape for parameter in self.model.parameters()]
        for (name, window), shape in zip(self.windows(), shapes, strict=True):
            yield name, flat[..., window].reshape(shape)


@dataclass(frozen=True, slots=True, eq=False)
class Ending:
    """A training that is over: the weights (P,), the steps done, and the local data.

    `features` gives the classifier's inputs (N, d) of all local samples, with the trained
    weights; `labels` are theirs, (N,), and -1 where there is no sample: devices side by side may
    have more and fewer.
    """

    weights: Tensor
    steps: int
    features: Callable[[], Tensor]
    labels: Tensor


@dataclass(frozen=True, slots=True)
class Leavings:
    """What a training leaves beside the weights.

    `state` goes to the hub with the update: the device's own answer to each tensor of the
    hub's state, under the same name and of the same shape. `memory` stays on the device, for
    its next training in the same run. Both are of one device, or of K as all tensors here.
    """

    state: Weights = field(default_factory=dict)
    memory: Weights = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Objective:
    """One term over a forward pass, terms over weights, and what to do at the end.

    `resting` are windows of the weights (P,) that no step changes, by weight decay neither.
    """

    output: OutputTerm
    on_weights: tuple[WeightTerm, ...] = ()
    finish: Callable[[Ending], Leavings] | None = None
    resting: tuple[slice, ...] = ()


Likeness: TypeAlias = Callable[[Tensor], int]
"""What of a device's samples of each class, (classes,), decides which terms it has."""

BuildObjective: TypeAlias = Callable[[Scene], Objective]
