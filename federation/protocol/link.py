"""A link to a broker before any protocol: where, as whom, how patiently, how it fails in words.

`mqtt` drives it; configuration and state machines may use these records without loading paho.
"""

import contextlib
import random
import selectors
import socket
import ssl
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from federation.errors import ConfigError
from federation.protocol.topics import Route

_UNSENT_BYTES = 64 * 1024
"""How much the kernel may hold unsent, so that a ping does not queue behind megabytes."""


PACKET_OVERHEAD_BYTES = 1024
"""What topic, properties and header add to a letter, rounded up generously."""

STEADY_S = 1.0
"""A link that was up for this long counts as good: the back-off begins anew."""

CONNECT_S = 5.0
"""How long opening a TCP or TLS connection may take."""


@dataclass(frozen=True, slots=True)
class Arrived:
    """A letter from the broker; `packet` and `connection` are what `acknowledge` needs of it."""

    topic: str
    payload: bytes
    packet: int = 0
    connection: int = 0


@dataclass(frozen=True, kw_only=True)
class MailboxConfig:
    """Which broker, as whom, and how patiently.

    `url` is `mqtt://host:port` or `mqtts://host:port`. `client_id` must be stable over restarts:
    the broker keeps the session under it, for `session_expiry_s` seconds (MQTT 3.1.1: as long
    as the broker pleases; 0 asks for no session). With `manual_ack`, the broker delivers a
    letter again after a reconnect until `acknowledge`. `receive_maximum` bounds the letters
    under way to us, `window` those under way to the broker, and `outbox_bytes` those waiting
    here for their turn. `backoff_s` is the first and the longest back-off.
    """

    url: str
    client_id: str
    filters: tuple[str, ...] = ()
    keepalive_s: int = 30
    user: str = ""
    password: str = ""
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    manual_ack: bool = False
    session_expiry_s: int = 24 * 3600
    receive_maximum: int = 100
    window: int = 64
    outbox_bytes: int = 64 * 1024 * 1024
    backoff_s: tuple[float, float] = (0.5, 60.0)
    close_s: float = 3.0

    def check(self) -> None:
        """Refuse what could never connect.

        Raises:
            ConfigError: an address that is none, or a TLS file that is not there.
        """
        parse_url(self.url)
        for field in ("ca_file", "cert_file", "key_file"):
            path = getattr(self, field)
            if path and not Path(path).is_file():
                raise ConfigError(f"{field} {path!r} is not there; name a readable PEM file")


def parse_url(url: str) -> tuple[str, int, bool]:
    """Host, port and whether TLS is spoken.

    Raises:
        ConfigError: not `mqtt://host:port` or `mqtts://host:port`.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        parts, host, port = urlsplit(""), None, None
    if parts.scheme not in {"mqtt", "mqtts"} or not host or parts.path not in {"", "/"}:
        raise ConfigError(
            f"broker address {url!r} is not understood; "
            "write mqtt://host:port, or mqtts://host:port for TLS"
        )
    is_tls = parts.scheme == "mqtts"
    return host, port or (8883 if is_tls else 1883), is_tls


def draw_backoff(attempt: int, bounds_s: tuple[float, float], rng: random.Random) -> float:
    """Seconds to wait before reconnecting: full jitter over a bound that doubles.

    `attempt` counts the failures since the link was last good, from 0.
    """
    first, longest = bounds_s
    return rng.uniform(0.0, min(longest, first * 2.0 ** min(attempt, 32)))


@dataclass(frozen=True, slots=True)
class Ending:
    """Why a connection ended, and how that bears on the next one."""

    reason: str
    is_refusal: bool = False
    wants_older_version: bool = False


class Bell:
    """Wakes the mailbox's thread out of its wait for the network."""

    def __init__(self) -> None:
        self.reader, self._writer = socket.socketpair()
        self.reader.setblocking(False)
        self._writer.setblocking(False)
        self._is_rung = False

    def ring(self) -> None:
        """Wake it; from any thread."""
        if not self._is_rung:
            self._is_rung = True
            with contextlib.suppress(OSError):
                self._writer.send(b"!")

    def silence(self) -> None:
        """Be ready to ring again; what was queued before the ring is looked at after this."""
        with contextlib.suppress(BlockingIOError):
            self.reader.recv(64)
        self._is_rung = False

    def close(self) -> None:
        """Give the sockets back."""
        self.reader.close()
        self._writer.close()


class Watch:
    """Waits for a socket, or for the bell; not with select(), which ends at 1,024 descriptors."""

    def __init__(self, sock: Any, bell: Bell) -> None:
        self._sock = sock
        self._bell = bell
        self._selector = selectors.DefaultSelector()

    def __enter__(self) -> Self:
        self._selector.register(self._bell.reader, selectors.EVENT_READ)
        if self._sock is not None:
            self._selector.register(self._sock, selectors.EVENT_READ)
        return self

    def __exit__(self, *_: object) -> None:
        self._selector.close()

    def wait(self, wants_write: bool, pause_s: float) -> tuple[bool, bool]:
        """Whether the socket can be read and be written, after at most `pause_s`."""
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if wants_write else 0)
        if self._selector.get_key(self._sock).events != wanted:
            self._selector.modify(self._sock, wanted)
        is_readable = hasattr(self._sock, "pending") and self._sock.pending() > 0  # TLS reads ahead
        is_writable = False
        for key, events in self._selector.select(0.0 if is_readable else pause_s):
            if key.fileobj is self._sock:
                is_readable |= bool(events & selectors.EVENT_READ)
                is_writable = bool(events & selectors.EVENT_WRITE)
            else:
                self._bell.silence()
        return is_readable, is_writable


def tune_socket(sock: Any) -> None:
    """Send small letters at once, and leave little unsent in the kernel."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_NOTSENT_LOWAT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)


class Outbox:
    """Letters waiting for their turn on one connection: bounded, and shut until it is up."""

    def __init__(self, limit_bytes: int) -> None:
        self._lock = threading.Lock()
        self._letters: deque[tuple[Route, bytes]] = deque()
        self._size_bytes = 0
        self._limit_bytes = limit_bytes
        self._letter_bytes = -1

    def __bool__(self) -> bool:
        return bool(self._letters)

    def unlock(self, letter_bytes: int) -> None:
        """Take letters of up to this size from now on; -1: none."""
        with self._lock:
            self._letter_bytes = letter_bytes

    def put(self, route: Route, payload: bytes) -> bool:
        """Queue a letter; False: shut, the letter is too large, or too much is waiting."""
        size = len(payload)
        with self._lock:
            if size > self._letter_bytes or self._size_bytes + size > self._limit_bytes:
                return False
            self._letters.append((route, payload))
            self._size_bytes += size
        return True

    def take(self) -> tuple[Route, bytes] | None:
        """The letter that waited longest."""
        with self._lock:
            if not self._letters:
                return None
            route, payload = self._letters.popleft()
            self._size_bytes -= len(payload)
        return route, payload


def why_unreachable(url: str, error: OSError) -> str:
    """A connection that could not even be opened, in words."""
    if isinstance(error, ssl.SSLError):
        return f"no TLS with the broker at {url} ({error.reason}); check ca_file and host name"
    what = error.strerror or str(error) or type(error).__name__
    return f"no broker answers at {url} ({what}); start it, or correct the address"


_REMEDIES = {
    "Bad user name or password": "it expects another user or password: correct them here or there",
    "Not authorized": "it expects a user it knows: correct user and password, or its permissions",
    "Client identifier not valid": "it expects another client id",
    "Unsupported protocol version": "it must speak MQTT 5 or 3.1.1",
}
_PASSING = {"Server unavailable", "Server busy", "Connection rate exceeded", "Use another server"}


def why_refused(code: str, config: MailboxConfig) -> Ending:
    """A CONNECT that the broker answered with this reason code (its name in MQTT 5)."""
    remedy = _REMEDIES.get(code, "see the broker's log")
    return Ending(
        f"broker at {config.url} refuses {config.client_id!r} ({code.lower()}); {remedy}",
        is_refusal=code not in _PASSING,
    )


def why_not_subscribed(filters: list[str], config: MailboxConfig) -> Ending:
    """A subscription that the broker did not grant."""
    return Ending(
        f"broker refuses the subscription to {', '.join(filters)}; "
        f"allow {config.user or config.client_id!r} to read it",
        is_refusal=True,
    )


def why_lost(code: str, config: MailboxConfig, *, is_from_broker: bool) -> Ending:
    """A connection that ended with this reason code."""
    if code == "Session taken over":
        return Ending(
            f"another client connected as {config.client_id!r}; "
            "an id may be used once: stop the other, or give it an id of its own",
            is_refusal=True,
        )
    if is_from_broker:
        return Ending(f"broker ended the connection ({code.lower()})")
    if code == "Keep alive timeout":
        return Ending(f"broker was silent for over {config.keepalive_s} s")
    return Ending("connection lost")
