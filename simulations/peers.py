"""A world without a hub: peers, some of them liars, on one bus and one virtual clock.

The peers are the real ones, and so are topics, codec, training and mixing. An attacker is an
honest peer whose training gives something else.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import ParamSpec, TypeVar

import numpy as np

from edge_agent.facts import AgentFact, Held
from edge_agent.peering_facts import PeerKept
from edge_agent.peering_trainer import carry_out
from edge_agent.peers import PeerPlan
from edge_agent.trainer import fulfil
from federation.errors import ConfigError, TrainingError
from federation.learning.data import LocalData
from federation.protocol.codec import Weights, decode, encode
from federation.protocol.effects import Mix, Mixed, Trained
from federation.protocol.messages import Assignment
from simulations.attacks import noise, non_finite, sign_flipped
from simulations.bus import Bus
from simulations.clock import Clock
from simulations.device import Device
from simulations.device_model import Member
from simulations.surroundings import Surroundings
from simulations.workshop.in_process import InProcess
from simulations.workshop.job import Trainer
from simulations.world import LONGEST_S, draws_of

Task = ParamSpec("Task")
Done = TypeVar("Done", Trained, Mixed)

Observer = Callable[[str, PeerKept], None]
"""Told of each peer how far it is, whenever that was written down."""

Lie = Callable[[Weights, Weights, np.random.Generator], Weights]
"""What is offered in place of trained weights: of those, of the base, and of chance."""

LIES: Mapping[str, Lie] = {
    "noise": lambda trained, _, rng: noise(trained, rng),
    "boosted": lambda trained, base, _: sign_flipped(trained, base, boost=5.0),
    "non-finite": lambda trained, _base, _rng: non_finite(trained),
}
"""Attacks on what a peer offers; flipped labels are an attack on its data."""


class _Witnessed(Held):
    """A journal whose peer facts are told on."""

    __slots__ = ("_name", "_observe")

    def __init__(self, name: str, observe: Observer) -> None:
        super().__init__()
        self._name, self._observe = name, observe

    def record(self, fact: AgentFact) -> None:
        super().record(fact)
        if isinstance(fact, PeerKept):
            self._observe(self._name, fact)


class PeerWorld:
    """Peers alone. Each member's model of a device says, in `peering`, what it does as a peer.

    Args:
        members: the peers.
        attackers: which of them lie, and how, by the names of `LIES`.
        train: what trains, before anybody lies. A training or mixing that fails ends the
            simulation with a `TrainingError`: tried again, it would fail again, for ever.
        seed: decides links and lies.
        observe: told of each peer how far it is.
    """

    def __init__(
        self,
        members: Iterable[Member],
        *,
        attackers: Mapping[str, str] | None = None,
        train: Trainer = fulfil,
        seed: int = 0,
        namespace: str = "fleet",
        observe: Observer = lambda _name, _kept: None,
    ) -> None:
        self.clock = Clock()
        self.bus = Bus(self.clock, draws_of(seed, "bus"))
        self.devices: dict[str, Device] = {}
        self._rounds: dict[str, int] = {}
        liars = {name: Liar(lie, train, seed) for name, lie in (attackers or {}).items()}
        for member in members:
            if not isinstance(member.model.peering, PeerPlan):
                raise ConfigError(f"{member.name} has no plan as a peer: give it one")
            self._rounds[member.name] = member.model.peering.rounds
            mind = liars.get(member.name)
            around = Surroundings(
                self.clock,
                self.bus,
                namespace,
                InProcess(
                    {member.name: member.data},
                    train=_unfailing(member.name, mind.train if mind else train),
                ),
                _unfailing(member.name, mind.mix if mind else carry_out),
            )
            rng = draws_of(seed, member.name)
            device = Device(member, around, rng)
            device.held = _Witnessed(member.name, observe)
            self.devices[member.name] = device
            self.clock.call_at(member.model.joins_at_s, device.power_on)
        if strangers := sorted(liars.keys() - self.devices.keys()):
            raise ConfigError(f"attacker {strangers[0]} is no peer; name one of {[*self.devices]}")

    def kept(self, name: str) -> PeerKept:
        """How far this peer is; at its beginning where it never wrote anything down."""
        return self.devices[name].held.peer or PeerKept("", 0)

    def is_finished(self, name: str) -> bool:
        """Whether this peer has done all its rounds."""
        kept = self.kept(name)
        return kept.is_mixed and 0 < self._rounds[name] <= kept.round

    def run(self, limit_s: float = LONGEST_S, *, awaited: Iterable[str] | None = None) -> bool:
        """Let time pass until those awaited (all) have finished; False at the limit."""
        unfinished = [name for name in (awaited or self.devices) if not self.is_finished(name)]
        while unfinished:
            if self.clock.next_at > limit_s:
                return False
            self.clock.step()
            while unfinished and self.is_finished(unfinished[-1]):
                unfinished.pop()
        return True

    def model(self, name: str) -> bytes:
        """The encoded model of this peer as it is now."""
        return self.kept(name).model


def _unfailing(name: str, work: Callable[Task, Done]) -> Callable[Task, Done]:
    def perform(*args: Task.args, **kwargs: Task.kwargs) -> Done:
        done = work(*args, **kwargs)
        if done.failure:
            raise TrainingError(f"peer {name}: {done.failure}")
        return done

    return perform


class Liar:
    """The trainer and mixer of a peer that learns as others do and offers something else.

    Raises:
        ConfigError: no such lie.
    """

    def __init__(self, lie: str, train: Trainer, seed: int) -> None:
        if lie not in LIES:
            raise ConfigError(
                f"no attack is called {lie!r}; there are {', '.join(LIES)}: correct it"
            )
        self._tell, self._train, self._seed = LIES[lie], train, seed
        self._truth = b""

    def train(
        self, assignment: Assignment, base: bytes, data: LocalData, memory: bytes = b""
    ) -> Trained:
        """Train, remember what came of it, and give the lie."""
        trained = self._train(assignment, base, data, memory)
        if trained.failure:
            return trained
        self._truth = trained.update
        rng = np.random.default_rng([self._seed % 2**32, assignment.plan.seed])
        told = self._tell(decode(trained.update), decode(base), rng)
        return dataclasses.replace(trained, update=encode(told))

    def mix(self, mix: Mix, data: LocalData) -> Mixed:
        """Mix what others offer into what was really learned."""
        own = self._truth if mix.own else b""
        return carry_out(dataclasses.replace(mix, own=own), data)
