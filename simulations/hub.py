"""The simulated hub: a coordinator's process, and the record that outlives it.

`introduce` tells a coordinator that has just begun of the devices that sleep; `announce` is told
of each assignment as it leaves.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cloud.config import RunPlan
from cloud.coordination.coordinator import Coordinator
from cloud.coordination.facts import (
    HubFact,
    HubMemory,
    RoundClosed,
    RoundOpened,
    RunOpened,
    UpdateAccepted,
)
from federation.errors import ProtocolError
from federation.protocol import messages as m
from federation.protocol.effects import Effect, Link, Record, Send, WakeAt
from federation.protocol.topics import hub_filters
from simulations.bus import Connection, Will
from simulations.clock import Alarm
from simulations.conditions import Conditions
from simulations.sealed import seal, unseal
from simulations.surroundings import Surroundings
from simulations.topic_tree import Payload
from simulations.traps import Trap

PHASES = ("round-open", "mid-gathering", "before-ack", "mid-aggregation")
"""Moments of a round at which the hub can be made to fail."""

_RECONNECT_S = 0.5
_KEPT_MODELS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class HubRecord:
    """What outlives a hub's process, as `cloud.record.store.Store` offers it.

    `record` writes a batch of facts, or none of it; `restore` gives the memory they amount to;
    `read_content` gives a model by its digest.
    """

    record: Callable[[Sequence[HubFact]], None] = lambda _: None
    restore: Callable[[], HubMemory] = HubMemory
    read_content: Callable[[str], bytes | None] | None = None


UNRECORDED = HubRecord()
"""Nothing outlives the hub."""


@dataclass(slots=True)
class _Models:
    """The newest models by digest, for a hub without a registry."""

    kept: dict[str, bytes] = field(default_factory=dict)

    def add(self, digest: str, model: bytes) -> None:
        self.kept[digest] = model
        while len(self.kept) > _KEPT_MODELS:
            del self.kept[next(iter(self.kept))]


class Hub:
    """One hub. Its process dies in each of its `traps`, once."""

    def __init__(
        self,
        plan: RunPlan,
        model: bytes,
        *,
        world: Surroundings,
        record: HubRecord,
        observe: Callable[[HubFact], None],
        conditions: Conditions,
    ) -> None:
        self.coordinator: Coordinator | None = None
        self.introduce: Callable[[Coordinator], None] = lambda _: None
        self.announce: Callable[[str, m.Assignment], None] = lambda _device, _letter: None
        self.traps: list[Trap] = []
        self._plan, self._model = plan, model
        self._clock, self._bus, self._namespace = world.clock, world.bus, world.namespace
        self._conditions = conditions
        self._record, self._observe = record, observe
        self._models = _Models()
        self._is_opened = False
        self._boot = self.epoch = 0
        self._cut_until = 0.0
        self._connection: Connection | None = None
        self._alarm = Alarm(world.clock, self._wake)

    # What happens to it -------------------------------------------------------------------

    def power_on(self) -> None:
        """Start the process: it goes on where the record ends."""
        if self.coordinator is not None:
            return
        self._boot += 1
        self.epoch += 1
        self.coordinator = Coordinator(
            self._record.restore(),
            select=self._conditions.select,
            read_content=self._record.read_content or self._models.kept.get,
            shares_memory=self._conditions.shares_memory,
        )
        self.introduce(self.coordinator)
        self._perform(self.coordinator.start(self._clock.now))
        if not self._is_opened and self.coordinator is not None:
            opening = self.coordinator.open_run(self._plan, self._model, self._clock.now)
            self._perform(opening)
        self._connect(self._boot)

    def kill(self, away_s: float) -> None:
        """End the process at once; it is started again after `away_s`."""
        if self.coordinator is None:
            return
        self.coordinator = None
        self._boot += 1
        self._alarm.cancel()
        if self._connection is not None:
            self._connection.die()
            self._connection = None
        self._clock.call_at(self._clock.now + away_s, self.power_on)

    def cut(self, for_s: float) -> None:
        """The hub's own link to the broker dies for a while."""
        self._cut_until = max(self._cut_until, self._clock.now + for_s)
        if self._connection is not None:
            self._connection.lose(detected_after_s=45.0, reason="link is down")

    # Its link -----------------------------------------------------------------------------

    def _connect(self, boot: int) -> None:
        if boot != self._boot or self._connection is not None or self.coordinator is None:
            return
        if self._clock.now < self._cut_until:
            self._clock.call_at(self._cut_until, self._connect, boot)
            return
        epoch = self.epoch
        self._connection = self._bus.connect(
            "hub",
            hub_filters(self._namespace),
            deliver=self._on_letter,
            on_lost=self._on_lost,
            will=lambda: self._sealed(m.HubState(online=False), "", epoch),
            quality=self._conditions.hub_quality,
        )
        if self._connection is None:
            self._clock.call_at(self._clock.now + _RECONNECT_S, self._connect, boot)
            return
        link = Link(is_up=True, epoch=self.epoch)
        self._perform(self.coordinator.on_link(link, self._clock.now))

    def _on_lost(self, reason: str) -> None:
        if self.coordinator is None:
            return
        self._connection = None
        link = Link(is_up=False, epoch=self.epoch, reason=reason)
        self._perform(self.coordinator.on_link(link, self._clock.now))
        self._clock.call_at(self._clock.now + _RECONNECT_S, self._connect, self._boot)

    def _on_letter(self, topic: str, payload: Payload) -> bool:
        if self.coordinator is None:
            return False
        now = self._clock.now
        try:
            envelope = unseal(self._namespace, topic, payload)
        except ProtocolError as error:
            return self._perform(self.coordinator.on_unreadable(topic, error, now))
        return self._perform(self.coordinator.on_message(envelope, now))

    def _sealed(self, letter: m.AnyLetter, device: str, epoch: int | None = None) -> Will:
        epoch = self.epoch if epoch is None else epoch
        return seal(self._namespace, device, letter, sender="hub", epoch=epoch)

    # The coordinator's effects ------------------------------------------------------------

    def _perform(self, effects: list[Effect[HubFact]]) -> bool:
        """Record all facts, then say what follows from them; False if the hub died over it."""
        facts = [effect.fact for effect in effects if isinstance(effect, Record)]
        if facts:
            if self.traps and self._springs(facts, "mid-aggregation"):
                return False
            self._record.record(facts)
            for fact in facts:
                self._learn(fact)
            if self.traps and self._springs(facts, "round-open", "before-ack"):
                return False
        for effect in effects:
            match effect:
                case Send(letter, device):
                    if self._connection is not None:
                        self._connection.publish(*self._sealed(letter, device))
                        if isinstance(letter, m.Assignment):
                            self.announce(device, letter)
                case WakeAt(at):
                    self._alarm.set(at)
                case _:
                    pass
        return not (self.traps and self._springs(facts, "mid-gathering"))

    def _learn(self, fact: HubFact) -> None:
        match fact:
            case RunOpened():
                self._is_opened = True
                self._models.add(fact.content.digest, fact.model)
            case RoundClosed():
                self._models.add(fact.content.digest, fact.model)
            case _:
                pass
        self._observe(fact)

    def _wake(self) -> None:
        if self.coordinator is not None:
            self._perform(self.coordinator.on_wake(self._clock.now))

    def _springs(self, facts: Sequence[HubFact], *phases: str) -> bool:
        for trap in self.traps:
            if trap.phase in phases and any(
                isinstance(fact, _MARKS[trap.phase]) and trap.round in (0, fact.round)
                for fact in facts
            ):
                self.traps.remove(trap)
                self.kill(trap.away_s)
                return True
        return False


_MARKS: dict[str, type[RoundOpened | UpdateAccepted | RoundClosed]] = {
    "round-open": RoundOpened,
    "mid-gathering": UpdateAccepted,
    "before-ack": UpdateAccepted,
    "mid-aggregation": RoundClosed,
}
