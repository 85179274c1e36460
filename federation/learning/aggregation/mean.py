"""The mean by samples (FedAvg, arXiv:1602.05629, Alg. 1), and what other means are made of.

A tensor that a device did not send has no vote there; a tensor that nobody sent stays as it
was (semantics 1, 3).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from federation.learning.aggregation.ballot import Ballot, Outcome, Vote
from federation.protocol.codec import check_form, check_tensor
from federation.protocol.compact import LARGEST

_BLOCK = 8192
"""So many numbers are summed at a time: they stay in the processor's nearest memory."""


def weighted_mean(ballot: Ballot) -> Outcome:
    """The base where nobody voted, the mean by weight elsewhere.

    Departs from the paper: a tensor's weights are normalised over the devices that sent it,
    so devices may send parts of the model.

    Raises:
        CodecError: an update with a tensor that is not finite, or of another shape or dtype
            than in the base.
    """
    return Outcome(
        {name: mean_of(name, ballot.voters(name), base) for name, base in ballot.base.items()}
    )


def mean_of(name: str, voters: Sequence[Vote], base: NDArray[np.float32]) -> NDArray[np.float32]:
    """The mean of one tensor over these votes, by weight; the base where there are none.

    Raises:
        CodecError: as `weighted_mean`.
    """
    if not voters:
        return base.copy()
    return exact_mean(name, voters, base, [vote.weight for vote in voters]).astype(np.float32)


def exact_mean(
    name: str, voters: Sequence[Vote], base: NDArray[np.float32], weights: Sequence[float]
) -> NDArray[np.float64]:
    """The mean of one tensor before it is rounded, in float64; the sum runs over votes in order.

    Args:
        name: of the tensor.
        voters: votes that have it, at least one.
        base: what it is in the base, for its shape.
        weights: what each vote counts; their sum is above 0.

    Raises:
        CodecError: as `weighted_mean`.
    """
    for vote in voters:
        check_form(name, vote.update[name], base)
    whole, size = sum(weights), base.size
    shares = [weight / whole for weight in weights]
    tensors = [vote.update[name].reshape(-1) for vote in voters]
    mean, scratch = np.zeros(size, np.float64), np.empty(min(size, _BLOCK), np.float64)
    for start in range(0, size, _BLOCK):
        block = mean[start : start + _BLOCK]
        term = scratch[: block.size]
        for tensor, share in zip(tensors, shares, strict=True):
            np.multiply(tensor[start : start + _BLOCK], share, out=term, dtype=np.float64)
            block += term
    if not np.isfinite(mean).all():
        # A mean of finite numbers is finite: whose are not?
        for vote in voters:
            check_tensor(name, vote.update[name], base)
    return mean.reshape(base.shape)


def rounded(exact: NDArray[np.float64]) -> NDArray[np.float32]:
    """The nearest float32, or its largest finite one where that would be infinite.

    A mean of float32 numbers is in range. What steps beyond a mean may leave it, when one
    device sends huge numbers; it must not take the hub's record with it.
    """
    return np.clip(exact, -LARGEST, LARGEST).astype(np.float32)
