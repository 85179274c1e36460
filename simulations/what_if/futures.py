"""Plays futures: the product's own coordinator and agents, on a virtual clock, over the twins."""

import random
from collections.abc import Callable
from functools import lru_cache, partial

import msgspec
import numpy as np

from cloud.coordination.facts import HubFact, RoundAbandoned, RoundClosed, RoundOpened
from cloud.initial import initial_model
from edge_agent.agent import AgentSettings
from federation.learning.data import LocalData
from federation.learning.layers import method_part, model_part
from federation.learning.uplink import pack_update
from federation.protocol.codec import decode
from federation.protocol.effects import Trained
from federation.protocol.messages import Assignment, Report
from optimizer.baselines import select_uniformly
from simulations.availability import let_leave, select_available
from simulations.conditions import Conditions
from simulations.device_model import DeviceModel, Member
from simulations.herd import awake
from simulations.what_if.drawing import TwinBody, TwinPresence, link_of
from simulations.what_if.forking import Fork, Twin
from simulations.what_if.plan import WhatIf
from simulations.workshop.in_process import InProcess
from simulations.world import LONGEST_S, World

RESTARTS_S = (5.0, 60.0)
"""A device that failed in mid-round is back after a time between these."""

_NUDGE = 1e-3
"""An update differs from its base by about so much of it: it shall not be small for its zeros."""


class PlayedRound(msgspec.Struct, frozen=True, kw_only=True):
    """One round of one future: how long it took, and who was asked and counted."""

    number: int
    seconds: float
    asked: int
    counted: int
    bytes_up: int
    bytes_down: int
    is_closed: bool = True


class Future(msgspec.Struct, frozen=True, kw_only=True):
    """One future of the run: its rounds, all its seconds, and how it ended."""

    rounds: tuple[PlayedRound, ...]
    seconds: float
    status: str


def play(
    question: WhatIf, made: Fork, on_future: Callable[[Future], None] | None = None
) -> list[Future]:
    """All futures of a question; the same for the same seed and fork. Nothing is written.

    Raises:
        ConfigError: a run that the hub would not begin.
    """
    model, echo = initial_model(question.run), _Echo()
    played = []
    for number in range(question.futures):
        future = _play_one(question, made, model, echo, seed=question.seed * 2**20 + number)
        played.append(future)
        if on_future is not None:
            on_future(future)
    return played


def _play_one(question: WhatIf, made: Fork, model: bytes, echo: "_Echo", *, seed: int) -> Future:
    twins = {twin.device: twin for twin in made.twins}
    names = list(twins)
    presence = TwinPresence(made.twins, made.at, seed)
    workshop = InProcess({twin.device: _blank(twin.samples) for twin in made.twins}, train=echo)
    world = World(
        question.run,
        model,
        awake(_member(twin, seed) for twin in made.twins),
        workshop=workshop,
        conditions=Conditions(
            seed=seed,
            select=select_available(select_uniformly, presence, names, lambda: world.clock.now),
        ),
    )
    let_leave(world, presence)
    world.watch(lambda fact: _let_fail(world, twins, seed, fact))
    ledger = _Ledger()
    world.watch(ledger.take)
    ended = world.run(LONGEST_S)
    workshop.close()
    return Future(
        rounds=tuple(ledger.rounds),
        seconds=world.clock.now,
        status=ended.status if ended is not None else "endless",
    )


def _member(twin: Twin, seed: int) -> Member:
    model = DeviceModel(
        level=twin.level,
        quality=link_of(twin, seed),
        settings=AgentSettings(),
        body=TwinBody(twin, seed),
    )
    return Member(twin.device, _blank(twin.samples), model)


def _let_fail(world: World, twins: dict[str, Twin], seed: int, fact: HubFact) -> None:
    """Kill devices in mid-round as often as they failed to complete a part while there."""
    if not isinstance(fact, RoundOpened):
        return
    now = world.clock.now
    for entry in fact.attempts:
        luck = random.Random(f"{seed}/{entry.attempt}/fails")  # noqa: S311 - nothing secret
        twin = twins[entry.device]
        if luck.random() < twin.completes:
            continue
        usual_s = twin.sample_s.median * twin.samples + twin.beside_s.median
        at = now + min(luck.random() * usual_s, max(fact.deadline - now, 0.0))
        kill = partial(_kill, world, entry.device, luck.uniform(*RESTARTS_S))
        world.clock.call_at(at, kill)


def _kill(world: World, device: str, away_s: float) -> None:
    world.devices[device].kill(away_s)


class _Ledger:
    """What came of the rounds of one future."""

    def __init__(self) -> None:
        self.rounds: list[PlayedRound] = []
        self._opened: RoundOpened | None = None
        self._up = self._down = 0

    def take(self, fact: HubFact) -> None:
        match fact:
            case RoundOpened():
                self._opened = fact
            case RoundClosed():
                up, down = fact.bytes_up, fact.bytes_down
                self._add(fact.at, len(fact.devices), up - self._up, down - self._down)
                self._up, self._down = up, down
            case RoundAbandoned():
                self._add(fact.at, 0, 0, 0, is_closed=False)
            case _:
                pass

    def _add(self, at: float, counted: int, up: int, down: int, *, is_closed: bool = True) -> None:
        if self._opened is None:
            return
        opened = self._opened
        self.rounds.append(
            PlayedRound(
                number=opened.round,
                seconds=at - opened.at,
                asked=len(opened.attempts),
                counted=counted,
                bytes_up=up,
                bytes_down=down,
                is_closed=is_closed,
            )
        )


class _Echo:
    """Trains nothing: an update as large as a real one, and the same for all devices of a round.

    What a run would learn is not asked here, and mirrored samples are few; so bytes and times
    are those of the run, and weights mean nothing.
    """

    def __init__(self) -> None:
        self._packed: dict[tuple[str, tuple[str, ...] | None], bytes] = {}

    def __call__(
        self, assignment: Assignment, base: bytes, data: LocalData, memory: bytes = b""
    ) -> Trained:
        """An update for this assignment."""
        del memory
        plan = assignment.plan
        key = (assignment.base.digest, plan.layers)
        if key not in self._packed:
            self._packed.clear()
            self._packed[key] = _nudged(base, assignment)
        report = Report(samples=data.samples, steps=1)
        return Trained(assignment.attempt, update=self._packed[key], report=report)


def _nudged(base: bytes, assignment: Assignment) -> bytes:
    weights, rng = decode(base), np.random.default_rng(0)
    own = model_part(weights)
    trained = {
        name: tensor + _NUDGE * rng.standard_normal(tensor.shape).astype(np.float32)
        for name, tensor in own.items()
    }
    silent = {name: np.zeros_like(tensor) for name, tensor in method_part(weights).items()}
    return pack_update(trained, own, assignment.plan, {}, silent)[0]


@lru_cache(maxsize=4096)
def _blank(samples: int) -> LocalData:
    """So many samples of nothing: only their number is told."""
    return LocalData(np.zeros((samples, 1), np.float32), np.zeros(samples, np.int64))
