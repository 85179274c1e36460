"""The Q-learning of arXiv:2303.06155: a table of states, kept as a hash table."""

from dataclasses import dataclass, field

import numpy as np
from gymnasium import spaces

from federation.errors import ConfigError
from optimizer.paper import PaperPlan
from optimizer.paper_environment import PaperRound
from optimizer.paper_profile import FloatArray, IntArray, PaperUsers


@dataclass(frozen=True, slots=True)
class PaperLearning:
    """How long and how boldly the table learns; the paper prints none of it.

    The chance of a random action falls from `first_chance` to `last_chance` in equal factors.
    With `is_joint` one number stands for the actions of all users, as the paper writes it: its
    table grows as A^N. Otherwise each user has a row of its own and all learn from the same
    reward.
    """

    episodes: int = 1_500
    learning_rate: float = 0.1
    discount: float = 0.0
    first_chance: float = 1.0
    last_chance: float = 0.02
    is_joint: bool = False

    def __post_init__(self) -> None:
        is_sound = (
            self.episodes >= 1
            and 0 < self.learning_rate <= 1
            and 0 <= self.discount <= 1
            and 0 < self.last_chance <= self.first_chance <= 1
        )
        if not is_sound:
            raise ConfigError(
                f"Q-learning: {self}; expected at least 1 episode, a learning rate above 0 and up"
                " to 1, a discount from 0 to 1, and 0 < last_chance <= first_chance <= 1"
            )


@dataclass(frozen=True, slots=True)
class PaperTable:
    """What actions are worth: for each state seen, a row a head. Unseen states are worth 0."""

    heads: tuple[int, ...]
    is_joint: bool
    rows: dict[tuple[int, ...], list[FloatArray]] = field(default_factory=dict)
    visits: dict[tuple[int, ...], list[IntArray]] = field(default_factory=dict)

    def row(self, state: IntArray) -> list[FloatArray]:
        """The worth of each action of each head in this state; made at the first look."""
        key = tuple(state.tolist())
        if key not in self.rows:
            sizes = (int(np.prod(self.heads)),) if self.is_joint else self.heads
            self.rows[key] = [np.zeros(size) for size in sizes]
            self.visits[key] = [np.zeros(size, dtype=np.int64) for size in sizes]
        return self.rows[key]

    def actions(self, picked: list[int]) -> IntArray:
        """What each user does when the heads pick these."""
        if self.is_joint:
            return np.asarray(np.unravel_index(picked[0], self.heads))
        return np.asarray(picked)


def learn(
    environment: PaperRound,
    rng: np.random.Generator,
    learning: PaperLearning | None = None,
    users: PaperUsers | None = None,
) -> PaperTable:
    """Q-learning with ε-greedy actions: Q ← Q + rate · (reward + discount · max Q' - Q).

    With `users` every episode is about these; without, about users drawn anew. The rate is never
    below one over an action's visits: else what an action is worth would begin with how often
    it was tried.
    """
    learning = learning or PaperLearning()
    space = environment.action_space
    if not isinstance(space, spaces.MultiDiscrete):
        raise ConfigError(f"Q-learning wants a MultiDiscrete action space, got {space}")
    table = PaperTable(tuple(space.nvec.tolist()), learning.is_joint)
    fall = (learning.last_chance / learning.first_chance) ** (1 / max(1, learning.episodes - 1))
    options = None if users is None else {"users": users}
    environment.reset(seed=int(rng.integers(2**31)))
    for episode in range(learning.episodes):
        state, _ = environment.reset(options=options)
        row = table.row(state)
        picked = [
            int(rng.integers(len(worth)))
            if rng.random() < learning.first_chance * fall**episode
            else int(worth.argmax())
            for worth in row
        ]
        after, reward, is_over, _, _ = environment.step(table.actions(picked))
        visits = table.visits[tuple(state.tolist())]
        future = [0.0 if is_over else float(worth.max()) for worth in table.row(after)]
        for worth, counts, action, next_worth in zip(row, visits, picked, future, strict=True):
            counts[action] += 1
            rate = max(learning.learning_rate, 1 / float(counts[action]))
            target = float(reward) + learning.discount * next_worth
            worth[action] += rate * (target - worth[action])
    return table


def plan_by_table(table: PaperTable, environment: PaperRound, users: PaperUsers) -> PaperPlan:
    """The plan of the actions that the table holds to be worth most."""
    state, _ = environment.reset(options={"users": users})
    picked = [int(worth.argmax()) for worth in table.row(state)]
    _, _, _, _, info = environment.step(table.actions(picked))
    plan = info["plan"]
    if not isinstance(plan, PaperPlan):
        raise TypeError(f"the environment gave {type(plan).__name__} as its plan")
    return plan
