"""An agent that goes on as a peer while its hub is away, and brings back what it learned.

The agent is the same as without this, and runs all the time: it hears the hub come back. The
peer exists from the moment the hub has been away for too long until then.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import msgspec

from edge_agent.agent import Agent
from edge_agent.facts import AgentFact, Held
from edge_agent.peering_facts import PeerForgotten, PeerKept, StartKept
from edge_agent.peers import Peer, PeerPlan, PeerTerms
from federation.protocol import messages as m
from federation.protocol.effects import (
    Effect,
    Link,
    Mixed,
    Record,
    Send,
    StopTraining,
    Train,
    Trained,
    WakeAt,
)

Effects = list[Effect[AgentFact]]

SETTLE_S = 5.0
"""After a connection the hub's retained state is awaited for so long before it counts as away."""

_NEVER = float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class FallBack:
    """Go on as a peer on these terms once the hub has been away for `after_s` seconds."""

    after_s: float
    terms: PeerTerms


class _HubWatch:
    """For how long the hub has been away, as far as this device can know."""

    def __init__(self, after_s: float) -> None:
        self._after_s = after_s
        self._epoch = -1
        self._away_since = self._link_since = _NEVER
        self.is_online = False

    @property
    def too_long_at(self) -> float:
        """When it will have been away for too long; never while it, or our own link, is there."""
        if self.is_online or self._link_since == _NEVER:
            return _NEVER
        settled_at = self._link_since + min(self._after_s, SETTLE_S)
        return max(self._away_since + self._after_s, settled_at)

    def start(self, now: float) -> None:
        """It is not there before it was heard of."""
        self._away_since = now

    def on_link(self, link: Link, now: float) -> None:
        """Without a link nobody is there; a new one tells anew."""
        if self.is_online:
            self.is_online, self._away_since = False, now
        self._link_since = now if link.is_up else _NEVER

    def on_state(self, epoch: int, letter: m.HubState, now: float) -> None:
        """What the hub, or its last will, said. Words of a hub that was replaced are void."""
        if epoch < self._epoch:
            return
        self._epoch = epoch
        if self.is_online and not letter.online:
            self._away_since = now
        self.is_online = letter.online


class FallbackAgent:
    """An agent and, at times, a peer: one state machine. `held` is what the journal gave back."""

    def __init__(self, agent: Agent, fall_back: FallBack, held: Held) -> None:
        self.agent = agent
        self.peer: Peer | None = None
        self._terms = fall_back.terms
        self._hub = _HubWatch(fall_back.after_s)
        self._start, self._learned = held.start, held.peer
        self._offered_in = held.peer.run if held.peer is not None else ""
        self._heard: dict[str, m.Envelope] = {}
        self._training: Train | None = None
        self._link = Link(is_up=False, epoch=0)
        self._agent_wakes_at = self._peer_wakes_at = _NEVER
        self._out: Effects = []

    @property
    def progress(self) -> float:
        """How far the training in hand is, from 0 to 1."""
        return self.agent.progress

    @progress.setter
    def progress(self, share: float) -> None:
        self.agent.progress = share

    # The state machine's methods ----------------------------------------------------------

    def start(self, now: float) -> Effects:
        """Go on where the journal ends; as a peer only once the hub has been away again."""
        self._hub.start(now)
        self._take_agents(self.agent.start(now), now)
        return self._finish(now)

    def on_link(self, link: Link, now: float) -> Effects:
        """The link came up or went down: for both."""
        self._link = link
        self._hub.on_link(link, now)
        self._take_agents(self.agent.on_link(link, now), now)
        if self.peer is not None:
            self._take_peers(self.peer.on_link(link, now))
        return self._finish(now)

    def on_message(self, envelope: m.Envelope, now: float) -> Effects:
        """A letter of the hub or of a neighbour."""
        match envelope.body:
            case m.PeerModel() | m.PeerLeft() | m.PeerAsk() | m.PeerChunk():
                self._on_neighbour(envelope, now)
                return self._finish(now)
            case m.HubState() as letter:
                self._hear_of_hub(envelope.epoch, letter, now)
            case m.Welcome() as letter if self.agent.is_welcomed(letter):
                self._hear_of_hub(envelope.epoch, m.HubState(online=True), now)
            case _:
                pass
        self._take_agents(self.agent.on_message(envelope, now), now)
        return self._finish(now)

    def on_trained(self, trained: Trained, now: float) -> Effects:
        """A training ended: the agent's or the peer's."""
        mine = self._training
        if mine is not None and mine.assignment.attempt == trained.attempt:
            self._training = None
            self._take_agents(self.agent.on_trained(trained, now), now)
            if not trained.failure:
                self._remember(mine, trained)
        elif self.peer is not None:
            self._take_peers(self.peer.on_trained(trained, now))
        else:
            self._take_agents(self.agent.on_trained(trained, now), now)
        return self._finish(now)

    def on_mixed(self, mixed: Mixed, now: float) -> Effects:
        """A mixing ended."""
        if self.peer is not None:
            self._take_peers(self.peer.on_mixed(mixed, now))
        return self._finish(now)

    def on_wake(self, now: float) -> Effects:
        """Time passed: for both; and it may be time to go on without the hub."""
        if now >= self._agent_wakes_at:
            self._take_agents(self.agent.on_wake(now), now)
        if self.peer is not None and now >= self._peer_wakes_at:
            self._take_peers(self.peer.on_wake(now))
        if now >= self._falls_back_at:
            self._fall_back(now)
        return self._finish(now)

    # Going and coming back ----------------------------------------------------------------

    @property
    def _falls_back_at(self) -> float:
        is_free = self.peer is None and self._training is None
        return self._hub.too_long_at if is_free and self._start is not None else _NEVER

    def _fall_back(self, now: float) -> None:
        """Become a peer: from what was learned without the hub, else from the last training."""
        start = self._start
        if start is None:
            return
        kept = self._learned
        if kept is None or kept.run != start.run:
            kept = PeerKept(start.run, start.round, model=start.model)
        # A plain training: what other methods need of a hub is not there.
        plan = msgspec.structs.replace(start.plan, method="fedavg", params={})
        self.peer = Peer(
            self.agent.device, PeerPlan(run=start.run, plan=plan, terms=self._terms), kept
        )
        self._offered_in = start.run
        self._take_peers(self.peer.start(now))
        self._take_peers(self.peer.on_link(self._link, now))
        for envelope in self._heard.values():
            self._take_peers(self.peer.on_message(envelope, now))

    def _hear_of_hub(self, epoch: int, letter: m.HubState, now: float) -> None:
        self._hub.on_state(epoch, letter, now)
        if self._hub.is_online:
            self._return(now)

    def _return(self, now: float) -> None:
        """The hub is back: peer no more, and keep what was learned for its next training."""
        if self.peer is not None:
            self._take_peers(self.peer.stop(now))
            self.peer, self._peer_wakes_at = None, _NEVER
        elif self._offered_in and self._link.is_up:
            # It was killed as a peer, and the broker still offers its last model.
            self._out.append(Send(m.PeerLeft(run=self._offered_in), self.agent.device))
        if self._link.is_up:
            self._offered_in = ""

    def _on_neighbour(self, envelope: m.Envelope, now: float) -> None:
        if envelope.sender in self._terms.neighbours:
            # The broker tells of a retained model once only, perhaps before we are a peer.
            match envelope.body:
                case m.PeerModel():
                    self._heard[envelope.sender] = envelope
                case m.PeerLeft():
                    self._heard.pop(envelope.sender, None)
                case _:
                    pass
        if self.peer is not None:
            self._take_peers(self.peer.on_message(envelope, now))

    def _remember(self, mine: Train, trained: Trained) -> None:
        """What would be gone on from without the hub; it holds all that was learned before."""
        assignment = mine.assignment
        plan = assignment.plan
        is_whole = plan.layers is None and plan.uplink == m.Uplink()
        model = trained.update if is_whole else mine.base
        self._start = StartKept(assignment.run, assignment.round, plan, model)
        self._out.append(Record(self._start))
        if self._learned is not None:
            self._learned = None
            self._out.append(Record(PeerForgotten()))

    # Effects ------------------------------------------------------------------------------

    def _take_agents(self, effects: Iterable[Effect[AgentFact]], now: float) -> None:
        for effect in effects:
            match effect:
                case WakeAt(at):
                    self._agent_wakes_at = at
                    continue
                case Train():
                    # A broker may pass on a task before it says that the hub is back.
                    self._return(now)
                    effect = self._training = self._with_learned(effect)  # noqa: PLW2901
                case StopTraining(attempt):
                    if self._training and self._training.assignment.attempt == attempt:
                        self._training = None
                case _:
                    pass
            self._out.append(effect)

    def _take_peers(self, effects: Iterable[Effect[AgentFact]]) -> None:
        for effect in effects:
            match effect:
                case WakeAt(at):
                    self._peer_wakes_at = at
                case Send(m.Presence()):
                    pass  # The agent says so itself.
                case Record(PeerKept() as kept):
                    self._learned = kept
                    self._out.append(effect)
                case _:
                    self._out.append(effect)

    def _with_learned(self, effect: Train) -> Train:
        """The same training, beginning with what was learned in its run without the hub."""
        learned = self._learned
        if learned is None or learned.run != effect.assignment.run:
            return effect
        # Late, since an agent has no other need of NumPy.
        from federation.learning.submodel import LEARNED
        from federation.protocol.codec import decode, encode

        memory = decode(effect.memory) if effect.memory else {}
        for name, tensor in decode(learned.model).items():
            memory[f"{LEARNED}/{name}"] = tensor
        return replace(effect, memory=encode(memory))

    def _finish(self, now: float) -> Effects:
        waits = (self._agent_wakes_at, self._peer_wakes_at, self._falls_back_at)
        out, self._out = self._out, []
        return [*out, WakeAt(max(min(waits), now))]
