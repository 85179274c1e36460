"""Losses that correct the drift of a device: SCAFFOLD and FedDyn.

What a device remembers between its trainings lies under `control/<parameter>` (SCAFFOLD's c_i)
and `drift/<parameter>` (FedDyn's gradient over alpha, in units of weights).
"""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from federation.learning.aggregation.corrected import CONTROL, DRIFT
from federation.learning.losses.objective import (
    BuildObjective,
    Ending,
    Leavings,
    Objective,
    Scene,
    Value,
    WeightTerm,
    inner,
)
from federation.learning.losses.terms import cross_entropy, number_in
from federation.learning.submodel import LEARNED


def plain_steps(steps: int, momentum: float) -> float:
    """How many steps of plain SGD move as far as these with momentum, the gradient being constant.

    Momentum starts at rest. Step j of K adds its gradient to all later steps, so it counts
    (1 - m^(K - j + 1)) / (1 - m); this is the sum, from K for m = 0 to nearly K / (1 - m).

    Args:
        steps: K.
        momentum: m, in [0, 1).
    """
    if momentum == 0.0:
        return float(steps)
    return (steps - momentum * (1.0 - momentum**steps) / (1.0 - momentum)) / (1.0 - momentum)


def linear(direction: Tensor) -> WeightTerm:
    """The term <direction, w - w_base>: adds a constant vector (P,) to the gradient."""

    def add(weights: Tensor, base: Tensor, gradient: Tensor) -> Value:
        gradient.add_(direction)
        return inner(direction, weights - base)

    return add


def dynamic(alpha: float, drift: Tensor) -> WeightTerm:
    """FedDyn's regulariser, -<g, w> + alpha/2 ||w - w_base||^2 (arXiv:2111.04263, Eq. 1).

    Its value leaves the constant <g, w_base> out.

    Args:
        alpha: how strongly devices are held together, above 0.
        drift: g / alpha, (P,).
    """

    def add(weights: Tensor, base: Tensor, gradient: Tensor) -> Value:
        away = weights - base
        gradient.add_(away, alpha=alpha).add_(drift, alpha=-alpha)
        return alpha * (0.5 * inner(away, away) - inner(drift, away))

    return add


def _scaffold(scene: Scene) -> Objective:
    shared, own = scene.flat(scene.state, CONTROL), scene.flat(scene.memory, CONTROL)
    start, plan = _start(scene), scene.plan

    def finish(ending: Ending) -> Leavings:
        change = torch.zeros_like(own)
        if ending.steps:
            length = plain_steps(ending.steps, plan.momentum) * plan.learning_rate
            change = (start - ending.weights) / length - shared
        answer = scene.named(change, CONTROL)
        return Leavings(
            {name: tensor for name, tensor in answer.items() if name in scene.state},
            scene.named(own + change, CONTROL),
        )

    return Objective(cross_entropy, (linear(shared - own),), finish)


def _feddyn(scene: Scene) -> Objective:
    alpha, drift = number_in(scene, "alpha", 1e-12), scene.flat(scene.memory, DRIFT)

    def finish(ending: Ending) -> Leavings:
        return Leavings(memory=scene.named(drift - (ending.weights - scene.base), DRIFT))

    return Objective(cross_entropy, (dynamic(alpha, drift),), finish)


def _start(scene: Scene) -> Tensor:
    """The weights before the first step: what was learned without the hub, else the base."""
    begin = {name: torch.tensor(t) for name, t in scene.named(scene.base, LEARNED).items()}
    for name, base in begin.items():
        learned = scene.memory.get(name)
        begin[name] = base if learned is None or learned.shape != base.shape else learned
    return scene.flat(begin, LEARNED)


OBJECTIVES: Mapping[str, BuildObjective] = MappingProxyType(
    {"control_variates": _scaffold, "dynamic": _feddyn}
)
