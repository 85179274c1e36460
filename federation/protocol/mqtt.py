"""The mailbox: letters over MQTT, through links that fail.

A `Mailbox` owns one thread and, one after the other, the connections to a broker. Each
connection is a new paho client under a new epoch, so nothing of the last one is silently sent
again: when the link is back, the state machines say what still matters. What waits for *us*
waits in the broker's session.

A letter is handed to paho only when the one before has left for the socket. So a ping never
waits behind more than one letter, and a slow link does not look dead to its own keepalive.
"""

import functools
import itertools
import logging
import math
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TypeAlias

from paho.mqtt.client import Client, DisconnectFlags, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from federation.errors import HeadwaterError
from federation.protocol.effects import Link
from federation.protocol.link import (
    CONNECT_S,
    PACKET_OVERHEAD_BYTES,
    STEADY_S,
    Arrived,
    Bell,
    Ending,
    MailboxConfig,
    Outbox,
    Watch,
    draw_backoff,
    parse_url,
    tune_socket,
    why_lost,
    why_not_subscribed,
    why_refused,
    why_unreachable,
)
from federation.protocol.messages import MAX_LETTER_BYTES
from federation.protocol.topics import Route

_Words: TypeAlias = tuple[Route, bytes] | None

_FIVE = MQTTProtocolVersion.MQTTv5

_serials = itertools.count(1)  # two connections may share an epoch; packet numbers begin anew

_log = logging.getLogger(__name__)


class Mailbox:
    """Letters in and out over one link to a broker, kept up in the background.

    `deliver` is called from the mailbox's thread, for every letter and for every change of the
    link, and must only enqueue. `Link(is_up=True)` comes before any letter of its connection.
    `Link(is_up=False)` comes once for each loss and, while the link stays away, once more for
    each other reason that keeps it away; never after `close`. `next_epoch` gives a number larger
    than all before, durably; `last_will` is what the broker shall say if that epoch ends without a
    goodbye.

    Raises:
        ConfigError: an address that is none, or a TLS file that is not there.
    """

    def __init__(
        self,
        config: MailboxConfig,
        *,
        deliver: Callable[[Arrived | Link], None],
        next_epoch: Callable[[], int],
        last_will: Callable[[int], tuple[Route, bytes]],
        rng: random.Random,
    ) -> None:
        config.check()
        self._config = config
        self._deliver = deliver
        self._next_epoch = next_epoch
        self._last_will = last_will
        self._rng = rng
        self._version = _FIVE
        self._epoch = 0
        self._is_epoch_spent = True
        self._bell = Bell()
        self._connection: _Connection | None = None
        self._closing = threading.Event()
        self._goodbye: tuple[Route, bytes] | None = None
        self._thread = threading.Thread(
            target=self._run, name=f"mailbox {config.client_id}", daemon=True
        )

    def open(self) -> None:
        """Begin to connect, in the background; an unreachable broker is no error."""
        self._thread.start()

    def publish(self, route: Route, payload: bytes) -> bool:
        """Hand a letter over for sending; from any thread.

        True promises an attempt on this connection and no more: only the receiver's own
        answer proves arrival. False means that the link is down, that the letter is larger
        than the broker takes, or that too much is waiting already; nothing is kept for later.
        """
        connection = self._connection
        if connection is None or not connection.outbox.put(route, payload):
            return False
        self._bell.ring()
        return True

    def acknowledge(self, arrived: Arrived) -> None:
        """Tell the broker that this letter is dealt with (with `manual_ack`); from any thread.

        Harmless once the connection it came on is gone: the broker delivers it again.
        """
        connection = self._connection
        if arrived.packet and connection is not None and connection.serial == arrived.connection:
            connection.acks.append(arrived.packet)
            self._bell.ring()

    def close(self, goodbye: tuple[Route, bytes] | None = None) -> None:
        """Send what waits and then the goodbye, and disconnect so that no will is published.

        Waits at most `close_s` for the broker to take it all. Where it does not, the
        connection is dropped instead, and the last will speaks.
        """
        self._goodbye = goodbye
        self._closing.set()
        self._bell.ring()
        if self._thread.is_alive():
            self._thread.join(self._config.close_s + CONNECT_S + 1.0)
        if not self._thread.is_alive():
            self._bell.close()

    def _run(self) -> None:
        attempt, said = 0, ""
        while not self._closing.is_set():
            ending, up_s = self._try_once()
            if self._closing.is_set():
                return
            if ending.wants_older_version:
                self._version = MQTTProtocolVersion.MQTTv311
                continue
            if up_s or ending.reason != said:
                said = ending.reason
                self._hand_over(Link(is_up=False, epoch=self._epoch, reason=said))
            attempt = 0 if up_s >= STEADY_S else attempt
            self._closing.wait(self._pause_s(ending, attempt))
            attempt += 1

    def _try_once(self) -> tuple[Ending, float]:
        """One connection from beginning to end, and for how many seconds it was up."""
        connection: _Connection | None = None
        try:
            if self._is_epoch_spent:
                self._epoch, self._is_epoch_spent = self._next_epoch(), False
            connection = _Connection(self._config, self._version, self._epoch, self._hand_over)
            connection.connect(*self._last_will(self._epoch))
            self._connection, self._is_epoch_spent = connection, True
            ending = connection.serve(self._bell, self._closing, lambda: self._goodbye)
        except HeadwaterError as error:
            ending = Ending(str(error))
        except OSError as error:
            ending = Ending(why_unreachable(self._config.url, error))
        except Exception as error:  # the outermost loop: the link outlives any surprise
            _log.exception("connection failed client=%s", self._config.client_id)
            ending = Ending(f"connection failed unexpectedly ({error}): see the log")
        self._connection = None
        if connection is None:
            return ending, 0.0
        connection.drop()
        return ending, connection.up_s()

    def _pause_s(self, ending: Ending, attempt: int) -> float:
        if ending.is_refusal:
            longest = self._config.backoff_s[1]
            return self._rng.uniform(longest, 1.5 * longest)
        return draw_backoff(attempt, self._config.backoff_s, self._rng)

    def _hand_over(self, event: Arrived | Link) -> None:
        try:
            self._deliver(event)
        except Exception:  # what the receiver does wrong must not cost the link
            _log.exception("receiver failed client=%s", self._config.client_id)


class _Connection:
    """One connection under one epoch. Only `outbox.put` and `acks` are for other threads."""

    def __init__(
        self,
        config: MailboxConfig,
        version: MQTTProtocolVersion,
        epoch: int,
        hand_over: Callable[[Arrived | Link], None],
    ) -> None:
        self.epoch = epoch
        self.serial = next(_serials)
        self.acks: deque[int] = deque()
        self.outbox = Outbox(config.outbox_bytes)
        self._config = config
        self._is_five = version is _FIVE
        self._hand_over = hand_over
        self._client = Client(
            CallbackAPIVersion.VERSION2,
            client_id=config.client_id,
            clean_session=None if self._is_five else config.session_expiry_s == 0,
            protocol=version,
            reconnect_on_failure=False,
            manual_ack=config.manual_ack,
        )
        self._unacked: dict[int, tuple[str, float]] = {}
        self._window = config.window
        self._max_payload = 0
        self._held: list[Arrived] = []
        self._up_since: float | None = None
        self._ending: Ending | None = None
        self._drop_at: float | None = None
        self._asked_at = time.monotonic()

    def connect(self, will: Route, last_words: bytes) -> None:
        """Reach the broker and send CONNECT.

        Raises:
            OSError: not reached; CONNECT was not sent.
        """
        config, client = self._config, self._client
        host, port, is_tls = parse_url(config.url)
        client.connect_timeout = CONNECT_S
        client.max_inflight_messages = 0  # the window is ours, in `_feed`
        if config.user:
            client.username_pw_set(config.user, config.password)
        if is_tls:
            client.tls_set(
                config.ca_file or None, config.cert_file or None, config.key_file or None
            )
        expiry = _expiry_after(will.expiry_s * self._is_five, PacketTypes.WILLMESSAGE)
        client.will_set(will.topic, last_words, will.qos, will.retain, expiry)
        client.on_socket_open = lambda _client, _userdata, sock: tune_socket(sock)
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        client.on_disconnect = self._on_disconnect
        client.connect(host, port, config.keepalive_s, **self._wishes())

    def _wishes(self) -> dict[str, Any]:
        if not self._is_five:
            return {}
        wishes = _properties(
            PacketTypes.CONNECT,
            SessionExpiryInterval=self._config.session_expiry_s,
            ReceiveMaximum=self._config.receive_maximum,
            MaximumPacketSize=MAX_LETTER_BYTES + PACKET_OVERHEAD_BYTES,
        )
        return {"clean_start": self._config.session_expiry_s == 0, "properties": wishes}

    def up_s(self) -> float:
        """For how many seconds the link has been up."""
        return 0.0 if self._up_since is None else time.monotonic() - self._up_since

    def drop(self) -> None:
        """Close the socket, whatever state it is in."""
        self.outbox.unlock(-1)
        sock = self._client.socket()
        if sock is not None:
            sock.close()

    def serve(self, bell: Bell, closing: threading.Event, goodbye: Callable[[], _Words]) -> Ending:
        """Drive the connection until it ends, and say why it did."""
        client, pause_s = self._client, min(5.0, self._config.keepalive_s / 4)
        with Watch(client.socket(), bell) as watch:
            while self._ending is None and client.socket() is not None:
                if closing.is_set():
                    pause_s = 0.05
                    self._take_leave(goodbye)
                self._feed()
                if client.socket() is None:
                    break
                is_readable, is_writable = watch.wait(client.want_write(), pause_s)
                if is_writable:
                    client.loop_write()
                if is_readable:
                    client.loop_read()
                client.loop_misc()
        return self._ending or Ending("connection lost")

    def _feed(self) -> None:
        """Hand paho what it can send at once; give up a broker that has stopped to answer."""
        _, asked_at = next(iter(self._unacked.values()), ("", math.inf))
        asked_at = self._asked_at if self._up_since is None else asked_at
        if time.monotonic() > asked_at + 2 * self._config.keepalive_s:
            self._end(Ending("broker is there but answers nothing: see that it is not overloaded"))
        while self.acks:
            self._client.ack(self.acks.popleft(), 1)
        while len(self._unacked) < self._window and not self._client.want_write():
            letter = self.outbox.take()
            if letter is None:
                return
            route, payload = letter
            expiry = _expiry_after(route.expiry_s * self._is_five, PacketTypes.PUBLISH)
            sent = self._client.publish(route.topic, payload, route.qos, route.retain, expiry)
            if route.qos:
                self._unacked[sent.mid] = (route.topic, time.monotonic())

    def _take_leave(self, goodbye: Callable[[], _Words]) -> None:
        if self._drop_at is None:
            self._drop_at = time.monotonic() + self._config.close_s
            letter = goodbye()
            if letter is not None:
                self.outbox.put(*letter)
            self.outbox.unlock(-1)
        is_busy = self.outbox or self._unacked or self.acks or self._client.want_write()
        if self._client.is_connected() and not is_busy:
            self._client.disconnect()
        elif not self._client.is_connected() or time.monotonic() > self._drop_at:
            self._end(Ending("closed before the broker took everything"))

    def _end(self, ending: Ending) -> None:
        self._ending = self._ending or ending  # paho may report one loss twice

    def _on_connect(
        self, client: Client, _data: object, _flags: object, reason: ReasonCode, granted: Any
    ) -> None:
        code = reason.getName()
        if code == "Unsupported protocol version" and self._is_five:
            self._end(Ending("broker does not speak MQTT 5", wants_older_version=True))
        elif reason.is_failure:
            self._end(why_refused(code, self._config))
        else:
            packet_bytes = getattr(granted, "MaximumPacketSize", 0)
            self._max_payload = packet_bytes and max(1, packet_bytes - PACKET_OVERHEAD_BYTES)
            self._window = min(self._window, getattr(granted, "ReceiveMaximum", self._window))
            if self._config.filters:
                client.subscribe([(name, 1) for name in self._config.filters])
            else:
                self._come_up()

    def _on_subscribe(
        self, _client: object, _data: object, _packet: int, codes: list[ReasonCode], _more: object
    ) -> None:
        answers = zip(self._config.filters, codes, strict=False)
        refused = [name for name, code in answers if code.is_failure]
        if refused:
            self._end(why_not_subscribed(refused, self._config))
        else:
            self._come_up()

    def _come_up(self) -> None:
        self._up_since = time.monotonic()
        self.outbox.unlock(min(MAX_LETTER_BYTES, self._max_payload or MAX_LETTER_BYTES))
        self._hand_over(Link(is_up=True, epoch=self.epoch, max_payload=self._max_payload))
        for arrived in self._held:
            self._hand_over(arrived)
        self._held.clear()

    def _on_message(self, _client: object, _data: object, message: MQTTMessage) -> None:
        packet = message.mid if message.qos and self._config.manual_ack else 0
        try:
            arrived = Arrived(message.topic, bytes(message.payload), packet, self.serial)
        except UnicodeDecodeError:
            _log.warning("letter dropped: its topic is not UTF-8")
            self.acks.extend([packet] if packet else [])
            return
        if self._up_since is None:
            self._held.append(arrived)
        else:
            self._hand_over(arrived)

    def _on_publish(
        self, _client: object, _data: object, packet: int, reason: ReasonCode, _extra: Properties
    ) -> None:
        topic, _ = self._unacked.pop(packet, ("", 0.0))
        if reason.is_failure:
            _log.warning("letter refused by the broker topic=%s reason=%s", topic, reason)

    def _on_disconnect(
        self, _client: object, _d: object, flags: DisconnectFlags, reason: ReasonCode, _more: object
    ) -> None:
        is_from_broker = flags.is_disconnect_packet_from_server
        self._end(why_lost(reason.getName(), self._config, is_from_broker=is_from_broker))


def _properties(packet: int, **values: int) -> Properties:
    properties = Properties(packet)  # type: ignore[no-untyped-call]
    for name, value in values.items():
        setattr(properties, name, value)
    return properties


@functools.cache
def _expiry_after(seconds: int, packet: int) -> Properties | None:
    return _properties(packet, MessageExpiryInterval=seconds) if seconds else None
