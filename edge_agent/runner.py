"""Performs a device's effects for real: the mailbox, the journal, the trainer's process.

One thread runs the state machine; the mailbox and the worker only put into its inbox.
"""

import logging
import os
import queue
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import msgspec

from edge_agent.agent import Agent, AgentSettings
from edge_agent.config import AgentConfig, password
from edge_agent.facts import AgentFact
from edge_agent.frames import DataSource
from edge_agent.journal import Journal
from edge_agent.peering import device_machine, neighbours_of
from edge_agent.peering_facts import PeerKept
from edge_agent.worker import Worker, WorkerLimits
from federation.errors import ProtocolError
from federation.protocol import messages as m
from federation.protocol.effects import (
    Effect,
    Link,
    Mix,
    Mixed,
    Record,
    Send,
    StopTraining,
    Train,
    Trained,
    WakeAt,
)
from federation.protocol.link import Arrived, MailboxConfig
from federation.protocol.mqtt import Mailbox
from federation.protocol.topics import (
    Route,
    device_filters,
    open_letter,
    peer_filters,
    route,
)

VERSION = "0.1.0"

LONGEST_NAP_S = 3600.0
"""A queue cannot be waited on without end and with a limit at once."""

_log = logging.getLogger("headwater.agent")


@dataclass(frozen=True, slots=True)
class _Progress:
    attempt: str
    share: float


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


_Event: TypeAlias = Arrived | Link | Trained | Mixed | _Progress | _Stop


class AgentRunner:
    """One device, really running. `clock` gives seconds and never jumps."""

    def __init__(
        self, config: AgentConfig, *, clock: Callable[[], float], rng: random.Random
    ) -> None:
        self._config = config
        self._clock = clock
        self._inbox: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._journal = Journal(config.folder)
        settings = AgentSettings(
            heartbeat_s=config.heartbeat_s,
            keepalive_s=config.keepalive_s,
            energy=msgspec.structs.asdict(config.energy) if config.energy is not None else None,
        )
        peering = config.peers.as_peering(config.device) if config.peers is not None else None
        self._agent = device_machine(
            config.device,
            _capability(config),
            self._journal.restore(),
            peering,
            settings=settings,
            rng=rng,
        )
        self._worker = self._make_worker()
        self._mailbox = Mailbox(
            MailboxConfig(
                url=config.broker,
                client_id=f"{config.namespace}-{config.device}",
                filters=(
                    *device_filters(config.namespace, config.device),
                    *peer_filters(config.namespace, config.device, neighbours_of(peering)),
                ),
                keepalive_s=config.keepalive_s,
                user=config.user,
                password=password(),
                ca_file=config.ca_file,
            ),
            deliver=self._inbox.put,
            next_epoch=self._journal.next_epoch,
            last_will=lambda epoch: self._presence("lost", epoch),
            rng=rng,
        )
        self._epoch = 0
        self._wake_at = 0.0

    def run(self) -> None:
        """Run until `stop`; then say goodbye, so that the hub knows at once.

        Raises:
            StoreError: the journal cannot be written. Nothing that was promised is lost.
        """
        _log.info("agent begins device=%s broker=%s", self._config.device, self._config.broker)
        try:
            self._perform(self._agent.start(self._clock()))
            self._mailbox.open()
            while self._step():
                pass
        finally:
            self._mailbox.close(self._presence("disconnected", self._epoch))
            if self._worker is not None:
                self._worker.close()
            self._journal.close()

    def stop(self) -> None:
        """End `run` soon; from any thread, or a signal handler."""
        self._inbox.put(_Stop())

    def _make_worker(self) -> Worker | None:
        config = self._config
        if config.data is None:
            return None
        return Worker(
            DataSource(folder=str(config.data.folder or ""), entry=config.data.entry),
            on_progress=lambda attempt, done, total: self._inbox.put(
                _Progress(attempt, done / max(total, 1))
            ),
            on_trained=self._inbox.put,
            on_mixed=self._inbox.put,
            checkpoint_path=self._journal.checkpoint_path,
            limits=WorkerLimits(
                threads=config.training.threads,
                stall_s=config.training.stall_s,
                idle_s=config.training.idle_s,
                checkpoint_every_s=config.training.checkpoint_s,
            ),
        )

    def _step(self) -> bool:
        """Wait for one event or the next wake, and perform what follows; False at the end."""
        now = self._clock()
        try:
            event = self._inbox.get(timeout=min(max(self._wake_at - now, 0.0), LONGEST_NAP_S))
        except queue.Empty:
            self._perform(self._agent.on_wake(self._clock()))
            return True
        if isinstance(event, _Stop):
            return False
        self._perform(self._react(event, self._clock()))
        if self._clock() >= self._wake_at:
            # However many letters come, time is not forgotten.
            self._perform(self._agent.on_wake(self._clock()))
        return True

    def _react(
        self, event: Arrived | Link | Trained | Mixed | _Progress, now: float
    ) -> list[Effect[AgentFact]]:
        match event:
            case Arrived():
                return self._on_arrived(event, now)
            case Link():
                self._epoch = event.epoch
                level = logging.INFO if event.is_up else logging.WARNING
                _log.log(level, "link up=%s epoch=%d %s", event.is_up, event.epoch, event.reason)
                return self._agent.on_link(event, now)
            case Trained():
                if event.failure:
                    _log.warning("training failed attempt=%s: %s", event.attempt, event.failure)
                return self._agent.on_trained(event, now)
            case Mixed():
                if event.failure:
                    _log.warning("mixing failed attempt=%s: %s", event.attempt, event.failure)
                return [] if isinstance(self._agent, Agent) else self._agent.on_mixed(event, now)
            case _Progress():
                self._agent.progress = event.share
                return []

    def _on_arrived(self, arrived: Arrived, now: float) -> list[Effect[AgentFact]]:
        try:
            _, envelope = open_letter(self._config.namespace, arrived.topic, arrived.payload)
        except ProtocolError as error:
            _log.warning("letter refused: %s", error)
            return []
        try:
            return self._agent.on_message(envelope, now)
        except Exception as error:  # the outermost loop: no letter may end the agent
            _log.error("letter failed sender=%s: %r", envelope.sender, error)
            return []

    def _perform(self, effects: list[Effect[AgentFact]]) -> None:
        for effect in effects:
            match effect:
                case Record(fact):
                    self._journal.record(fact)
                    if isinstance(fact, PeerKept):
                        _log_peer(fact)
                case Send(letter):
                    self._mailbox.publish(*self._sealed(letter, self._epoch))
                case Train(assignment, base, memory):
                    self._train(assignment, base, memory)
                case Mix():
                    self._mix(effect)
                case StopTraining(attempt):
                    if self._worker is not None:
                        self._worker.stop(attempt)
                case WakeAt(at):
                    self._wake_at = at

    def _train(self, assignment: m.Assignment, base: bytes, memory: bytes) -> None:
        _log.info("training begins attempt=%s base_bytes=%d", assignment.attempt, len(base))
        if self._worker is None:
            reason = "this device has no [data] to train on"
            self._inbox.put(Trained(assignment.attempt, failure=reason))
            return
        self._worker.train(assignment, base, memory)

    def _mix(self, mix: Mix) -> None:
        if self._worker is None:
            reason = "this device has no [data] to judge models on"
            self._inbox.put(Mixed(attempt=mix.attempt, failure=reason))
            return
        self._worker.mix(mix)

    def _sealed(self, letter: m.AnyLetter, epoch: int) -> tuple[Route, bytes]:
        device = self._config.device
        return route(self._config.namespace, device, letter), m.seal(device, epoch, letter)

    def _presence(self, state: m.State, epoch: int) -> tuple[Route, bytes]:
        return self._sealed(m.Presence(state=state), epoch)


def _log_peer(kept: PeerKept) -> None:
    what = "mixed" if kept.is_mixed else "trained"
    shares = " ".join(f"{peer}={share:.3f}" for peer, share in kept.row.items())
    _log.info("peer %s run=%s round=%d %s", what, kept.run, kept.round, shares)
    for peer, reason in kept.refused.items() if kept.is_mixed else ():
        _log.warning("peer refused peer=%s: %s", peer, reason)


def _capability(config: AgentConfig) -> m.Capability:
    pages, page_bytes = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return m.Capability(
        agent=VERSION,
        memory_mb=pages * page_bytes // 2**20,
        cores=os.cpu_count() or 1,
        level=config.training.level,
        trains=config.data is not None,
        infers=config.infers,
        mirrors=config.twin.mirror and config.data is not None,
    )
