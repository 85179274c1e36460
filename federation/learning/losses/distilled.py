"""Losses that keep what the global model knows: distillation and contrast.

The teacher is the model as it came from the hub. Its answers are found anew for each batch,
so a step costs one more forward pass.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from federation.learning.losses.calibrated import calibrated_softmax, smooth_prior
from federation.learning.losses.objective import (
    BuildObjective,
    Ending,
    Leavings,
    Likeness,
    Objective,
    OutputTerm,
    Pass,
    Scene,
    batch_mean,
)
from federation.learning.losses.terms import cross_entropy, divergence, number_in
from federation.learning.models import forward_pass

Teacher: TypeAlias = Callable[[Tensor], Tensor]
"""Samples to what a model that rests says of them: its logits, or its features."""

PREVIOUS = "previous"
"""Of a MOON device's memory: the weights at the end of its last training."""

_NEVER = -1e9  # Below any logit, and finite: infinity times a probability of zero is no number.
_MIN_TEMPERATURE = 1e-3


def not_true_distillation(teacher: Teacher, tau: float) -> OutputTerm:
    """tau^2 KL(teacher || model) over the classes that are not the label, at temperature tau."""

    def term(done: Pass) -> Tensor:
        true = done.labels[..., None]
        mine = (done.logits / tau).scatter(-1, true, _NEVER).log_softmax(-1)
        known = (teacher(done.x) / tau).scatter(-1, true, _NEVER).softmax(-1)
        return tau * tau * divergence(done, mine, known)

    return term


def vacant_distillation(teacher: Teacher, counts: Tensor) -> OutputTerm:
    """KL(teacher || model) over the classes of which the device has no sample.

    Devices side by side have none of equally many classes.
    """
    vacant = torch.nonzero(counts == 0)[:, -1].reshape(*counts.shape[:-1], 1, -1)

    def over_vacant(logits: Tensor) -> Tensor:
        return logits.gather(-1, vacant.expand(*logits.shape[:-1], -1))

    def term(done: Pass) -> Tensor:
        mine = over_vacant(done.logits).log_softmax(-1)
        return divergence(done, mine, over_vacant(teacher(done.x)).softmax(-1))

    return term


def logit_suppression(counts: Tensor) -> OutputTerm:
    """Logits of classes where they are not the label: sum_c p(c) log E[1(y != c) exp(z_c)].

    p are the device's shares of labels. A class that is the label of the whole batch has no
    term in it: there is nothing to suppress.
    """
    shares = counts / counts.sum(-1, keepdim=True)

    def term(done: Pass) -> Tensor:
        others = done.logits.scatter(-1, done.labels[..., None], _NEVER)
        samples: float | Tensor = math.log(done.labels.shape[-1])
        if done.shares is not None:
            others = others.masked_fill(done.shares[..., None] == 0.0, _NEVER)
            samples = (done.shares > 0.0).sum(-1, keepdim=True).log()
        total = others.logsumexp(-2)
        return torch.where(total > 0.5 * _NEVER, (total - samples) * shares, 0.0).sum(-1)

    return term


def contrast(world: Teacher, previous: Teacher, tau: float) -> OutputTerm:
    """-log of softmax((sim(h, h_global), sim(h, h_previous)) / tau) at the first, a mean.

    Args:
        world: gives the features (B, d) of the global model.
        previous: gives those of the device's own model, as it was after its last training.
        tau: temperature of the cosine similarities.
    """

    def term(done: Pass) -> Tensor:
        towards = functional.cosine_similarity(done.features, world(done.x), -1)
        back = functional.cosine_similarity(done.features, previous(done.x), -1)
        return batch_mean(functional.softplus((back - towards) / tau), done.shares)

    return term


def _weighted(parts: list[tuple[float, OutputTerm]], first: OutputTerm) -> OutputTerm:
    def term(done: Pass) -> Tensor:
        loss = first(done)
        for share, part in parts:
            loss = loss + share * part(done)
        return loss

    return term


def _not_true(scene: Scene) -> Objective:
    beta, tau = number_in(scene, "beta"), number_in(scene, "tau", _MIN_TEMPERATURE)
    extra = not_true_distillation(_logits_of(scene.frozen()), tau)
    return Objective(_weighted([(beta, extra)] if beta > 0.0 else [], cross_entropy))


def _vacant(scene: Scene) -> Objective:
    eps, lam = number_in(scene, "eps", 0.0, 1.0), number_in(scene, "lam")
    suppression = number_in(scene, "suppression")
    parts: list[tuple[float, OutputTerm]] = []
    # Over a single class every softmax is 1, and there is nothing to distil.
    if lam > 0.0 and vacancies(scene.counts) > 1:
        parts.append((lam, vacant_distillation(_logits_of(scene.frozen()), scene.counts)))
    if suppression > 0.0:
        parts.append((suppression, logit_suppression(scene.counts)))
    return Objective(_weighted(parts, calibrated_softmax(smooth_prior(scene.counts, eps))))


def vacancies(counts: Tensor) -> int:
    """Of how many classes there is no sample here; devices side by side are alike in this."""
    return int((counts == 0).sum(-1).max())


def _contrastive(scene: Scene) -> Objective:
    mu, tau = number_in(scene, "mu"), number_in(scene, "tau", _MIN_TEMPERATURE)
    parts: list[tuple[float, OutputTerm]] = []
    if mu > 0.0 and (previous := _previous(scene)) is not None:
        term = contrast(_features_of(scene.frozen()), _features_of(previous), tau)
        parts.append((mu, term))

    def finish(ending: Ending) -> Leavings:
        return Leavings(memory=scene.named(ending.weights, PREVIOUS))

    return Objective(_weighted(parts, cross_entropy), finish=finish)


def _previous(scene: Scene) -> nn.Module | None:
    """The device's model after its last training; None if there was none of this model."""
    model = scene.frozen()
    for name, parameter in model.named_parameters():
        kept = scene.memory.get(f"{PREVIOUS}/{name}")
        if kept is None or kept.shape != parameter.shape:
            return None
        parameter.data.copy_(kept)
    return model


def _logits_of(model: nn.Module) -> Teacher:
    run = forward_pass(model)
    return lambda x: run(x)[1]


def _features_of(model: nn.Module) -> Teacher:
    run = forward_pass(model)
    return lambda x: run(x)[0]


OBJECTIVES: Mapping[str, BuildObjective] = MappingProxyType(
    {
        "not_true_distillation": _not_true,
        "vacant_distillation": _vacant,
        "contrastive": _contrastive,
    }
)
LIKENESSES: Mapping[str, Likeness] = MappingProxyType({"vacant_distillation": vacancies})
