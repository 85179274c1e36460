"""Losses of a student whose teacher stays elsewhere: its answers come as labels of the samples.

Where no answers came, a student learns from its own labels alone, by cross entropy.
"""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from federation.errors import TrainingError
from federation.learning.losses.objective import (
    BuildObjective,
    Objective,
    OutputTerm,
    Pass,
    Scene,
    batch_mean,
)
from federation.learning.losses.terms import cross_entropy, divergence, number_in

FEATURES, LOGITS = "features", "logits"
"""What a teacher may say of a sample: what its classifier got, (N, d), and gave, (N, classes)."""

_MIN_TEMPERATURE = 1e-3
_LEAST_POWER = 1e-6  # A teacher that says nothing but 0 is imitated all the same.


def said_of(taught: Tensor, done: Pass) -> Tensor:
    """The rows of this batch: (B, ...) of (N, ...), or (K, B, ...) of (K, N, ...)."""
    if done.indices is None:
        raise TrainingError("this pass does not say of which samples it is: train with the loop")
    if done.indices.ndim == 1:
        return taught[done.indices]
    devices = torch.arange(len(taught), device=taught.device)
    return taught[devices[:, None], done.indices]


def logit_distillation(taught: Tensor, tau: float, weight: float) -> OutputTerm:
    """Cross entropy + weight tau^2 KL(teacher || student), both at temperature tau."""

    def term(done: Pass) -> Tensor:
        mine = (done.logits / tau).log_softmax(-1)
        known = (said_of(taught, done) / tau).softmax(-1)
        return cross_entropy(done) + weight * tau * tau * divergence(done, mine, known)

    return term


def feature_imitation(taught: Tensor, counts: Tensor, weight: float, labels: float) -> OutputTerm:
    """Weight times the mean square of what features lack + labels times the cross entropy.

    It is in parts of the mean square of the teacher's features over the local samples, of which
    there are as many as `counts` come to: a student who says 0 has a distance of 1.
    """
    entries = counts.sum(-1) * taught.shape[-1]
    power = (taught.square().sum((-2, -1)) / entries).clamp_min(_LEAST_POWER)

    def term(done: Pass) -> Tensor:
        away = done.features - said_of(taught, done)
        distance = weight / power * batch_mean(away.square().mean(-1), done.shares)
        return distance + labels * cross_entropy(done) if labels else distance

    return term


def _logit_kd(scene: Scene) -> Objective:
    tau = number_in(scene, "tau", _MIN_TEMPERATURE)
    weight = number_in(scene, "weight")
    if LOGITS not in scene.taught:
        return Objective(cross_entropy)
    return Objective(logit_distillation(_rows(scene, LOGITS, "classes"), tau, weight))


def _simkd(scene: Scene) -> Objective:
    weight, labels = number_in(scene, "weight"), number_in(scene, "labels")
    if FEATURES not in scene.taught:
        return Objective(cross_entropy)
    known = _rows(scene, FEATURES, "features")
    # The classifier is the teacher's, and stays it.
    windows = [window for name, window in scene.windows() if name.startswith("classifier.")]
    term = feature_imitation(known, scene.counts, weight, labels)
    return Objective(term, resting=tuple(windows))


def _rows(scene: Scene, what: str, counted: str) -> Tensor:
    """What the teacher says of each sample, as wide as the student's classifier has it.

    Raises:
        TrainingError: it is of another width.
    """
    known = scene.taught[what]
    classes, features = scene.model.get_parameter("classifier.weight").shape[-2:]
    width = classes if what == LOGITS else features
    if known.ndim != scene.counts.ndim + 1 or known.shape[-1] != width:
        raise TrainingError(
            f"the teacher has {known.shape[-1]} {counted} and the student's classifier {width}: "
            "give the student the teacher's classes, and for simkd the size `projected` of its "
            "features"
        )
    return known


OBJECTIVES: Mapping[str, BuildObjective] = MappingProxyType(
    {"logit_distillation": _logit_kd, "feature_imitation": _simkd}
)
