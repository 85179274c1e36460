"""Losses of models with several exits: all learn, and learn from each other.

On a model with one exit they are the plain cross entropy.
"""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional

from federation.learning.losses.objective import (
    BuildObjective,
    Objective,
    Pass,
    Scene,
    batch_mean,
)
from federation.learning.losses.terms import cross_entropy, number_in, surprise


def mutual_distillation(exits: tuple[Tensor, ...], shares: Tensor | None = None) -> Tensor:
    """The sum over exits of the mean KL divergence from each of the others, in nats.

    Each exit is pupil once, the others its teachers, whose answers are taken as given; the
    batch is averaged over. It needs two exits or more. `shares` are those of a `Pass`.
    """
    logs = torch.stack([functional.log_softmax(logits, -1) for logits in exits])
    taught = logs.detach()
    probabilities = taught.exp()
    # KL(j || i) = sum_c p_j log p_j - p_j log p_i; j = i adds nothing.
    known = (probabilities * taught).sum(-1)
    crossed = torch.einsum("j...bc,i...bc->ji...b", probabilities, logs)
    divergence = batch_mean(known[:, None] - crossed, shares)
    among = divergence.sum((0, 1)) - divergence.diagonal().sum(-1)
    return among / (len(exits) - 1)


def _sum_over_exits(scene: Scene) -> Objective:
    """DepthFL: the cross entropies of all exits, and what they teach each other."""
    distill = number_in(scene, "distill")

    def loss(done: Pass) -> Tensor:
        if len(done.exits) < 2:
            return cross_entropy(done)
        total = torch.stack([surprise(done, e, done.labels) for e in done.exits]).sum(0)
        return total + distill * mutual_distillation(done.exits, done.shares) if distill else total

    return Objective(loss)


def _mean_over_exits(scene: Scene) -> Objective:
    """The deepest exit's cross entropy, the others' by a share, and what they teach each other."""
    shallow, distill = number_in(scene, "shallow"), number_in(scene, "distill")

    def loss(done: Pass) -> Tensor:
        total = cross_entropy(done)
        if len(done.exits) < 2:
            return total
        others = [surprise(done, e, done.labels) for e in done.exits[:-1]]
        total = total + shallow * torch.stack(others).mean(0)
        if distill:
            total = total + distill * mutual_distillation(done.exits, done.shares) / len(done.exits)
        return total

    return Objective(loss)


OBJECTIVES: Mapping[str, BuildObjective] = MappingProxyType(
    {"exits": _mean_over_exits, "mutual_exits": _sum_over_exits}
)
