"""An MQTT broker in memory, on a virtual clock: what the mailboxes see of a real one.

It keeps sessions over lost links (QoS 1 waits there, in order), retained letters and last
wills; it delivers again what was not acknowledged, loses QoS 0, and forgets all of it when
it is told to. It works on routes and payloads, so codec and topic grammar are the real ones.
"""

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from federation.protocol.topics import Route
from simulations.clock import Clock
from simulations.sealed import Sealed
from simulations.topic_tree import Filters, Payload, Retained

Deliver: TypeAlias = Callable[[str, Payload], bool]
"""Takes a letter (topic, payload); False where the receiver died over it."""

Will: TypeAlias = tuple[Route, Payload]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkQuality:
    """How good a client's link is, the same in both directions.

    A letter is on its way for a time drawn between the two of `delay_s`, and never overtakes
    another one. `loss` is the chance of a QoS 0 letter to be lost, `duplicates` that of a QoS 1
    letter to come twice, as after an acknowledgement that was lost. `up_bps` and `down_bps` are
    in bits a second, seen from the client; 0 for a link that is never busy.
    """

    delay_s: tuple[float, float] = (0.0, 0.0)
    loss: float = 0.0
    duplicates: float = 0.0
    up_bps: float = 0.0
    down_bps: float = 0.0


PERFECT = LinkQuality()
"""A link that delivers everything once and at once."""


@dataclass(slots=True)
class _Letter:
    topic: str
    payload: Payload
    qos: int
    expires_at: float
    acknowledged_at: float = float("inf")


class _Lane:
    """One direction of a link: letters leave one after the other and arrive in order."""

    __slots__ = ("_free_at", "_last_at", "_quality", "_rate_bps", "_rng")

    def __init__(self, quality: LinkQuality, rate_bps: float, rng: random.Random) -> None:
        self._quality, self._rate_bps = quality, rate_bps
        self._rng = rng
        self._free_at = self._last_at = 0.0

    def arrival(self, size_bytes: int, now: float) -> float:
        """When a letter that is sent now will be at the other end."""
        quality = self._quality
        low, high = quality.delay_s
        delay_s = low if low == high else self._rng.uniform(low, high)
        if self._rate_bps > 0:
            self._free_at = max(self._free_at, now) + 8 * size_bytes / self._rate_bps
            now = self._free_at
        self._last_at = max(self._last_at, now + delay_s)
        return self._last_at

    def is_lost(self) -> bool:
        return self._quality.loss > 0 and self._rng.random() < self._quality.loss

    def is_doubled(self) -> bool:
        return self._quality.duplicates > 0 and self._rng.random() < self._quality.duplicates


class Connection:
    """One client's connection, from `Bus.connect` until it is closed, lost or replaced."""

    __slots__ = (
        "_bus",
        "_deliver",
        "_down",
        "_is_cut",
        "_is_perfect",
        "_on_lost",
        "_under_way",
        "_up",
        "is_open",
        "session",
        "will",
    )

    def __init__(
        self, bus: "Bus", session: "_Session", will: Callable[[], Will] | None,
        quality: LinkQuality, deliver: Deliver, on_lost: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._bus, self.session, self.will = bus, session, will
        self._up = _Lane(quality, quality.up_bps, bus.rng)
        self._down = _Lane(quality, quality.down_bps, bus.rng)
        self._deliver, self._on_lost = deliver, on_lost
        self.is_open = True
        self._is_cut = False
        self._is_perfect = quality == PERFECT
        self._under_way = 0

    @property
    def is_quiet(self) -> bool:
        """Whether it is open, and nothing is on its way down to the client."""
        return self.is_open and not self._is_cut and not self._under_way

    def publish(self, route: Route, payload: Payload) -> bool:
        """Send a letter; False where the connection is known to be gone. True promises nothing."""
        if not self.is_open:
            return False
        if self._is_cut:
            return True
        size = len(payload) + len(route.topic)
        self.session.sent_bytes += size
        for _ in range(2 if route.qos and self._up.is_doubled() else 1):
            at = self._up.arrival(size, self._bus.clock.now)
            if route.qos or not self._up.is_lost():
                self._bus.clock.call_at(at, self._reach_broker, route, payload)
        return True

    def lose(self, *, detected_after_s: float, reason: str = "") -> None:
        """The link dies: what is on its way is lost; the broker notices after a while.

        The client is told at once where there is a reason, and else goes on talking to nobody.
        """
        if not self._is_cut:
            self._is_cut = True
            self._bus.detach(self, detected_after_s)
        if reason and self.is_open:
            self.is_open = False
            self._on_lost(reason)

    def die(self) -> None:
        """The process dies: what it has sent arrives, then the broker sees the socket closed."""
        if self.is_open and not self._is_cut:
            self._bus.detach(self, self._up.arrival(0, self._bus.clock.now) - self._bus.clock.now)
        self.is_open = False

    def abort(self) -> None:
        """What is still on its way will not arrive."""
        self._is_cut = True

    def close(self, goodbye: Will | None = None) -> None:
        """Say goodbye and disconnect, so that the last will stays unsaid."""
        if goodbye is not None:
            self.publish(*goodbye)
        self.will = None
        self.die()

    def transmit(self, letter: _Letter, *, at_once: bool = False) -> None:
        """Send a letter down to the client; a perfect link may deliver it at once."""
        clock = self._bus.clock
        if at_once and self._is_perfect and not self._under_way:
            self._reach_client(letter, 0.0)
            return
        size = len(letter.payload) + len(letter.topic)
        for _ in range(2 if letter.qos and self._down.is_doubled() else 1):
            at = self._down.arrival(size, clock.now)
            if letter.qos or not self._down.is_lost():
                self._under_way += 1
                clock.call_at(at, self._arrive, letter, at - clock.now)

    def _reach_broker(self, route: Route, payload: Payload) -> None:
        if not self._is_cut and self._bus.is_up:
            self._bus.route(route, payload)

    def _arrive(self, letter: _Letter, delay_s: float) -> None:
        self._under_way -= 1
        self._reach_client(letter, delay_s)

    def _reach_client(self, letter: _Letter, delay_s: float) -> None:
        if not self.is_open or self._is_cut:
            return
        session = self.session
        session.received_bytes += len(letter.payload) + len(letter.topic)
        if self._deliver(letter.topic, letter.payload):
            # Its acknowledgement takes as long to come back.
            letter.acknowledged_at = self._bus.clock.now + delay_s
            session.forget_acknowledged(self._bus.clock.now)


class _Session:
    """What the broker keeps of a client while its link is away."""

    __slots__ = (
        "connection", "doomed", "filters", "reads", "received_bytes", "sent_bytes", "under_way",
        "waiting",
    )  # fmt: skip

    def __init__(self) -> None:
        self.connection: Connection | None = None
        self.doomed: Connection | None = None
        self.filters: dict[str, None] = {}
        self.reads = True
        self.waiting: deque[_Letter] = deque()
        self.under_way: deque[_Letter] = deque()
        self.sent_bytes = self.received_bytes = 0

    def offer(self, letter: _Letter, *, at_once: bool = False) -> None:
        if self.connection is not None:
            if letter.qos:
                self.under_way.append(letter)
            self.connection.transmit(letter, at_once=at_once)
        elif letter.qos:
            self.waiting.append(letter)

    def forget_acknowledged(self, now: float) -> None:
        while self.under_way and self.under_way[0].acknowledged_at <= now:
            self.under_way.popleft()

    def hold(self, now: float, rng: random.Random) -> None:
        """The link is gone: what was not acknowledged waits, before all that comes later."""
        kept = [letter for letter in self.under_way if not _was_acknowledged(letter, now, rng)]
        self.under_way.clear()
        self.waiting.extendleft(reversed(kept))
        self.connection = None


def _was_acknowledged(letter: _Letter, now: float, rng: random.Random) -> bool:
    if letter.acknowledged_at <= now:
        return True
    # Delivered, and the link died before the broker heard so: it may or may not have.
    return letter.acknowledged_at < float("inf") and rng.random() < 0.5


class Bus:
    """The broker. `rng` decides delays, losses and duplicates, and nothing else.

    `awaken` connects a client that has no session, when a letter comes for it alone.
    """

    def __init__(self, clock: Clock, rng: random.Random) -> None:
        self.clock = clock
        self.rng = rng
        self.is_up = True
        self.awaken: Callable[[str], None] | None = None
        self._sessions: dict[str, _Session] = {}
        self._retained = Retained()
        self._filters = Filters[_Session]()

    def connect(
        self,
        client: str,
        filters: Sequence[str],
        *,
        deliver: Deliver,
        on_lost: Callable[[str], None],
        will: Callable[[], Will] | None = None,
        quality: LinkQuality = PERFECT,
        greets: bool = True,
    ) -> Connection | None:
        """Take over or begin the session of this client; None while the broker is down.

        What waited in the session is delivered first, then what is retained, unless the client
        has heard that already.
        """
        if not self.is_up:
            return None
        session = self._sessions.setdefault(client, _Session())
        if session.connection is not None:
            session.connection.lose(detected_after_s=0.0, reason="session taken over")
        if session.doomed is not None:
            session.doomed.abort()
            self._say_will(session, session.doomed)
        connection = Connection(self, session, will, quality, deliver, on_lost)
        session.connection, session.reads = connection, True
        waiting, session.waiting = session.waiting, deque()
        for letter in waiting:
            if self.clock.now < letter.expires_at:
                session.offer(letter)
        for name in filters:
            self._filters.add(name, session)
            session.filters[name] = None
            for route, payload in self._retained.matching(name) if greets else ():
                session.offer(_Letter(route.topic, payload, route.qos, float("inf")))
        return connection

    def route(self, route: Route, payload: Payload) -> None:
        """A letter has reached the broker: keep it if it is retained, and pass it on."""
        if route.retain:
            self._retained.put(route, payload)
        expires_at = self.clock.now + route.expiry_s if route.expiry_s else float("inf")
        letter = _Letter(route.topic, payload, route.qos, expires_at)
        if isinstance(payload, Sealed) and payload.to:
            self._hand_over(payload.to, letter)
            return
        for session in self._filters.matching(route.topic):
            session.offer(_Letter(route.topic, payload, route.qos, expires_at), at_once=True)

    def _hand_over(self, client: str, letter: _Letter) -> None:
        """What names its reader needs no look at the filters."""
        session = self._sessions.get(client)
        if session is None and self.awaken is not None:
            self.awaken(client)
            session = self._sessions.get(client)
        if session is not None and session.reads:
            session.offer(letter, at_once=True)

    def leave_quietly(self, client: str) -> tuple[int, int]:
        """A client that is idle needs no session until it is spoken to; its traffic so far.

        For the hub it is still there: no will is said, and nothing waits for it.
        """
        session = self._sessions.pop(client)
        for name in session.filters:
            self._filters.remove(name, session)
        if session.connection is not None:
            session.connection.is_open = False
            session.connection = None
        return session.sent_bytes, session.received_bytes

    def detach(self, connection: Connection, detected_after_s: float) -> None:
        """A connection is gone; its will is said once the broker notices."""
        session = connection.session
        if session.connection is not connection:
            return
        session.hold(self.clock.now, self.rng)
        session.doomed = connection
        at = self.clock.now + detected_after_s
        self.clock.call_at(at, self._say_will, session, connection)

    def stop(self, *, forgets: bool) -> None:
        """The broker dies; no will is said. It `forgets` where it keeps its state in memory."""
        self.is_up = False
        for session in self._sessions.values():
            if session.connection is not None:
                session.connection.lose(detected_after_s=0.0, reason="broker is gone")
            if session.doomed is not None:
                session.doomed.abort()
            session.doomed = None
            if forgets:
                session.waiting.clear()
                session.reads = False
        if forgets:
            self._retained = Retained()
            self._filters = Filters[_Session]()

    def start(self) -> None:
        """The broker is back; clients may connect."""
        self.is_up = True

    def traffic(self, client: str) -> tuple[int, int]:
        """Bytes of topics and payloads this client has sent, and has received."""
        session = self._sessions.get(client)
        return (session.sent_bytes, session.received_bytes) if session else (0, 0)

    def _say_will(self, session: _Session, connection: Connection) -> None:
        if session.doomed is not connection:
            return
        session.doomed = None
        if connection.will is not None:
            self.route(*connection.will())
