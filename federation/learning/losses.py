"""What local training minimises, as terms that add up.

Two kinds of term: an `OutputTerm` looks at the model's outputs and is differentiated by
autograd; a `WeightTerm` looks at the weights themselves, knows its own gradient and adds it
in place, which for all weights in one flat vector costs two operations. An `Objective` is
one output term and any number of weight terms; `OBJECTIVES` builds one from the numbers in
a plan.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

OutputTerm: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(logits (B, classes), labels (B,)) -> the mean over the batch, a scalar."""

WeightTerm: TypeAlias = Callable[[Tensor, Tensor, Tensor], float]
"""(weights, base, gradient), each (P,): add to the gradient, return the term's value."""


@dataclass(frozen=True, slots=True)
class Objective:
    """One term over outputs, and terms over weights that are added to it."""

    output: OutputTerm
    on_weights: tuple[WeightTerm, ...] = ()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean negative log-likelihood of the labels, in nats."""
    return functional.cross_entropy(logits, labels)


def proximal(mu: float) -> WeightTerm:
    """FedProx's pull towards the base: mu/2 ||w - w_base||^2 (arXiv:1812.06127, Eq. 2)."""

    def add(weights: Tensor, base: Tensor, gradient: Tensor) -> float:
        away = weights - base
        gradient.add_(away, alpha=mu)
        return 0.5 * mu * float(torch.dot(away, away))

    return add


def _plain(_params: Mapping[str, float]) -> Objective:
    return Objective(cross_entropy)


def _proximal(params: Mapping[str, float]) -> Objective:
    return Objective(cross_entropy, (proximal(params["mu"]),))


OBJECTIVES: Mapping[str, Callable[[Mapping[str, float]], Objective]] = MappingProxyType(
    {"cross_entropy": _plain, "proximal": _proximal}
)
"""Objectives by the name a method gives; each takes the method's numbers, all of them."""
