# ruff: noqa: N806 - capitals at the end of a name are the shape of its array
"""Teaching a shared Q in the environment: act, see what every pair would have cost, learn."""

from dataclasses import dataclass

import numpy as np

from federation.errors import ConfigError
from optimizer.columns import Floats
from optimizer.environment import FederatedRound
from optimizer.qlearning import LinearValues, Values, cheapest_pairs


@dataclass(frozen=True, slots=True)
class Training:
    """How a Q is trained.

    In a share of rounds, `exploration`, costs are blurred by `blur` spreads before the cheapest
    pair is taken. What a pair cost weighs exp(-(how much dearer than the user's best) /
    `temperature`): Q has to be right about pairs that may be chosen. Without `is_counterfactual`
    only the pair that was taken is learned from, as in plain Q-learning.
    """

    rounds: int = 400
    exploration: float = 0.1
    blur: float = 0.1
    temperature: float = 1.0
    is_counterfactual: bool = True

    def __post_init__(self) -> None:
        if self.rounds < 1 or not 0 <= self.exploration <= 1 or self.temperature <= 0:
            raise ConfigError(
                f"training: {self}; expected at least 1 round, exploration from 0 to 1 and a"
                " temperature above 0"
            )


def train(
    environment: FederatedRound,
    rng: np.random.Generator,
    training: Training | None = None,
    values: Values | None = None,
) -> Values:
    """A Q-function that has played so many rounds; `values` is what it begins with.

    Each user takes its cheapest pair; the plan's duals then price every pair of everybody.
    """
    training = training or Training()
    values = values if values is not None else LinearValues.blank(environment.pairs)
    environment.reset(seed=int(rng.integers(2**31)))
    for _ in range(training.rounds):
        seen = environment.seen
        costs_NP = values.costs(seen)
        if rng.random() < training.exploration:
            costs_NP = costs_NP + rng.normal(0.0, training.blur, costs_NP.shape)
        taken_NP = cheapest_pairs(costs_NP, seen.legal_NP, 1)
        action = np.full(environment.most_users, environment.pairs - 1)
        action[: len(taken_NP)] = taken_NP.argmax(axis=1)
        _, _, is_over, _, info = environment.step(action)
        paid_NP: Floats = info["pair_costs"][: len(taken_NP)]
        best_N1 = np.where(seen.legal_NP, paid_NP, np.inf).min(axis=1, keepdims=True)
        weights_NP = np.exp(-(paid_NP - best_N1) / training.temperature) * seen.legal_NP
        if not training.is_counterfactual:
            weights_NP = weights_NP * taken_NP
        values = values.learned(seen, paid_NP, weights_NP)
        if is_over:
            environment.reset()
    return values
