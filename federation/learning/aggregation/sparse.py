"""The mean of a sparse model, which lives after a round where it lived before."""

import numpy as np
from numpy.typing import NDArray

from federation.learning.aggregation.ballot import Ballot, Outcome
from federation.learning.aggregation.mean import weighted_mean
from federation.learning.support import support_of

LEAST = np.finfo(np.float32).tiny
"""Stands for a mean of exactly zero: far below what a product of float32 numbers feels."""


def living_mean(ballot: Ballot) -> Outcome:
    """The mean by weight (FedAvg), in which no entry of a matrix dies.

    Updates may cancel out to exactly zero, by chance or because somebody wants to; as the model
    itself says which entries live, these would be lost for the rest of the run.

    Raises:
        CodecError: as `weighted_mean`.
    """
    outcome = weighted_mean(ballot)
    weights = dict(outcome.weights)
    for name, alive in support_of(ballot.base).items():
        weights[name] = _revived(weights[name], alive, ballot.base[name])
    return Outcome(weights, outcome.memory)


def _revived(
    mean: NDArray[np.float32], alive: NDArray[np.bool_], base: NDArray[np.float32]
) -> NDArray[np.float32]:
    lost = alive & (mean == 0.0)
    return np.where(lost, np.copysign(LEAST, base), mean) if lost.any() else mean
