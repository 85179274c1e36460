"""Losses calibrated to a device's own label counts: one change to the logits, made once.

In each, what depends on the counts is a vector over classes, (classes,), found before the
first step; a step adds it to the logits or multiplies by it.
"""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from federation.learning.losses.objective import (
    BuildObjective,
    Objective,
    OutputTerm,
    Pass,
    Scene,
)
from federation.learning.losses.terms import number_in, surprise

ABSENT = 1e-8
"""How many samples FedLC takes a class to have here that has none: its margin stays finite."""


def smooth_prior(counts: Tensor, eps: float) -> Tensor:
    """The shares of the classes, mixed with the uniform: (1 - eps) counts/sum + eps/C."""
    return counts * ((1.0 - eps) / counts.sum(-1, keepdim=True)) + eps / counts.shape[-1]


def calibrated_softmax(prior: Tensor) -> OutputTerm:
    """Cross entropy of the softmax that is weighted by a prior over the classes, (classes,).

    softmax(z + log q): the logits need not learn what the prior says. A class of prior zero
    is left out of the softmax.
    """
    shift = prior.log()[..., None, :]

    def term(done: Pass) -> Tensor:
        return surprise(done, done.logits + shift, done.labels)

    return term


def label_margin(counts: Tensor, tau: float) -> OutputTerm:
    """Cross entropy of softmax(z - tau n^(-1/4)): the fewer samples, the wider the margin."""
    margin = (tau * counts.clamp_min(ABSENT).pow(-0.25))[..., None, :]

    def term(done: Pass) -> Tensor:
        return surprise(done, done.logits - margin, done.labels)

    return term


def restricted_softmax(counts: Tensor, alpha: float) -> OutputTerm:
    """Cross entropy where the logits of classes without samples here are scaled by alpha."""
    scale = torch.where(counts > 0, 1.0, alpha)[..., None, :]

    def term(done: Pass) -> Tensor:
        return surprise(done, done.logits * scale, done.labels)

    return term


def _calibrated(scene: Scene) -> Objective:
    eps = number_in(scene, "eps", 0.0, 1.0)
    return Objective(calibrated_softmax(smooth_prior(scene.counts, eps)))


def _margin(scene: Scene) -> Objective:
    return Objective(label_margin(scene.counts, number_in(scene, "tau")))


def _restricted(scene: Scene) -> Objective:
    return Objective(restricted_softmax(scene.counts, number_in(scene, "alpha", 0.0, 1.0)))


OBJECTIVES: Mapping[str, BuildObjective] = MappingProxyType(
    {
        "calibrated_softmax": _calibrated,
        "label_margin": _margin,
        "restricted_softmax": _restricted,
    }
)
