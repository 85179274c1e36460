"""A simulated device: what survives of it, and its agent's process while that runs.

It performs the effects of the same `Agent` that runs on real devices. The journal, the epoch
and the checkpoint survive a kill; everything else is gone with the process.
"""

import dataclasses
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from cloud.coordination.run import parse_attempt
from edge_agent.agent import Agent
from edge_agent.facts import AgentFact, Held
from edge_agent.peering import Machine, device_machine, neighbours_of
from federation.errors import ProtocolError
from federation.protocol import messages as m
from federation.protocol.effects import (
    Effect,
    Link,
    Mix,
    Record,
    Send,
    StopTraining,
    Train,
    Trained,
    WakeAt,
)
from federation.protocol.link import draw_backoff
from federation.protocol.topics import device_filters, peer_filters, public_filter
from simulations.bus import Connection, Will
from simulations.clock import Alarm
from simulations.device_model import Member, capability
from simulations.job_slot import JobSlot
from simulations.meter import Meter
from simulations.sealed import seal, unseal
from simulations.surroundings import Surroundings
from simulations.topic_tree import Payload
from simulations.traps import Trap, phase_at

_BACKOFF_S = (0.5, 60.0)


@dataclass(slots=True)
class _Training:
    assignment: m.Assignment
    began_at: float
    done_s: float
    lasts_s: float


class Device:
    """One device of a fleet. Its process dies in each of its `traps`, once.

    `place` is its index in the fleet's order. Where it may sleep, `on_idle` is told whenever
    it has nothing to do; `held` and `epoch` are what it kept when it last slept.
    """

    __slots__ = (
        "_alarm", "_boot", "_checkpoint", "_connection", "_cut_until", "_failures",
        "_has_left", "_on_idle", "_rng", "_slot", "_training", "_world",
        "agent", "data", "epoch", "held", "meter", "model", "name", "place", "traps",
    )  # fmt: skip

    def __init__(
        self,
        member: Member,
        world: Surroundings,
        rng: random.Random,
        *,
        place: int = 0,
        held: Held | None = None,
        epoch: int = 0,
        on_idle: Callable[["Device"], None] | None = None,
    ) -> None:
        self.name, self.data, self.model = member.name, member.data, member.model
        self.place = place
        self.held = held if held is not None else Held()
        self.agent: Machine | None = None
        self.traps: list[Trap] = []
        self.epoch, self.meter = epoch, Meter(member.model, member.data)
        self._world, self._rng, self._on_idle = world, rng, on_idle
        self._slot = JobSlot(world.workshop, place, member.name)
        self._boot = self._failures = 0
        self._checkpoint: tuple[str, float] = ("", 0.0)
        self._cut_until = 0.0
        self._has_left = False
        self._training: _Training | None = None
        self._connection: Connection | None = None
        self._alarm = Alarm(world.clock, self._wake)

    # What happens to it -------------------------------------------------------------------

    def power_on(self) -> None:
        """Start the agent's process; it goes on where the journal ends."""
        if self.agent is not None or self._has_left:
            return
        self._boot += 1
        self.agent = self._machine()
        self._perform(self.agent.start(self._shown))
        self._connect(self._boot)

    def rouse(self, hub_epoch: int) -> None:
        """Awake as the agent that it would be by now: linked, and known to this hub.

        What it says in getting there was said before it slept, so nobody hears it now.
        """
        self._boot += 1
        is_linked = self._open_link([public_filter(self._world.namespace)], greets=False)
        agent = Agent(self.name, self._able, self.held, settings=self.model.settings, rng=self._rng)
        self.agent = agent
        for effect in agent.stand_by(self.epoch, hub_epoch, self._shown):
            self._carry_out(effect)
        if not is_linked:
            self._on_lost("broker is gone")

    def kill(self, away_s: float | None) -> None:
        """End the process at once; it is started again after `away_s`, or never."""
        if self.agent is None:
            return
        self.agent = None
        self._boot += 1
        self._alarm.cancel()
        self._slot.forget()
        if self._connection is not None:
            self._connection.die()
            self._connection = None
        if (training := self._training) is not None:
            self._checkpoint = (training.assignment.attempt, self._saved_s(training))
            self._break_off(training)
        if away_s is not None:
            self._world.clock.call_at(self._now + away_s, self.power_on)

    def cut(self, for_s: float, *, is_silent: bool = False) -> None:
        """The link dies for a while; where it dies silently, the device notices at the end."""
        self._cut_until = max(self._cut_until, self._now + for_s)
        if self._connection is not None:
            detected_after_s = 1.5 * self.model.settings.keepalive_s
            reason = "" if is_silent else "link is down"
            self._connection.lose(detected_after_s=detected_after_s, reason=reason)
        self._world.clock.call_at(self._cut_until, self._notice, self._connection)

    def leave(self) -> None:
        """Say goodbye and end, as on an orderly shutdown."""
        if self._connection is not None:
            self._connection.close(self._sealed(m.Presence(state="disconnected"), self.epoch))
            self._connection = None
        self._has_left = True
        self.kill(None)

    def _machine(self) -> Machine:
        model = self.model
        return device_machine(
            self.name, self._able, self.held, model.peering, settings=model.settings, rng=self._rng
        )

    @property
    def _able(self) -> m.Capability:
        return capability(self.model.level)

    # Its link -----------------------------------------------------------------------------

    def _connect(self, boot: int) -> None:
        if boot != self._boot or self._connection is not None or self.agent is None:
            return
        clock = self._world.clock
        if clock.now < self._cut_until:
            clock.call_at(self._cut_until, self._connect, boot)
            return
        self.epoch += 1
        namespace, neighbours = self._world.namespace, neighbours_of(self.model.peering)
        own = device_filters(namespace, self.name)
        if not self._open_link([*own, *peer_filters(namespace, self.name, neighbours)]):
            self._retry()
            return
        self._failures = 0
        self._perform(self.agent.on_link(Link(is_up=True, epoch=self.epoch), self._shown))

    def _open_link(self, filters: Sequence[str], *, greets: bool = True) -> bool:
        epoch = self.epoch
        self._connection = self._world.bus.connect(
            self.name,
            filters,
            deliver=self._on_letter,
            on_lost=self._on_lost,
            will=lambda: self._sealed(m.Presence(state="lost"), epoch),
            quality=self.model.quality,
            greets=greets,
        )
        return self._connection is not None

    def _retry(self) -> None:
        pause_s = draw_backoff(self._failures, _BACKOFF_S, self._rng)
        self._failures += 1
        at = max(self._now + pause_s, self._cut_until)
        self._world.clock.call_at(at, self._connect, self._boot)

    def _notice(self, connection: Connection | None) -> None:
        if connection is not None and connection is self._connection:
            connection.lose(detected_after_s=0.0, reason="broker was silent")

    def _on_lost(self, reason: str) -> None:
        if self.agent is None:
            return
        self._connection = None
        link = Link(is_up=False, epoch=self.epoch, reason=reason)
        self._perform(self.agent.on_link(link, self._shown))
        self._retry()

    def _on_letter(self, topic: str, payload: Payload) -> bool:
        if self.agent is None:
            return False
        try:
            envelope = unseal(self._world.namespace, topic, payload)
        except ProtocolError:
            return True  # As on a real device: refused, and the next one is read.
        self._perform(self.agent.on_message(envelope, self._shown))
        return self.agent is not None

    def _sealed(self, letter: m.AnyLetter, epoch: int) -> Will:
        return seal(self._world.namespace, self.name, letter, sender=self.name, epoch=epoch)

    # The agent's effects ------------------------------------------------------------------

    def _perform(self, effects: list[Effect[AgentFact]]) -> None:
        for effect in effects:
            if self.traps and self._springs(effect, is_done=False):
                return
            self._carry_out(effect)
            if self.traps and self._springs(effect, is_done=True):
                return
        self.rest()

    def rest(self) -> None:
        """Sleep, where it may and has nothing to do."""
        if self._on_idle is not None and self._is_idle:
            self.settle()
            if self._has_power():  # Paying for its letters may have emptied the battery.
                self._slot.forget()
                self._on_idle(self)
                # Nobody knows it any more; without these it would be a cycle, and stay a while.
                self._alarm.retire()
                self._connection = None

    @property
    def _is_idle(self) -> bool:
        agent, connection = self.agent, self._connection
        return (
            isinstance(agent, Agent)
            and agent.is_idle
            and agent.hub_epoch == self._world.hub_epoch()
            and not self.traps
            and connection is not None
            and connection.is_quiet
        )

    def _carry_out(self, effect: Effect[AgentFact]) -> None:
        match effect:
            case Record(fact):
                self.held.record(fact)
            case Send(letter):
                if self._connection is not None:
                    self._connection.publish(*self._sealed(letter, self.epoch))
            case Train(assignment, base, memory):
                self._begin_training(assignment, base, memory)
            case Mix():
                self._begin_mixing(effect)
            case StopTraining(attempt):
                self._stop_training(attempt)
            case WakeAt(at):
                self._alarm.set(self._due(at))

    def _wake(self) -> None:
        if self.agent is None:
            return
        if (training := self._training) is not None and training.lasts_s > 0:
            done_s = training.done_s + self._now - training.began_at
            self.agent.progress = min(done_s / training.lasts_s, 1.0)
        self._perform(self.agent.on_wake(self._shown))

    # Training -----------------------------------------------------------------------------

    def expect(self, assignment: m.Assignment) -> None:
        """An assignment is on its way here: a training that can only come may begin to wait."""
        base, kept = assignment.inline, self.held.memory
        if base is not None and not (self.held.updates or self.traps) and self._has_power():
            memory = kept.data if kept is not None and kept.run == assignment.run else b""
            if self.meter.fits(assignment.plan):
                self._slot.expect(assignment, base, memory)

    def _begin_training(self, assignment: m.Assignment, base: bytes, memory: bytes) -> None:
        if not self.meter.fits(assignment.plan):
            full = Trained(assignment.attempt, failure="its memory is too small for this model")
            self._hand_in(full)
            return
        lasts_s = self.meter.training_s(assignment.plan)
        saved_for, saved_s = self._checkpoint
        done_s = saved_s if saved_for == assignment.attempt else 0.0
        self._slot.begin(assignment, base, memory)
        training = _Training(assignment, self._now, done_s, lasts_s)
        self._training = training
        clock = self._world.clock
        if self.traps:
            clock.call_at(self._now + (lasts_s - done_s) / 2, self._spring_in_training, training)
        clock.call_at(self._now + lasts_s - done_s, self._end_training, training)

    def _end_training(self, training: _Training) -> None:
        if training is not self._training:
            return
        self._training = None
        self._account(training)
        if not self._has_power():
            self._slot.drop(training.assignment.attempt)
            return  # Its battery was empty at last.
        trained = self._slot.result(training.assignment.attempt)
        if not trained.failure:
            report = msgspec.structs.replace(trained.report, seconds=training.lasts_s)
            trained = dataclasses.replace(trained, report=report)
        self._hand_in(trained)

    def _has_power(self) -> bool:
        return self.agent is not None

    def _hand_in(self, trained: Trained) -> None:
        if self.agent is not None:
            self._perform(self.agent.on_trained(trained, self._shown))

    def _stop_training(self, attempt: str) -> None:
        if self._training is not None and self._training.assignment.attempt == attempt:
            self._break_off(self._training)
        self._checkpoint = ("", 0.0)

    def _break_off(self, training: _Training) -> None:
        self._training = None
        self._slot.drop(training.assignment.attempt)
        self._account(training)

    def _account(self, training: _Training) -> None:
        took_s = self._now - training.began_at
        self._charge(self.meter.train(training.assignment.plan, took_s, training.lasts_s))

    def _saved_s(self, training: _Training) -> float:
        done_s = training.done_s + self._now - training.began_at
        each_s = self.model.checkpoint_s
        return done_s // each_s * each_s if each_s > 0 else 0.0

    def _begin_mixing(self, mix: Mix) -> None:
        lasts_s = len(mix.received) * self.model.seconds_per_step
        self._world.clock.call_at(self._now + lasts_s, self._end_mixing, mix, self._boot)

    def _end_mixing(self, mix: Mix, boot: int) -> None:
        if boot == self._boot and self.agent is not None and not isinstance(self.agent, Agent):
            self._perform(self.agent.on_mixed(self._world.mix(mix, self.data), self._shown))

    def settle(self) -> None:
        """Bring the account of what was sent and received up to date, and pay for it."""
        self._charge(self.meter.read(self._world.bus.traffic(self.name)))

    def _charge(self, joules: float) -> None:
        """Take energy from the battery; when that is empty, the device goes off."""
        if not self.meter.pay(joules, self._now):
            self.kill(self.meter.away_s(self._now))

    # Failing at a phase -------------------------------------------------------------------

    def _springs(self, effect: Effect[AgentFact], *, is_done: bool) -> bool:
        phase, attempt = phase_at(effect, self.held, is_done=is_done)
        return bool(phase) and self._spring(phase, attempt)

    def _spring(self, phase: str, attempt: str) -> bool:
        parsed = parse_attempt(attempt)
        for trap in self.traps:
            if trap.phase == phase and parsed is not None and trap.round in (0, parsed[1]):
                self.traps.remove(trap)
                self.kill(trap.away_s)
                return True
        return False

    def _spring_in_training(self, training: _Training) -> None:
        if training is self._training:
            self._spring("mid-training", training.assignment.attempt)

    @property
    def _now(self) -> float:
        return self._world.clock.now

    def _due(self, at: float) -> float:
        """When the device's clock shows this; rounded, never so that it would come too early."""
        if self.model.body is None:
            return at
        wait_s = at - self._shown
        return self._now + max(wait_s * (1 + 1e-3), 1e-6) if wait_s > 0 else self._now

    @property
    def _shown(self) -> float:
        """What the device's own clock shows: all that its agent knows of time."""
        body = self.model.body
        return self._world.clock.now if body is None else body.shows(self._world.clock.now)
