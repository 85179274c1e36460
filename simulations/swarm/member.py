"""One agent of a swarm: its state machine, what survives of it, and its link.

It performs the effects of the same `Agent` that runs on real devices, over a real broker. What
a journal would keep is kept in memory, so it survives a kill of the agent, not of the swarm.
"""

import asyncio
import logging
import random
from dataclasses import dataclass

from edge_agent.agent import Agent, AgentSettings
from edge_agent.facts import AgentFact, Held, UpdateKept
from federation.errors import ProtocolError
from federation.protocol import messages as m
from federation.protocol.effects import (
    Effect,
    Link,
    Record,
    Send,
    StopTraining,
    Train,
    WakeAt,
)
from federation.protocol.link import STEADY_S, Arrived, Ending, MailboxConfig, draw_backoff
from federation.protocol.topics import Route, open_letter, route
from simulations.swarm.connection import Connection
from simulations.swarm.dropping import Drop, Dropping, drop_of, is_due, phase_of
from simulations.swarm.tally import FINAL, Tally
from simulations.swarm.training import Trainer

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Surroundings:
    """What all members of a swarm share; `gate` lets so many connect at once."""

    namespace: str
    trainer: Trainer
    dropping: Dropping
    tally: Tally
    gate: asyncio.Semaphore
    settings: AgentSettings
    first_epoch: int
    is_five: bool = True
    is_closing: bool = False


class Member:
    """One agent. `live` runs it until it is told to leave."""

    def __init__(
        self, name: str, mailbox: MailboxConfig, around: Surroundings, rng: random.Random
    ) -> None:
        self.name = name
        self.complaint = ""
        self._mailbox = mailbox
        self._around = around
        self._rng = rng
        self._loop = asyncio.get_running_loop()
        self._held = Held()
        self._agent: Agent | None = None
        self._connection: Connection | None = None
        self._epoch = around.first_epoch
        self._away_until = 0.0
        self._drops: dict[str, Drop | None] = {}
        self._training: asyncio.Task[None] | None = None
        self._alarm: asyncio.TimerHandle | None = None

    @property
    def is_linked(self) -> bool:
        """Whether its link is up."""
        return self._connection is not None and self._connection.is_up

    async def live(self) -> None:
        """Keep the agent and its link up, through whatever befalls them, until cancelled."""
        failures = 0
        while not self._around.is_closing:
            await asyncio.sleep(max(0.0, self._away_until - self._loop.time()))
            if self._agent is None:
                self._boot()
            ending, up_s = await self._stay_connected()
            self.complaint = ending.reason
            if ending.wants_older_version:
                self._around.is_five = False
                continue
            failures = 0 if up_s >= STEADY_S or self._away_until > self._loop.time() else failures
            bounds_s = self._mailbox.backoff_s
            pause_s = bounds_s[1] if ending.is_refusal else 0.0
            await asyncio.sleep(pause_s or draw_backoff(failures, bounds_s, self._rng))
            failures += 1

    async def leave(self) -> None:
        """Say goodbye and end, as on an orderly shutdown."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close(*self._sealed(m.Presence(state="disconnected")))
        self._die()

    # What befalls it ----------------------------------------------------------------------

    def _boot(self) -> None:
        """Start the agent's process; it goes on where the journal ends."""
        self._agent = Agent(
            self.name,
            m.Capability(agent="swarm"),
            self._held,
            settings=self._around.settings,
            rng=self._rng,
        )
        self._perform(self._agent.start(self._loop.time()))

    def _die(self) -> None:
        self._agent = None
        if self._alarm is not None:
            self._alarm.cancel()
        if self._training is not None:
            self._training.cancel()

    def _befalls(self, phase: str, attempt: str) -> bool:
        """Whether the agent drops out at this phase of an attempt; then it has."""
        if not attempt or self._around.dropping.share <= 0:
            return False
        if attempt not in self._drops:
            # Of a round that is over nothing is awaited: at most the newest two are known.
            self._drops = dict([*self._drops.items()][-1:])
            self._drops[attempt] = drop_of(self._around.dropping, attempt)
        drop = self._drops[attempt]
        if drop is None or not is_due(drop, phase):
            return False
        self._drops[attempt] = None
        self._around.tally.drops[f"{drop.kind} {phase}"] += 1
        self._away_until = self._loop.time() + drop.away_s
        if drop.kind == "killed":
            self._die()
        if self._connection is not None:
            self._connection.abort()
        return True

    # Its link -----------------------------------------------------------------------------

    async def _stay_connected(self) -> tuple[Ending, float]:
        self._epoch += 1
        connection = Connection(
            self._mailbox,
            epoch=self._epoch,
            is_five=self._around.is_five,
            deliver=self._on_event,
        )
        self._connection = connection
        will = self._sealed(m.Presence(state="lost"))
        ending = await connection.run(*will, gate=self._around.gate)
        if self._connection is connection:
            self._connection = None
        if connection.came_up_at is None:
            return ending, 0.0
        if self._agent is not None:
            link = Link(is_up=False, epoch=self._epoch, reason=ending.reason)
            self._perform(self._agent.on_link(link, self._loop.time()))
        return ending, self._loop.time() - connection.came_up_at

    def _on_event(self, event: Arrived | Link) -> None:
        if self._agent is None:
            return
        if isinstance(event, Link):
            self._around.tally.connections += 1
            self._perform(self._agent.on_link(event, self._loop.time()))
        else:
            self._on_letter(event)

    def _on_letter(self, arrived: Arrived) -> None:
        tally, now = self._around.tally, self._loop.time()
        tally.letters_down += 1
        tally.bytes_down += len(arrived.payload)
        try:
            _, envelope = open_letter(self._around.namespace, arrived.topic, arrived.payload)
        except ProtocolError as error:
            tally.refusals[str(error)] += 1
            return
        match envelope.body:
            case m.Assignment(attempt=attempt):
                tally.asked(attempt, now)
            case m.UpdateAck(attempt=attempt, verdict=verdict) if verdict in FINAL:
                if self._befalls("before-ack", attempt):
                    return
                tally.answered(attempt, verdict, now)
            case _:
                pass
        if self._agent is not None:
            self._perform(self._agent.on_message(envelope, now))

    def _sealed(self, letter: m.AnyLetter) -> tuple[Route, bytes]:
        place = route(self._around.namespace, self.name, letter)
        return place, m.seal(self.name, self._epoch, letter)

    # The agent's effects ------------------------------------------------------------------

    def _perform(self, effects: list[Effect[AgentFact]]) -> None:
        for effect in effects:
            self._carry_out(effect)
            in_hand = self._held.assignment
            phase, attempt = phase_of(effect, in_hand.attempt if in_hand is not None else "")
            if phase and self._befalls(phase, attempt) and self._agent is None:
                return

    def _carry_out(self, effect: Effect[AgentFact]) -> None:
        match effect:
            case Record(fact):
                self._held.record(fact)
                if isinstance(fact, UpdateKept):
                    samples = fact.report.samples
                    self._around.tally.finished(fact.attempt, samples, self._loop.time())
            case Send(letter):
                self._send(letter)
            case Train(assignment, base, memory):
                work = self._train(assignment, base, memory)
                self._training = self._loop.create_task(work)
            case StopTraining():
                if self._training is not None:
                    self._training.cancel()
            case WakeAt(at):
                self._set_alarm(at)
            case _:
                pass  # A swarm has no peers, so nothing is mixed.

    def _send(self, letter: m.AnyLetter) -> None:
        connection, tally = self._connection, self._around.tally
        if connection is None:
            return
        place, payload = self._sealed(letter)
        if connection.publish(place, payload):
            tally.letters_up += 1
            tally.bytes_up += len(payload)

    async def _train(self, assignment: m.Assignment, base: bytes, memory: bytes) -> None:
        agent = self._agent
        trained = await self._around.trainer.train(self.name, assignment, base, memory)
        if trained.failure:
            self._around.tally.failures[trained.failure] += 1
        if agent is not None and agent is self._agent:
            self._perform(agent.on_trained(trained, self._loop.time()))

    def _set_alarm(self, at: float) -> None:
        """Be woken at this time; an alarm that rings too early finds out by itself."""
        if self._alarm is not None:
            if not self._alarm.cancelled() and self._alarm.when() == at:
                return
            self._alarm.cancel()
        self._alarm = self._loop.call_at(at, self._wake)

    def _wake(self) -> None:
        self._alarm = None
        if self._agent is not None:
            self._perform(self._agent.on_wake(self._loop.time()))
