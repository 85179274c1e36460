"""One agent's connection to a broker, driven by an event loop that it shares with all others.

The agent's own `Mailbox` gives each connection a thread; a thousand of them are too many. Here
paho does no waiting of its own: the loop says when a socket can be read or written. What a
connection promises is the same: up before any letter, down once, one letter at a time.
"""

import asyncio
import functools
import logging
import resource
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from paho.mqtt.client import Client, DisconnectFlags, MQTTMessage  # noqa: TID251 - as its peer, mqtt
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion  # noqa: TID251
from paho.mqtt.packettypes import PacketTypes  # noqa: TID251
from paho.mqtt.properties import Properties  # noqa: TID251
from paho.mqtt.reasoncodes import ReasonCode  # noqa: TID251

from federation.errors import ConfigError, HeadwaterError
from federation.protocol.effects import Link
from federation.protocol.link import (
    CONNECT_S,
    PACKET_OVERHEAD_BYTES,
    Arrived,
    Ending,
    MailboxConfig,
    parse_url,
    tune_socket,
    why_lost,
    why_not_subscribed,
    why_refused,
    why_unreachable,
)
from federation.protocol.messages import MAX_LETTER_BYTES
from federation.protocol.topics import Route

_log = logging.getLogger(__name__)


class Connection:
    """One connection under one epoch: `run` it to its end.

    `deliver` is called on the loop: with `Link(is_up=True)` once it is up, with every letter
    after that, and with nothing more once it has ended.
    """

    def __init__(
        self,
        config: MailboxConfig,
        *,
        epoch: int,
        is_five: bool,
        deliver: Callable[[Arrived | Link], None],
    ) -> None:
        self._config = config
        self._epoch = epoch
        self._is_five = is_five
        self._deliver = deliver
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[Ending] = self._loop.create_future()
        self._descriptor = -1
        self._watches_writes = self._is_reading = False
        self._tick: asyncio.TimerHandle | None = None
        self._letters: deque[tuple[Route, bytes]] = deque()
        self._unacked: dict[int, float] = {}
        self._held: list[Arrived] | None = []
        self._max_payload = 0
        self._window = config.window
        self.came_up_at: float | None = None
        self._client = self._make_client()

    @property
    def is_up(self) -> bool:
        """Whether letters can be sent."""
        return self.came_up_at is not None and not self._ended.done()

    async def run(
        self, will: Route, last_words: bytes, *, gate: asyncio.Semaphore | None = None
    ) -> Ending:
        """Connect, one of so many at once, and stay until the connection ends; why it did."""
        try:
            expiry = _expiry_after(will.expiry_s * self._is_five, PacketTypes.WILLMESSAGE)
            self._client.will_set(will.topic, last_words, will.qos, will.retain, expiry)
            host, port, _ = parse_url(self._config.url)
            # paho resolves the name and shakes hands in one blocking call.
            connect = functools.partial(
                self._client.connect, host, port, self._config.keepalive_s, **self._wishes()
            )
            async with gate or asyncio.Semaphore():
                await self._loop.run_in_executor(None, connect)
                self._attach()
            return await self._ended
        except OSError as error:
            return Ending(why_unreachable(self._config.url, error))
        finally:
            self.abort()

    def publish(self, route: Route, payload: bytes) -> bool:
        """Hand a letter over for sending, as `Mailbox.publish`; False: the link is down."""
        if not self.is_up or len(payload) > (self._max_payload or MAX_LETTER_BYTES):
            return False
        self._letters.append((route, payload))
        if not self._is_reading:  # else `_on_readable` sends it, outside of paho's callback
            self._feed()
        return True

    def abort(self, reason: str = "link was cut") -> None:
        """Drop the connection without a goodbye, so that the broker publishes the last will."""
        self._end(Ending(reason))
        self._detach()
        sock = self._client.socket()
        if sock is not None:
            with suppress(OSError):
                sock.close()

    async def close(self, route: Route, goodbye: bytes) -> None:
        """Say goodbye and disconnect in order; where the broker does not take it, drop."""
        give_up_at = self._loop.time() + self._config.close_s
        self.publish(route, goodbye)
        while self.is_up and self._loop.time() < give_up_at:
            if not (self._letters or self._unacked or self._client.want_write()):
                self._end(Ending("closed"))
                self._client.disconnect()
                self._client.loop_write()
            await asyncio.sleep(0.02)
        self.abort("closed before the broker took everything")

    # paho, and the loop that drives it -----------------------------------------------------

    def _make_client(self) -> Client:
        config, is_five = self._config, self._is_five
        client = Client(
            CallbackAPIVersion.VERSION2,
            client_id=config.client_id,
            clean_session=None if is_five else config.session_expiry_s == 0,
            protocol=MQTTProtocolVersion.MQTTv5 if is_five else MQTTProtocolVersion.MQTTv311,
            reconnect_on_failure=False,
        )
        client.connect_timeout = CONNECT_S
        client.max_inflight_messages = 0  # the window is ours, in `_feed`
        if config.user:
            client.username_pw_set(config.user, config.password)
        if parse_url(config.url)[2]:
            client.tls_set(config.ca_file or None)
        client.on_socket_open = lambda _client, _data, sock: tune_socket(sock)
        client.on_socket_close = lambda _client, _data, _sock: self._detach()
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        client.on_disconnect = self._on_disconnect
        return client

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

    def _attach(self) -> None:
        sock = self._client.socket()
        if sock is None or self._ended.done():
            self._end(Ending("connection lost"))
            return
        self._descriptor = sock.fileno()
        self._loop.add_reader(self._descriptor, self._on_readable)
        self._look_after()
        self._flush()

    def _detach(self) -> None:
        """Have the loop forget the socket: before it is closed, for its number is used again."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            self._loop.remove_reader(descriptor)
            self._loop.remove_writer(descriptor)
        if self._tick is not None:
            self._tick.cancel()

    def _on_readable(self) -> None:
        self._is_reading = True
        self._client.loop_read()
        # TLS may have read ahead what the socket then no longer announces.
        while getattr(self._client.socket(), "pending", int)():
            self._client.loop_read()
        self._is_reading = False
        self._feed()

    def _on_writable(self) -> None:
        self._client.loop_write()
        self._feed()

    def _feed(self) -> None:
        """Hand paho what can be sent at once, one letter after the other."""
        client = self._client
        while self._letters and len(self._unacked) < self._window and not client.want_write():
            route, payload = self._letters.popleft()
            expiry = _expiry_after(route.expiry_s * self._is_five, PacketTypes.PUBLISH)
            sent = client.publish(route.topic, payload, route.qos, route.retain, expiry)
            if route.qos:
                self._unacked[sent.mid] = self._loop.time()
        self._flush()

    def _flush(self) -> None:
        """Listen for room to write while there is something to write, and no longer."""
        if self._descriptor < 0:
            return
        wants = self._client.want_write()
        if wants and not self._watches_writes:
            self._loop.add_writer(self._descriptor, self._on_writable)
        elif self._watches_writes and not wants:
            self._loop.remove_writer(self._descriptor)
        self._watches_writes = wants

    def _look_after(self) -> None:
        """Every quarter of the keep-alive: pings, and a broker that has stopped to answer."""
        keepalive_s, now = self._config.keepalive_s, self._loop.time()
        self._tick = self._loop.call_later(keepalive_s / 4, self._look_after)
        self._client.loop_misc()
        if now > next(iter(self._unacked.values()), now) + 2 * keepalive_s:
            self._end(Ending("broker is there but answers nothing: see that it is not overloaded"))
        self._flush()

    def _end(self, ending: Ending) -> None:
        if not self._ended.done():
            self._ended.set_result(ending)

    def _hand_over(self, event: Arrived | Link) -> None:
        try:
            self._deliver(event)
        except HeadwaterError:  # what one letter does wrong must not cost the link
            _log.exception("receiver failed client=%s", self._config.client_id)

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
        self.came_up_at = self._loop.time()
        held, self._held = self._held or [], None
        self._hand_over(Link(is_up=True, epoch=self._epoch, max_payload=self._max_payload))
        for arrived in held:
            self._hand_over(arrived)

    def _on_message(self, _client: object, _data: object, message: MQTTMessage) -> None:
        if self._ended.done():
            return
        try:
            arrived = Arrived(message.topic, bytes(message.payload))
        except UnicodeDecodeError:
            _log.warning("letter dropped: its topic is not UTF-8")
            return
        if self._held is not None:
            self._held.append(arrived)
        else:
            self._hand_over(arrived)

    def _on_publish(
        self, _client: object, _data: object, packet: int, reason: ReasonCode, _extra: object
    ) -> None:
        self._unacked.pop(packet, None)
        if reason.is_failure:
            _log.warning("letter refused by the broker reason=%s", reason)

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


def raise_descriptor_limit(wanted: int) -> None:
    """Let this process have so many files and sockets open.

    Raises:
        ConfigError: the system allows fewer.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY not in (soft, hard) and hard < wanted:
        raise ConfigError(
            f"this process may open {hard} files and sockets; {wanted} are needed: "
            "ask for fewer agents, or raise the limit (ulimit -Hn)"
        )
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
