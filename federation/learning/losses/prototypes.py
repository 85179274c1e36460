"""ReBaFL's loss: a calibrated softmax, and a batch rebalanced by prototypes (arXiv:2303.06314).

A prototype g_c is the mean of what the classifier gets for samples of class c. A sample's
deviation from the prototype of its own class is carried over to another's, so the classifier
also sees classes that the device does not have. Shapes: B samples, d features, C classes.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from federation.errors import TrainingError
from federation.learning.aggregation.prototypes import COUNT, MEAN
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
)
from federation.learning.losses.terms import cross_entropy, number_in, surprise


class Prototypes:
    """The class means (C, d) that the hub knows, and which classes it knows none of."""

    def __init__(self, means: Tensor, known: Tensor) -> None:
        self.means, self.known = means, known
        self.complete = bool(known.all())
        self._turns = torch.arange(0, device=means.device)

    def move(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The i-th sample (of B) as one of class i mod C, where both prototypes are known.

        Returns:
            Features h + g_t - g_y, (B, d), cut off from what gave h, and their labels t, (B,);
            h and y themselves where a prototype is missing.
        """
        size, classes = labels.shape[-1], self.means.shape[-2]
        if len(self._turns) < size:
            self._turns = torch.arange(size, device=labels.device).remainder(classes)
        becomes = self._turns[:size].expand(labels.shape)
        if not self.complete:
            both = self.known.gather(-1, becomes) & self.known.gather(-1, labels)
            becomes = torch.where(both, becomes, labels)
        return features.detach() + (self._of(becomes) - self._of(labels)), becomes

    def _of(self, labels: Tensor) -> Tensor:
        return torch.take_along_dim(self.means, labels[..., None], -2)


def augmentation(prototypes: Prototypes, classifier: nn.Module, eps: float | None) -> OutputTerm:
    """L_aug: the classifier's loss on the moved batch; no other layer feels it.

    Args:
        prototypes: where to move.
        classifier: the module that is trained.
        eps: smooths the label shares of the moved batch, which are the prior of its
            softmax; without it the softmax is the plain one.
    """
    shifts: dict[int, Tensor] = {}

    def shift_of(done: Pass, labels: Tensor, eps: float) -> Tensor:
        # With all prototypes known, the moved labels depend on the size of the batch alone.
        size, alone = labels.shape[-1], done.shares is None
        if prototypes.complete and alone and size in shifts:
            return shifts[size]
        counted = torch.ones(labels.shape) if done.shares is None else done.shares.sign()
        counts = prototypes.means.new_zeros(prototypes.means.shape[:-1])
        counts.scatter_add_(-1, labels, counted)
        shifts[size] = smooth_prior(counts, eps).log()[..., None, :]
        return shifts[size]

    def term(done: Pass) -> Tensor:
        moved, labels = prototypes.move(done.features, done.labels)
        logits = classifier(moved)
        if eps is not None:
            logits = logits + shift_of(done, labels, eps)
        return surprise(done, logits, labels)

    return term


def class_means(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """The mean feature of each class, (C, d), zero where there is none, and how many, (C,).

    A label of -1 is of no sample.
    """
    devices, width = labels.shape[:-1], features.shape[-1]
    rows = classes * math.prod(devices)
    first = torch.arange(0, max(rows, 1), classes).view(*devices, 1) if devices else 0
    # The row after the last is for what is no sample.
    place = torch.where(labels < 0, rows, labels + first).flatten()
    counts = torch.bincount(place, minlength=rows + 1)[:rows].to(torch.float64)
    sums = torch.zeros((rows + 1, width), dtype=torch.float64)
    sums.index_add_(0, place, features.reshape(-1, width).to(torch.float64))
    means = sums[:rows] / counts.clamp_min(1.0)[:, None]
    counts = counts.view(*devices, classes)
    return means.view(*devices, classes, width).to(torch.float32), counts.to(torch.float32)


def has_one_class(counts: Tensor) -> bool:
    """Whether there is a single class here, or none: then there is nothing to rebalance.

    Devices side by side are alike in this.
    """
    return int((counts > 0).sum(-1).max()) < 2


def _rebalanced(scene: Scene) -> Objective:
    eps, lam = number_in(scene, "eps", 0.0, 1.0), number_in(scene, "lam")
    calibrated = number_in(scene, "calibrate", 0.0, 1.0) > 0.0
    means, counts = _checked(scene)
    term = calibrated_softmax(smooth_prior(scene.counts, eps)) if calibrated else cross_entropy
    skewed = has_one_class(scene.counts)
    if lam > 0.0 and not skewed and bool((counts > 0).any()):
        classifier = scene.model.get_submodule("classifier")
        prototypes = Prototypes(means, counts > 0)
        extra = augmentation(prototypes, classifier, eps if calibrated else None)
        term = _sum(term, extra, lam)

    def finish(ending: Ending) -> Leavings:
        silent = torch.zeros_like(means), torch.zeros_like(counts)
        mean, count = (
            silent if skewed else class_means(ending.features(), ending.labels, counts.shape[-1])
        )
        return Leavings({MEAN: mean.numpy(), COUNT: count.numpy()})

    return Objective(term, finish=finish)


def _sum(first: OutputTerm, second: OutputTerm, share: float) -> OutputTerm:
    def term(done: Pass) -> Tensor:
        return first(done) + share * second(done)

    return term


def _checked(scene: Scene) -> tuple[Tensor, Tensor]:
    """The hub's prototypes and their counts, if they are of this model."""
    weight = dict(scene.model.named_parameters()).get("classifier.weight")
    if weight is None:
        raise TrainingError(
            "this model has no classifier of its own; prototypes are of what it gets: "
            "ask for the whole model, or for another method"
        )
    for name, expected in ((MEAN, tuple(weight.shape)), (COUNT, tuple(weight.shape[:-1]))):
        if name not in scene.state or tuple(scene.state[name].shape) != expected:
            found = tuple(scene.state[name].shape) if name in scene.state else "missing"
            raise TrainingError(
                f"{name!r} beside the model is {found}; expected shape {expected}: "
                "start the run's method and model together"
            )
    return scene.state[MEAN], scene.state[COUNT]


OBJECTIVES: Mapping[str, BuildObjective] = MappingProxyType({"rebalanced_softmax": _rebalanced})
LIKENESSES: Mapping[str, Likeness] = MappingProxyType({"rebalanced_softmax": has_one_class})
