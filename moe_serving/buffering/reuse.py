"""Our policy: whoever is expected back last goes, and a miss expected back later still passes.

Shapes: L layers, E experts, H half-lives, F = H + 2 features, K = L * E keys.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moe_serving.buffering.residency import PASS, Admission, Heat
from moe_serving.buffering.trace import Shape

HALF_LIVES = (1.0, 4.0, 32.0, 256.0)
"""In visits of the expert's own layer; from the last token's echo to a document's topic."""

RARE = 1e-2
"""Keeps log-odds of rates finite."""

STEP = 0.1
"""AdaGrad's step; the answers are insensitive to it."""

Vector = NDArray[np.float64]


class ExpectedReuse:
    """Learns online how soon each expert will be used again.

    Each expert keeps its activation rate over four half-lives. A logistic model of the rates'
    log-odds and of whether the expert is active now, shared by all experts and trained at each
    visit on what the gate just said (AdaGrad), gives p, the chance that the expert is active when
    its layer comes round. The expected distance to the next use, in visits, is then

        visits until the layer comes round + visits a round * (1 / p - 1).

    The gap between a layer's visits is measured, so decoder layers that come round for each token
    and encoder layers that come once a request share one pool.

    Args:
        shape: Of the model.
        capacity: How many may be resident.
        heat_LE: Shares of visits to start from.
    """

    def __init__(self, shape: Shape, capacity: int, heat_LE: Heat | None = None):
        rate_LE = np.zeros((shape.layers, shape.experts)) if heat_LE is None else heat_LE
        fade_H = 0.5 ** (1 / np.array(HALF_LIVES))
        self._experts = shape.experts
        self._capacity = capacity
        self._fade_H = fade_H
        self._rate_LEH = np.repeat(rate_LE[:, :, None], len(HALF_LIVES), axis=2)
        # One half for the two middling rates: until it has learned, p is about the recent rate.
        self._weight_F: Vector = np.array([0.0, 0.5, 0.5, 0.0, 0.0, 0.0])
        self._slope_F: Vector = np.full(len(HALF_LIVES) + 2, 1e-2)
        self._p_LE = np.clip(rate_LE, RARE, 1.0 - RARE)
        self._now = 0
        self._last_L = np.arange(shape.layers) - shape.layers
        self._gap_L = np.full(shape.layers, float(shape.layers))
        self._is_resident_K = np.zeros(shape.layers * shape.experts, dtype=bool)
        self._residents = 0
        self._distance_K: Vector = self._distances()

    def observe(self, layer: int, active: Sequence[int]) -> None:
        """Trains on what the gate said, then forecasts from it."""
        is_active_E = np.zeros(self._experts)
        is_active_E[active] = 1.0
        self._train(layer, is_active_E)
        rate_EH = self._rate_LEH[layer]
        rate_EH += (1 - self._fade_H) * (is_active_E[:, None] - rate_EH)
        self._p_LE[layer] = self._chances(self._features(layer))
        self._gap_L[layer] += 0.1 * (self._now - self._last_L[layer] - self._gap_L[layer])
        self._last_L[layer] = self._now
        self._now += 1
        self._distance_K = self._distances()

    def use(self, key: int) -> None:
        """Uses were heard when the gate spoke."""

    def admit(self, key: int) -> Admission:
        """Takes a miss in only if it is expected back before the last of the residents."""
        if self._capacity == 0:
            return PASS
        evicted = None
        if self._residents >= self._capacity:
            evicted = int(np.argmax(np.where(self._is_resident_K, self._distance_K, -1.0)))
            if self._distance_K[key] >= self._distance_K[evicted]:
                return PASS
            self._is_resident_K[evicted] = False
        else:
            self._residents += 1
        self._is_resident_K[key] = True
        return Admission(stays=True, evicted=evicted)

    def _features(self, layer: int) -> Vector:
        rate_EH = self._rate_LEH[layer]
        # The fastest rate is at least one half exactly while the expert is active. As a feature
        # of its own this is worth up to five points of hit rate: an echo is no matter of rates.
        is_active_E1 = (rate_EH[:, :1] >= 0.5).astype(np.float64)
        odds_EH = np.log((rate_EH + RARE) / (1 - rate_EH + RARE))
        ones_E1 = np.ones((self._experts, 1))
        return np.concatenate([odds_EH, is_active_E1, ones_E1], axis=1)

    def _chances(self, features_EF: Vector) -> Vector:
        logit_E = np.clip(features_EF @ self._weight_F, -9.0, 9.0)
        return np.asarray(1 / (1 + np.exp(-logit_E)), dtype=np.float64)

    def _train(self, layer: int, is_active_E: Vector) -> None:
        features_EF = self._features(layer)
        error_E = self._chances(features_EF) - is_active_E
        slope_F = features_EF.T @ error_E / self._experts
        self._slope_F += slope_F**2
        self._weight_F -= STEP * slope_F / np.sqrt(self._slope_F)

    def _distances(self) -> Vector:
        due_L = self._last_L + self._gap_L - self._now
        due_L = np.where(due_L < 0, self._gap_L, due_L)
        return (due_L[:, None] + self._gap_L[:, None] * (1 / self._p_LE - 1)).ravel()
