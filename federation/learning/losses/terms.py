"""The plain terms: cross entropy, and FedProx's pull towards the base."""

from collections.abc import Mapping
from types import MappingProxyType

from torch import Tensor
from torch.nn import functional

from federation.errors import TrainingError
from federation.learning.losses.objective import (
    BuildObjective,
    Objective,
    Pass,
    Scene,
    Value,
    WeightTerm,
    batch_mean,
    inner,
)


def cross_entropy(done: Pass) -> Tensor:
    """The mean negative log-likelihood of the labels, in nats."""
    return surprise(done, done.logits, done.labels)


def surprise(done: Pass, logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over the batch of -log softmax(logits) at these labels, in nats."""
    if done.shares is None:
        return functional.cross_entropy(logits, labels)
    each = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return batch_mean(each.view(labels.shape), done.shares)


def divergence(done: Pass, mine: Tensor, known: Tensor) -> Tensor:
    """The mean over the batch of KL(known || exp(mine)) over the last dimension, in nats."""
    if done.shares is None:
        return functional.kl_div(mine, known, reduction="batchmean")
    return batch_mean(functional.kl_div(mine, known, reduction="none").sum(-1), done.shares)


def proximal(mu: float) -> WeightTerm:
    """FedProx's pull towards the base: mu/2 ||w - w_base||^2 (arXiv:1812.06127, Eq. 2)."""

    def add(weights: Tensor, base: Tensor, gradient: Tensor) -> Value:
        away = weights - base
        gradient.add_(away, alpha=mu)
        return 0.5 * mu * inner(away, away)

    return add


def number_in(scene: Scene, name: str, low: float = 0.0, high: float = 1e6) -> float:
    """A number of the method, checked.

    Raises:
        TrainingError: it is not a number between `low` and `high`.
    """
    value = scene.params[name]
    if not low <= value <= high:
        raise TrainingError(
            f"the plan has {name} = {value} for {scene.plan.method!r}; expected a number "
            f"from {low:g} to {high:g}: correct the plan"
        )
    return value


def _plain(_scene: Scene) -> Objective:
    return Objective(cross_entropy)


def _proximal(scene: Scene) -> Objective:
    return Objective(cross_entropy, (proximal(number_in(scene, "mu")),))


OBJECTIVES: Mapping[str, BuildObjective] = MappingProxyType(
    {"cross_entropy": _plain, "proximal": _proximal}
)
