"""A temperature that makes confidence mean what it says (arXiv:1706.04599, section 4.2)."""

import numpy as np
from numpy.typing import NDArray

from federation.errors import DataError

RANGE = (0.1, 10.0)
"""Temperatures that are believed; few samples, all of them right, would ask for 0."""

_HALVINGS = 60


def fit_temperature(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """The temperature with the least cross-entropy on samples not trained on.

    The loss is convex in the temperature's inverse, so its slope is halved in on.

    Raises:
        DataError: no samples, or labels that are no classes of the logits.
    """
    if len(logits) == 0 or len(labels) != len(logits) or labels.max() >= logits.shape[1]:
        raise DataError(
            f"{len(labels)} labels for logits of shape {logits.shape}; expected one sample or "
            "more, and classes the model has: correct the calibration samples"
        )
    centred = (logits - logits.max(axis=1, keepdims=True)).astype(np.float64)
    told = centred[np.arange(len(labels)), labels]
    low, high = 1.0 / RANGE[1], 1.0 / RANGE[0]
    for _ in range(_HALVINGS):
        inverse = (low + high) / 2
        expected = (probabilities(centred, 1.0 / inverse) * centred).sum(axis=1)
        if float((expected - told).mean()) < 0.0:
            low = inverse
        else:
            high = inverse
    return 1.0 / low


def probabilities(logits: NDArray[np.floating], temperature: float) -> NDArray[np.float64]:
    """Softmax over the classes of logits divided by the temperature."""
    scaled = logits.astype(np.float64) / temperature
    grown = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    shares: NDArray[np.float64] = grown / grown.sum(axis=1, keepdims=True)
    return shares
