"""A loss that leaves a sparse model sparse: what is zero in the base does not move."""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from federation.learning.losses.objective import (
    BuildObjective,
    Objective,
    Scene,
    Value,
    WeightTerm,
)
from federation.learning.losses.terms import cross_entropy
from federation.learning.support import MATRIX


def still(dead: Tensor) -> WeightTerm:
    """Takes the gradient of these entries (P,) away; weight decay and momentum then rest too."""

    def take(_weights: Tensor, _base: Tensor, gradient: Tensor) -> Value:
        gradient.masked_fill_(dead, 0.0)
        return 0.0

    return take


def dead_in(scene: Scene) -> Tensor:
    """Where entries of the base's matrices are zero, (P,)."""
    dead, devices = torch.zeros_like(scene.base, dtype=torch.bool), scene.base.ndim - 1
    parameters = dict(scene.model.named_parameters())
    for name, window in scene.windows():
        if parameters[name].ndim - devices >= MATRIX:
            dead[..., window] = scene.base[..., window] == 0.0
    return dead


def _sparse(scene: Scene) -> Objective:
    return Objective(cross_entropy, (still(dead_in(scene)),))


OBJECTIVES: Mapping[str, BuildObjective] = MappingProxyType({"sparse": _sparse})
