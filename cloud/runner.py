"""Performs the hub's effects for real: the mailbox, the store, the registry, the appraiser.

One thread runs the state machine on batches of letters. Of each batch all facts are committed
in one transaction; then its letters are sent, and only then are the letters it answered
acknowledged to the broker. Killed at any moment, the hub goes on from the record.
"""

import contextlib
import logging
import queue
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal, TypeAlias

from cloud.appraiser import Appraiser, Closed, Exported, last_model, unappraised
from cloud.config import HubConfig, RunPlan
from cloud.coordination.coordinator import Coordinator
from cloud.coordination.facts import HubFact, RoundClosed, RunEnded
from cloud.initial import initial_model
from cloud.mirrors import follow
from cloud.record.registry import Registry
from cloud.record.store import Store
from cloud.standing_in import StandIns, StoodIn
from cloud.twins.follower import Follower
from cloud.twins.selecting import Choosing, Task
from cloud.twins.store import TwinStore, wish_of
from federation.errors import ConfigError, ProtocolError, StoreError
from federation.protocol.effects import Effect, Link, Record, Send, Train, WakeAt
from federation.protocol.link import Arrived, MailboxConfig
from federation.protocol.messages import AnyLetter, HubState, seal
from federation.protocol.mqtt import Mailbox
from federation.protocol.topics import Route, open_letter, parse, route
from twin.agent import why_not
from twin.mirror import MirrorStore

POLL_S = 0.25
"""How often the hub looks for runs that operators ask for."""

TEND_S = 2.0
"""How often the hub sees whether the broker that it started lives."""

MAX_BATCH = 256
"""At most this many letters share one transaction."""

RETRY_S = (1.0, 30.0)
"""First and longest pause before a store that failed is tried again."""

_log = logging.getLogger("headwater.hub")


@dataclass(frozen=True, slots=True)
class _Wished:
    device: str


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


_Event: TypeAlias = Arrived | Link | Exported | StoodIn | _Wished | _Stop


class HubRunner:
    """The hub, really running. `clock` gives seconds and never jumps."""

    def __init__(
        self,
        config: HubConfig,
        mailbox: MailboxConfig,
        *,
        tend_broker: Callable[[], bool],
        clock: Callable[[], float],
        rng: random.Random,
    ) -> None:
        mailbox.check()
        self._config = config
        self._mailbox_config = mailbox
        self._tend_broker = tend_broker
        self._clock = clock
        self._rng = rng
        self._inbox: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._registry = Registry(config.folder)
        self._mirrors = MirrorStore(config.folder / "mirrors")
        self._stand_ins = StandIns(self._mirrors, self._inbox.put)
        self._store = Store(config.database_url)
        self.twins = TwinStore(config.database_url)
        self._follower = Follower(self.twins)
        self._select = Choosing(self.twins, self._task, lambda: self._coordinator.wishes, clock)
        self._epoch = 0
        self._mailbox: Mailbox | None = None
        self._read_model = lru_cache(maxsize=4)(self._registry.read)
        self._appraiser = Appraiser(self._store, self._registry, self._inbox.put)
        self._plans: dict[str, RunPlan] = {}
        self._is_stopping = False

    def run(self) -> None:
        """Run until `stop`; then tell the devices, so that they hold what they have."""
        pause_s = RETRY_S[0]
        if self._config.twins.follow:
            self._follower.start()
        try:
            while not self._is_stopping:
                try:
                    self._begin()
                    while self._step():
                        pause_s = RETRY_S[0]
                except StoreError as error:
                    # Nothing was said of what could not be written: begin again from the
                    # record. The broker delivers again what was not acknowledged.
                    _log.error("record failed, next try in %.0f s: %s", pause_s, error)
                    self._hang_up(None)
                    self._rest(pause_s)
                    pause_s = min(2 * pause_s, RETRY_S[1])
        finally:
            self._hang_up(self._sealed(HubState(online=False)))
            self._appraiser.close()
            self._stand_ins.close()
            self._follower.close()
            self.twins.close()
            self._store.close()

    def stop(self) -> None:
        """End `run` soon; from any thread, or a signal handler."""
        self._is_stopping = True
        self._inbox.put(_Stop())

    def wished(self, device: str) -> None:
        """Somebody wrote what is desired of this device; from any thread."""
        self._inbox.put(_Wished(device))

    def _rest(self, pause_s: float) -> None:
        """Wait for this long, or until `stop`."""
        wake_at = time.monotonic() + pause_s
        while not self._is_stopping and time.monotonic() < wake_at:
            time.sleep(0.1)

    def _hang_up(self, goodbye: tuple[Route, bytes] | None) -> None:
        if self._mailbox is not None:
            self._mailbox.close(goodbye)
            self._mailbox = None

    def _begin(self) -> None:
        """Go on where the record ends, under an epoch of its own: devices then tell all again."""
        # A new record begins above what an older one may have come to, as a device's epoch does.
        self._epoch = self._store.next_epoch(first=int(self._clock() * 1000))
        _log.info("hub begins epoch=%d folder=%s", self._epoch, self._config.folder)
        memory = self._store.restore(self._registry)
        memory.wishes = self.twins.wishes()
        self._coordinator = Coordinator(
            memory,
            select=self._select,
            read_content=self._read_content,
            may_stand_in=partial(why_not, self._mirrors),
        )
        self._wake_at = self._poll_at = self._tend_at = self._clock()
        self._catch_up()
        self._perform(self._coordinator.start(self._clock()), [])
        self._mailbox = Mailbox(
            self._mailbox_config,
            deliver=self._inbox.put,
            next_epoch=lambda: self._epoch,
            last_will=lambda _: self._sealed(HubState(online=False)),
            rng=self._rng,
        )
        self._mailbox.open()

    def _catch_up(self) -> None:
        """Appraise what an earlier hub had not come to."""
        run = self._coordinator.run
        if run is not None:
            self._plans[run.plan.name] = run.plan
        for closed in unappraised(self._store, self._registry):
            self._appraiser.appraise(closed)

    def _step(self) -> bool:
        """Wait for letters or the next look, and perform what follows; False at the end."""
        batch = self._next_batch()
        if self._is_stopping:
            return False
        effects: list[Effect[HubFact]] = []
        arrived: list[Arrived] = []
        now = self._clock()
        for event in batch:
            if isinstance(event, Arrived):
                arrived.append(event)
            effects += self._react(event, now)
        if now >= self._wake_at:
            self._wake_at = float("inf")
            effects += self._coordinator.on_wake(now)
        if now >= self._poll_at:
            self._poll_at = now + POLL_S
            effects += self._ask_operators(now)
            if now >= self._tend_at:
                self._tend_at = now + TEND_S
                self._tend_broker()
        self._perform(effects, arrived)
        return True

    def _next_batch(self) -> list[_Event]:
        """What has come in, after waiting for the first of it until the next look."""
        wait_s = max(min(self._wake_at, self._poll_at) - self._clock(), 0.0)
        batch: list[_Event] = []
        with contextlib.suppress(queue.Empty):
            batch.append(self._inbox.get(timeout=wait_s))
            while len(batch) < MAX_BATCH:
                batch.append(self._inbox.get_nowait())
        return batch

    def _react(self, event: _Event, now: float) -> list[Effect[HubFact]]:
        match event:
            case Arrived():
                return self._on_arrived(event, now)
            case Link():
                _log.log(
                    logging.INFO if event.is_up else logging.WARNING,
                    "link up=%s %s",
                    event.is_up,
                    event.reason,
                )
                return self._coordinator.on_link(event, now)
            case StoodIn(trained):
                return self._coordinator.on_stood_in(trained, now)
            case Exported():
                return self._coordinator.on_released(event.release, event.onnx, now)
            case _Wished(device):
                wish = wish_of(self.twins.twin(device).shadow)
                return self._coordinator.on_wish(device, wish, now)
            case _Stop():
                return []

    def _on_arrived(self, arrived: Arrived, now: float) -> list[Effect[HubFact]]:
        try:
            _, envelope = open_letter(self._config.namespace, arrived.topic, arrived.payload)
        except ProtocolError as error:
            _log.warning("letter refused topic=%s: %s", arrived.topic, error)
            return self._coordinator.on_unreadable(self._branch(arrived.topic), error, now)
        try:
            return self._coordinator.on_message(envelope, now)
        except Exception as error:  # the outermost loop: no letter may end the hub
            _log.error("letter failed sender=%s: %r", envelope.sender, error)
            refusal = ProtocolError(f"letter could not be acted upon ({error!r}): report this")
            return self._coordinator.on_unreadable(envelope.sender, refusal, now)

    def _branch(self, topic: str) -> str:
        """Whose branch of the tree a topic is on, as far as it can be told."""
        try:
            return parse(self._config.namespace, topic).device
        except ProtocolError:
            return "nobody"

    def _ask_operators(self, now: float) -> list[Effect[HubFact]]:
        effects: list[Effect[HubFact]] = []
        stopped = self._store.stop_requested()
        for name in stopped:
            if (active := self._coordinator.run) is not None and active.plan.name == name:
                effects += self._coordinator.stop_run(name, now)
            else:
                effects.append(Record(_never_begun(name, "stopped", "stopped in the queue", now)))
        if self._coordinator.run is None:
            asked = (plan for plan in self._store.requested() if plan.name not in stopped)
            if (plan := next(asked, None)) is not None:
                effects += self._open_run(plan, now)
        return effects

    def _open_run(self, plan: RunPlan, now: float) -> list[Effect[HubFact]]:
        try:
            model = (
                self._registry.read(plan.teaching)
                if plan.teaching
                else initial_model(plan, self._registry)
            )
        except (ConfigError, StoreError) as error:
            # It was asked for by somebody who did not check; the other runs shall not suffer.
            _log.error("run cannot begin run=%s: %s", plan.name, error)
            return [Record(_never_begun(plan.name, "failed", str(error), now))]
        _log.info("run begins run=%s rounds=%d", plan.name, plan.rounds)
        self._plans[plan.name] = plan
        # The first model of a process takes seconds, since torch is loaded: they are not the run's.
        return self._coordinator.open_run(plan, model, self._clock())

    def _perform(self, effects: list[Effect[HubFact]], arrived: list[Arrived]) -> None:
        facts = [effect.fact for effect in effects if isinstance(effect, Record)]
        if facts:
            follow(self._mirrors, facts)
            self._store.record(facts, self._registry)
        for effect in effects:
            match effect:
                case Send(letter, device) if self._mailbox is not None:
                    self._mailbox.publish(*self._sealed(letter, device))
                case WakeAt(at):
                    self._wake_at = at
                case Train():
                    self._stand_ins.train(effect)
                case _:
                    pass
        for letter_in in arrived:
            if self._mailbox is not None:
                self._mailbox.acknowledge(letter_in)
        for fact in facts:
            self._after(fact)

    def _after(self, fact: HubFact) -> None:
        """Have new models measured, and the last one of a run that is over released."""
        match fact:
            case RoundClosed(run=run, round=number, content=content):
                plan = self._plans[run]
                self._appraiser.appraise(Closed(plan, number, content.digest, is_last=False))
            case RunEnded(run=run) if run in self._plans:
                if (last := last_model(self._plans.pop(run), self._store)) is not None:
                    self._appraiser.appraise(last)
            case _:
                pass

    def _task(self) -> Task | None:
        run = self._coordinator.run
        return Task(run.plan, run.content.size) if run is not None else None

    def _read_content(self, digest: str) -> bytes | None:
        try:
            return self._read_model(digest)
        except StoreError:
            return None

    def _sealed(self, letter: AnyLetter, device: str = "") -> tuple[Route, bytes]:
        return route(self._config.namespace, device, letter), seal("hub", self._epoch, letter)


def _never_begun(
    run: str, status: Literal["stopped", "failed"], reason: str, now: float
) -> RunEnded:
    return RunEnded(run=run, status=status, reason=reason, at=now)
