# ruff: noqa: N803, N806 - capitals at the end of a name are the shape of its array
"""Rounds of federated learning as a Gymnasium environment: `Headwater/FederatedRound-v0`.

One step is one round. The action names a (student, place) pair for each user; the allocator
that finishes every planner's plan decides modes, units and bandwidth.
"""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, SupportsFloat, TypeAlias

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from federation.errors import ConfigError
from optimizer.allocation import Effort, Shortlist, allocate
from optimizer.columns import Booleans, Columns, Floats, tabulate
from optimizer.fleets import Setting, draw
from optimizer.observation import AROUND, CEILING, LADDER, Observation, Scale, costs_at, observe
from optimizer.plan import Plan
from optimizer.problem import Problem
from optimizer.validation import check

ENVIRONMENT = "Headwater/FederatedRound-v0"

_AROUND = 10.0
"""Surroundings are logarithms; none that is sound is larger."""

Seen: TypeAlias = npt.NDArray[np.float32]
Actions: TypeAlias = npt.NDArray[np.int64]


class World(Protocol):
    """Where the rounds' problems come from."""

    def begin(self, rng: np.random.Generator) -> Problem:
        """The first round of an episode."""

    def after(self, plan: Plan, rng: np.random.Generator) -> Problem | None:
        """The round that follows when this plan has been carried out; None: nobody is left."""


@dataclass(frozen=True, slots=True)
class DrawnFleets:
    """A fleet of its own for each round, of so many users and so much for each of them.

    Each of the three is drawn between its two ends; the last two by their logarithm.
    """

    setting: Setting = field(default_factory=lambda: Setting(users=0))
    users: tuple[int, int] = (10, 60)
    blocks_per_user: tuple[float, float] = (1.0, 4.0)
    server_units_per_user: tuple[float, float] = (0.3, 1.2)

    def begin(self, rng: np.random.Generator) -> Problem:
        """A fleet."""
        low, high = self.users
        return draw(
            replace(
                self.setting,
                users=int(rng.integers(low, high + 1)),
                blocks_per_user=float(np.exp(rng.uniform(*np.log(self.blocks_per_user)))),
                server_units_per_user=float(
                    np.exp(rng.uniform(*np.log(self.server_units_per_user)))
                ),
            ),
            rng,
        )

    def after(self, _plan: Plan, rng: np.random.Generator) -> Problem:
        """Another fleet."""
        return self.begin(rng)


class FederatedRound(gymnasium.Env[Seen, Actions]):
    """Plan round after round. Reward: the plan's objective, negative.

    Observation: a row of features for each of `most_users` (`optimizer.observation`); rows beyond
    the round's users are 0 and can only sit out. Action: for each a pair of `Layout.pair_R`, the
    last being to sit out; what is not legal sits out. `info` has, as of the round now to be
    planned, `action_mask` [most_users, P] and `users`; as of the round just planned, `plan`,
    `terms`, and `pair_costs` [most_users, P]: what each pair would have cost at the plan's prices,
    of which Q learns. `reset(options={"with_bound": True})` adds `bound` to every step's info:
    what no plan of that round costs less than, by the exact planner.

    An episode ends (`terminated`) only when the world has nobody left; how long it may go on is
    the registration's `max_episode_steps`. In vector environments keep to the default
    `AutoresetMode.NEXT_STEP`, and do not learn of the step after an end: it plans nothing.

    Raises:
        ConfigError: a world whose fleets exceed `most_users` or change their number of students.
    """

    metadata: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        "render_modes": [],
        "autoreset_mode": gymnasium.vector.AutoresetMode.NEXT_STEP,
    }

    def __init__(
        self,
        world: World | None = None,
        most_users: int = 60,
        students: int = 4,
        effort: Effort | None = None,
    ) -> None:
        self.world = world if world is not None else DrawnFleets()
        self.most_users, self.pairs = most_users, 2 * students + 1
        self.effort = effort or Effort(tolerance=2e-2, with_solver=False)
        costs = self.pairs * len(LADDER)
        high_F = np.concatenate([np.full(costs, CEILING), np.full(AROUND, _AROUND)]).astype(
            np.float32
        )
        low_F = np.where(high_F > CEILING, -high_F, 0.0).astype(np.float32)
        self.observation_space = spaces.Box(
            np.tile(low_F, (most_users, 1)), np.tile(high_F, (most_users, 1)), dtype=np.float32
        )
        self.action_space = spaces.MultiDiscrete(np.full(most_users, self.pairs, np.int64))
        self._round: tuple[Columns, Observation, Scale] | None = None
        self._with_bound = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Seen, dict[str, Any]]:
        """Begin an episode."""
        super().reset(seed=seed)
        self._with_bound = bool((options or {}).get("with_bound", False))
        return self._open(self.world.begin(self.np_random))

    def step(self, action: Actions) -> tuple[Seen, SupportsFloat, bool, bool, dict[str, Any]]:
        """Allocate the pairs that are named, and go on to the next round."""
        if self._round is None:
            raise gymnasium.error.ResetNeeded("call reset before step")
        table, seen, scale = self._round
        users = table.users
        pair_N = np.asarray(action, np.int64)[:users]
        pairs_NP = np.zeros((users, self.pairs), bool)
        pairs_NP[np.arange(users), pair_N] = True
        plan = allocate(table, Shortlist(pairs_NP & seen.legal_NP), effort=self.effort)
        told: dict[str, Any] = {
            "plan": plan,
            "terms": _terms(plan),
            "pair_costs": self._padded(costs_at(table, scale, plan.prices), 0.0),
        }
        if self._with_bound:
            told["bound"] = allocate(table, effort=Effort(tolerance=1e-3)).bound
        following = self.world.after(plan, self.np_random)
        if following is None:
            return self._nothing(), -plan.objective, True, False, told | self._mask(None)
        row, mask = self._open(following)
        return row, -plan.objective, False, False, told | mask

    @property
    def seen(self) -> Observation:
        """What is seen of the round that is now to be planned."""
        if self._round is None:
            raise gymnasium.error.ResetNeeded("call reset first")
        return self._round[1]

    @property
    def table(self) -> Columns:
        """The columns of the round that is now to be planned."""
        if self._round is None:
            raise gymnasium.error.ResetNeeded("call reset first")
        return self._round[0]

    def _open(self, problem: Problem) -> tuple[Seen, dict[str, Any]]:
        check(problem)
        table = tabulate(problem)
        if table.users > self.most_users or table.layout.pairs != self.pairs:
            raise ConfigError(
                f"a round of {table.users} users and {table.layout.pairs} pairs; this environment"
                f" has room for {self.most_users} and {self.pairs}: give most_users and students"
            )
        seen, scale = observe(table)
        self._round = (table, seen, scale)
        row = self._nothing()
        row[: table.users] = seen.features_NF
        space = self.observation_space
        if not isinstance(space, spaces.Box):
            raise TypeError(f"the observation space became {space}")
        return np.clip(row, space.low, space.high), self._mask(seen)

    def _mask(self, seen: Observation | None) -> dict[str, Any]:
        legal_NP: Booleans = np.zeros((0, self.pairs), bool) if seen is None else seen.legal_NP
        mask = self._padded(legal_NP, 0).astype(np.int8)
        mask[:, -1] = 1
        return {"action_mask": mask, "users": len(legal_NP)}

    def _padded(self, values_NP: Floats | Booleans, fill: float) -> Floats:
        padded = np.full((self.most_users, self.pairs), fill, float)
        padded[: len(values_NP)] = values_NP
        return padded

    def _nothing(self) -> Seen:
        return np.zeros(self.observation_space.shape or (), np.float32)


def _terms(plan: Plan) -> dict[str, float]:
    out = sum(choice.place == "out" for choice in plan.choices)
    return {
        "makespan_s": plan.makespan_s,
        "energy_j": plan.energy_j,
        "server_energy_j": plan.server_energy_j,
        "accuracy": plan.accuracy,
        "sat_out": out / max(1, len(plan.choices)),
    }


def register_environments() -> None:
    """Make `gymnasium.make("Headwater/FederatedRound-v0")` work; once is enough, twice no harm."""
    if ENVIRONMENT not in gymnasium.registry:
        gymnasium.register(
            ENVIRONMENT, entry_point="optimizer.environment:FederatedRound", max_episode_steps=100
        )
