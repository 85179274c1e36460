# ruff: noqa: N803, N806 - capitals at the end of a name are the shape of its array
"""The shared Q as a small network, where torch is installed: slower to train than the linear."""

from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from optimizer.columns import Floats
from optimizer.observation import AROUND, LADDER, Observation

if TYPE_CHECKING:
    import torch


class NeuralValues:
    """Two hidden layers from all figures of a user to a correction of its costs at fair prices.

    Learning changes it in place: after each round it takes `steps` steps of Adam on users of the
    last `memory` rounds. Unlike the linear Q it sees all pairs of a user at once.
    """

    def __init__(
        self,
        pairs: int,
        rng: np.random.Generator,
        *,
        hidden: int = 64,
        steps: int = 4,
        memory: int = 200,
    ) -> None:
        import torch

        self._rng, self._steps = rng, steps
        self._memory: deque[tuple[Floats, Floats, Floats]] = deque(maxlen=memory)
        features = pairs * len(LADDER) + AROUND
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(rng.integers(2**31)))
            last = torch.nn.Linear(hidden, pairs)
            self._network = torch.nn.Sequential(
                torch.nn.Linear(features, hidden),
                torch.nn.ReLU(),
                torch.nn.Linear(hidden, hidden),
                torch.nn.ReLU(),
                last,
            )
        torch.nn.init.zeros_(last.weight)
        torch.nn.init.zeros_(last.bias)
        self._optimizer = torch.optim.Adam(self._network.parameters(), lr=2e-3)

    def costs(self, seen: Observation) -> Floats:
        """The network's costs."""
        import torch

        with torch.inference_mode():
            change = self._network(_tensor(seen.features_NF)).numpy().astype(float)
        return np.asarray(seen.costs_NPL[:, :, 0] + change, float)

    def learned(self, seen: Observation, costs_NP: Floats, weights_NP: Floats) -> "NeuralValues":
        """The same network, a few steps on."""
        self._memory.append((seen.features_NF, costs_NP - seen.costs_NPL[:, :, 0], weights_NP))
        for _ in range(self._steps):
            rounds = self._rng.integers(len(self._memory), size=min(8, len(self._memory)))
            features_NF, change_NP, weight_NP = (
                np.concatenate([self._memory[place][part] for place in rounds]) for part in range(3)
            )
            error_NP = self._network(_tensor(features_NF)) - _tensor(change_NP)
            loss = (_tensor(weight_NP) * error_NP**2).mean()
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()
        return self


def _tensor(values: Floats) -> "torch.Tensor":
    import torch

    return torch.from_numpy(values.astype(np.float32))
