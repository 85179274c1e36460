"""One round of arXiv:2303.06155 as a Gymnasium environment: users come, actions are taken, done."""

from dataclasses import dataclass
from typing import Any, ClassVar, SupportsFloat

import gymnasium
import numpy as np
from gymnasium import spaces

from federation.errors import ConfigError
from optimizer.paper import ActionTable, finish_plan, tabulate
from optimizer.paper_profile import (
    FloatArray,
    IntArray,
    PaperProfile,
    PaperUsers,
    draw_users,
    paper_profile,
)

DEVICE_GHZ = (0.5, 2.0)
GAIN_DB = (-96.0, -68.0)
"""Ranges that are cut into bins: those of the paper's users. What lies outside is in the last."""


@dataclass(frozen=True, slots=True)
class Discretisation:
    """How states and, with Q-learning alone, shares become whole numbers; the paper does not say.

    With `share_levels` of 0 the convex step divides the resources. With L levels an action also
    says a level from 1 to L of CPU and of bandwidth, and everything is divided in proportion to
    the levels, so that no choice of them asks for more than there is.
    """

    device_bins: int = 4
    channel_bins: int = 4
    share_levels: int = 0


class PaperRound(gymnasium.Env[IntArray, IntArray]):
    """State: bins of f_loc and h of all users. Action: student and place of each. Reward: -Eq. 6.

    The reward is the objective after the convex step, as a mean over users. Each episode is one
    step: the paper has no transition of states, so this is a contextual bandit, and any discount
    gives the same answer as none. `reset` draws users with the environment's own generator, or
    takes `options={"users": PaperUsers}`; `step` gives the plan as `info["plan"]`.

    Raises:
        ConfigError: for fewer than one user, bin, or levels below 0; for users of another number.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}  # type: ignore[misc]

    def __init__(
        self,
        profile: PaperProfile | None = None,
        users: int = 4,
        discretisation: Discretisation | None = None,
    ) -> None:
        self.profile = profile or paper_profile()
        self.discretisation = discretisation or Discretisation()
        bins = (self.discretisation.device_bins, self.discretisation.channel_bins)
        if users < 1 or min(bins) < 1 or self.discretisation.share_levels < 0:
            raise ConfigError(
                f"paper's round: {users} users and {self.discretisation}, expected at least one"
                " user and one bin, and levels of at least 0"
            )
        each = self.profile.actions * max(1, self.discretisation.share_levels) ** 2
        self.observation_space = spaces.MultiDiscrete(np.repeat(bins, users).astype(np.int64))
        self.action_space = spaces.MultiDiscrete(np.full(users, each, dtype=np.int64))
        self._count = users
        self._users: PaperUsers | None = None
        self._table: ActionTable | None = None
        self._state = np.zeros(2 * users, dtype=np.int64)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[IntArray, dict[str, Any]]:
        """Draw users, or take those of `options`."""
        super().reset(seed=seed)
        given = (options or {}).get("users")
        users = given if given is not None else draw_users(self.np_random, self._count)
        if len(users) != self._count:
            raise ConfigError(f"{len(users)} users were given; this environment has {self._count}")
        if users is not self._users:
            self._users, self._table = users, tabulate(self.profile, users)
            self._state = self._observe(users)
        return self._state.copy(), {}

    def step(self, action: IntArray) -> tuple[IntArray, SupportsFloat, bool, bool, dict[str, Any]]:
        """Take each user's action; the episode ends."""
        if self._users is None or self._table is None:
            raise gymnasium.error.ResetNeeded("call reset before step")
        levels = self.discretisation.share_levels
        chosen, shares = np.asarray(action, dtype=np.int64), None
        if levels:
            chosen, cpu, band = np.unravel_index(chosen, (self.profile.actions, levels, levels))
            shares = (
                _in_proportion(self.profile.server_ghz, cpu),
                _in_proportion(self.profile.bandwidth_mhz, band),
            )
        plan = finish_plan(self.profile, self._users, chosen, table=self._table, shares=shares)
        return self._state.copy(), -plan.objective, True, False, {"plan": plan}

    def _observe(self, users: PaperUsers) -> IntArray:
        bins = self.discretisation
        return np.concatenate(
            [
                _bin(users.device_ghz, DEVICE_GHZ, bins.device_bins),
                _bin(10 * np.log10(users.gain), GAIN_DB, bins.channel_bins),
            ]
        )


def _bin(values: FloatArray, between: tuple[float, float], bins: int) -> IntArray:
    low, high = between
    return np.clip(bins * (values - low) / (high - low), 0, bins - 1).astype(np.int64)


def _in_proportion(total: float, level: IntArray) -> FloatArray:
    shares: FloatArray = total * (level + 1) / (level + 1).sum()
    return shares
