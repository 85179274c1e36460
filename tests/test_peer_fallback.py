"""While the hub is away its agents go on as peers, and bring back what they learned."""

import functools
import random
from pathlib import Path

import numpy as np
import pytest

from cloud.coordination.facts import RoundClosed
from edge_agent.agent import Agent
from edge_agent.facts import AgentFact, Held, UpdateKept
from edge_agent.fallback import FallBack, FallbackAgent
from edge_agent.peering_facts import PeerForgotten, PeerKept, StartKept
from edge_agent.peers import PeerTerms
from federation.datasets.cached import load
from federation.learning.data import LocalData
from federation.learning.evaluation import evaluate
from federation.protocol import messages as m
from federation.protocol.codec import decode, encode
from federation.protocol.effects import Link, Send, StopTraining, Train
from federation.protocol.transfer import content_of
from simulations.device_model import DeviceModel
from tests.peers import SETTINGS, full_mesh
from tests.simulated import Simulation, patient_plan, shards

FLEET, ROUNDS, LEAVES_AFTER = 6, 6, 3
AWAY_S = 200.0
"""The broker notices after 45 s, devices go on alone after 20 more, a round takes them some ten."""

SPEC = m.ModelSpec(name="mlp", sizes={"hidden": 300})


class Witness(Held):
    """A journal that remembers the order of all its facts."""

    def __init__(self) -> None:
        super().__init__()
        self.facts: list[AgentFact] = []

    def record(self, fact: AgentFact) -> None:
        super().record(fact)
        self.facts.append(fact)


class Outage:
    """A run whose hub loses its link after some rounds; with or without fall-back."""

    def __init__(self, *, falls_back: bool = True, after_s: float = 20.0, away_s=AWAY_S):
        mesh = full_mesh(sorted(shards(FLEET)))
        models = {
            name: DeviceModel(
                seconds_per_step=1.0,
                settings=SETTINGS,
                peering=FallBack(
                    after_s=after_s, terms=PeerTerms(neighbours=mesh[name], timeout_s=2.0)
                )
                if falls_back
                else None,
            )
            for name in mesh
        }
        self.simulation = Simulation(patient_plan(FLEET, rounds=ROUNDS), FLEET, models=models)
        self.world = self.simulation.world
        self.world.watch(self._on_fact)
        self._away_s = away_s
        self.left = self.final = b""
        self.at_return: dict[str, Held] = {}
        for device in self.world.devices.values():
            device.held = Witness()

    def run(self) -> bytes:
        return self.simulation.finish()

    def facts(self, name: str) -> list[AgentFact]:
        held = self.world.devices[name].held
        assert isinstance(held, Witness)
        return held.facts

    def _on_fact(self, fact: object) -> None:
        if isinstance(fact, RoundClosed) and fact.round == LEAVES_AFTER:
            self.left = fact.model
            clock = self.world.clock
            # In the middle of the next round: everybody has an assignment in hand.
            clock.call_at(clock.now + 1.0, self.world.hub.cut, self._away_s)
            clock.call_at(clock.now + 1.0 + self._away_s, self._look)

    def _look(self) -> None:
        """What devices hold at the moment the hub returns."""
        for name, device in self.world.devices.items():
            held = device.held
            self.at_return[name] = Held(peer=held.peer, start=held.start)


@functools.cache
def outage() -> Outage:
    """One in which nothing else goes wrong, from its beginning to the end of the run."""
    usual = Outage()
    usual.final = usual.run()
    return usual


@functools.cache
def unseen() -> LocalData:
    digits = load("digits", cache=Path())
    return LocalData(digits.x[200:], digits.y[200:])


def accuracy(model: bytes) -> float:
    return evaluate(SPEC, decode(model), unseen()).accuracy


def test_what_was_learned_without_the_hub_comes_back_with_it():
    """At its return the fleet is at least as good as when it left, and the hub's next model too.

    Without the fall-back nobody learned anything meanwhile: the run ends no better.
    """
    with_peers, without = outage(), Outage(falls_back=False)
    final = with_peers.final
    final_without = without.run()

    left = accuracy(with_peers.left)
    kept = [held.peer for held in with_peers.at_return.values()]
    assert all(each is not None and each.round >= LEAVES_AFTER + 10 for each in kept)
    returned = float(np.mean([accuracy(each.model) for each in kept if each is not None]))
    assert returned >= left
    assert with_peers.left == without.left
    assert all(held.peer is None for held in without.at_return.values())
    assert accuracy(final) >= returned - 0.03
    assert accuracy(final) >= accuracy(final_without)


def test_the_training_after_the_return_starts_once_from_what_was_learned():
    """Peers' models are forgotten with the first update for the hub only (semantics 23)."""
    for name in outage().world.devices:
        kinds = [type(fact) for fact in outage().facts(name)]
        assert kinds.count(PeerForgotten) == 1
        forgotten = kinds.index(PeerForgotten)
        last_peer = max(n for n, kind in enumerate(kinds) if kind is PeerKept)
        between = kinds[last_peer:forgotten]
        assert last_peer < forgotten
        assert between.count(UpdateKept) == 1
        assert outage().world.devices[name].held.peer is None


def test_a_short_absence_makes_no_peers():
    """A hub that is back within the time changes no bit, and nobody falls back."""
    brief = Outage(after_s=100.0, away_s=50.0)
    final = brief.run()
    undisturbed = Outage(falls_back=False, away_s=0.0).run()

    assert final == undisturbed
    assert not any(
        isinstance(fact, PeerKept) for name in brief.at_return for fact in brief.facts(name)
    )


@pytest.mark.parametrize("phase_s", [80.0, 101.7, 121.2])
def test_a_device_that_crashes_meanwhile_goes_on_as_a_peer(phase_s):
    """Its journal brings it back among its neighbours, and then back to the hub."""
    crashed = Outage()
    crashed.world.clock.call_at(12.0 + phase_s, crashed.world.devices["d02"].kill, 3.0)
    crashed.run()

    kept = crashed.at_return["d02"].peer
    assert kept is not None
    others = [held.peer.round for held in crashed.at_return.values() if held.peer is not None]
    assert len(others) == FLEET
    assert max(others) - min(others) <= 2


def test_what_peers_would_go_on_from_is_the_last_whole_training():
    """It is the update where all of the model was sent, and its round is the hub's."""
    facts = outage().facts("d00")
    starts = [fact for fact in facts if isinstance(fact, StartKept)]
    updates = [fact for fact in facts if isinstance(fact, UpdateKept)]

    assert [start.model for start in starts] == [update.data for update in updates]
    assert [start.round for start in starts] == list(range(1, ROUNDS + 1))


# One device, by hand ----------------------------------------------------------------------

MODEL = encode({"hidden.weight": np.ones((4, 2), np.float32)})
START = StartKept("digits", 3, m.LocalPlan(model=SPEC), MODEL)


class Hand:
    """A device `d00` whose neighbour is `d01`, with a link, and with what its journal held."""

    def __init__(self, held: Held) -> None:
        terms = PeerTerms(neighbours=("d01",))
        rng = random.Random(0)
        agent = Agent("d00", m.Capability(agent="test"), held, settings=SETTINGS, rng=rng)
        self.agent = FallbackAgent(agent, FallBack(after_s=20.0, terms=terms), held)
        self.agent.start(0.0)
        self.agent.on_link(Link(is_up=True, epoch=1), 0.0)

    def hear(self, letter: m.AnyLetter, now: float) -> list[object]:
        return list(self.agent.on_message(m.Envelope(sender="hub", epoch=1, body=letter), now))


def test_a_task_of_the_hub_ends_peering_before_its_training_begins():
    """A task that comes before the word that the hub is back stops what the peer does first."""
    hand = Hand(Held(start=START))
    (peers,) = [e for e in hand.agent.on_wake(20.0) if isinstance(e, Train)]
    task = m.Assignment(
        attempt="digits_4_d00",
        run="digits",
        round=4,
        deadline_s=60.0,
        base=content_of(MODEL, 16 * 1024),
        inline=MODEL,
        plan=START.plan,
    )

    effects = hand.hear(task, 21.0)

    work = [e for e in effects if isinstance(e, (StopTraining, Train))]
    assert work[0] == StopTraining(peers.assignment.attempt)
    assert [e.assignment.attempt for e in work[1:] if isinstance(e, Train)] == [task.attempt]
    assert hand.agent.peer is None


def test_a_device_killed_as_a_peer_says_that_it_left_when_the_hub_is_back():
    """Else the broker would offer its last model to its neighbours at the next absence."""
    hand = Hand(Held(start=START, peer=PeerKept("digits", 9, model=MODEL)))

    said = [e.letter for e in hand.hear(m.HubState(online=True), 1.0) if isinstance(e, Send)]
    again = [e.letter for e in hand.hear(m.HubState(online=True), 2.0) if isinstance(e, Send)]

    assert m.PeerLeft(run="digits") in said
    assert m.PeerLeft(run="digits") not in again


def test_the_hubs_welcome_keeps_a_device_from_going_on_as_a_peer():
    """Where the hub's state never came, its welcome alone says that it is there."""
    hand = Hand(Held(start=START))
    said = [e.letter for e in hand.agent.on_wake(SETTINGS.timeout_s) if isinstance(e, Send)]
    assert any(isinstance(letter, m.Birth) for letter in said)

    hand.hear(m.Welcome(epoch=1), 19.0)

    assert not [e for e in hand.agent.on_wake(30.0) if isinstance(e, Train)]
