"""Content-addressed chunk transfer: what has arrived, what is missing, what to send now.

Plain state without clock, socket or file. A device pulls content with `Download` and pushes
it with `upload.Upload`; whoever receives keeps an `Incoming`. After a restart of either side, or of
the link, the receiver says by bitmap what it has recorded and only the rest travels.
"""

import re
import zlib
from collections.abc import Iterator, Mapping
from hashlib import sha256
from itertools import islice
from types import MappingProxyType

from federation.errors import TransferError
from federation.protocol.bitmap import full, ones, to_bytes
from federation.protocol.messages import Content

DEFAULT_CHUNK_BYTES = 64 * 1024
SMALLEST_CHUNK_BYTES = 16 * 1024
LARGEST_CHUNK_BYTES = 256 * 1024
ENVELOPE_BYTES = 4 * 1024
"""Left free in the broker's largest letter for the envelope around a chunk."""

MAX_CHUNKS = 64 * 1024
"""No content is cut finer: a manifest of a few bytes must not claim memory for its bitmap."""

LONGEST_SILENCE_S = 60.0
"""Back-off stops growing here, so a hub that returns is noticed within a minute."""

_DIGEST = re.compile(r"[0-9a-f]{64}")
_NOTHING: Mapping[int, bytes] = MappingProxyType({})


def content_of(data: bytes, chunk_bytes: int) -> Content:
    """The manifest of these bytes."""
    content = Content(digest=sha256(data).hexdigest(), size=len(data), chunk_bytes=chunk_bytes)
    return check_content(content)


def content_named(name: str, data: bytes, chunk_bytes: int) -> Content:
    """The manifest of bytes that are named, not hashed: good where nothing can damage them."""
    digest = sha256(name.encode()).hexdigest()
    return check_content(Content(digest=digest, size=len(data), chunk_bytes=chunk_bytes))


def check_content(content: Content) -> Content:
    """The manifest itself, if it can be transferred and may name a file or a topic.

    Raises:
        TransferError: a digest that is not SHA-256 in hexadecimal, a size or chunk size out of
            range, or more than `MAX_CHUNKS` chunks.
    """
    if _DIGEST.fullmatch(content.digest) is None:
        raise TransferError(
            f"content is named {content.digest[:80]!r}; expected 64 lower-case hexadecimal digits"
        )
    if content.size < 0 or not 1 <= content.chunk_bytes <= LARGEST_CHUNK_BYTES:
        raise TransferError(
            f"content of {content.size} bytes in chunks of {content.chunk_bytes}; expected "
            f"a size of 0 or more and chunks of 1 to {LARGEST_CHUNK_BYTES} bytes"
        )
    if content.chunks > MAX_CHUNKS:
        raise TransferError(
            f"content has {content.chunks} chunks; {MAX_CHUNKS} are taken: cut it larger"
        )
    return content


def chunk_size(*, link_bps: float, keepalive_s: float, max_payload: int) -> int:
    """How many bytes of a chunk suit a link: an eighth of the keep-alive's worth.

    A chunk that takes longer than the keep-alive starves the ping behind it, and the client
    cuts its own connection. `link_bps` is 0 where the rate is unknown. `max_payload` is the
    largest letter the broker takes in bytes, 0 if it announced nothing; it bounds the chunk
    even below `SMALLEST_CHUNK_BYTES`.
    """
    ceiling = LARGEST_CHUNK_BYTES
    if max_payload > 0:
        ceiling = min(ceiling, max(max_payload - ENVELOPE_BYTES, max_payload // 2, 1))
    wanted = int(link_bps / 8 * keepalive_s / 8) if link_bps > 0 else DEFAULT_CHUNK_BYTES
    return min(max(wanted, SMALLEST_CHUNK_BYTES), ceiling)


def cut(data: bytes, content: Content, index: int) -> tuple[int, bytes]:
    """The CRC-32 of a chunk, and the chunk.

    Raises:
        TransferError: the content has no such chunk.
    """
    if not 0 <= index < content.chunks:
        raise TransferError(_no_such_chunk(content, index))
    chunk = data[index * content.chunk_bytes : (index + 1) * content.chunk_bytes]
    return zlib.crc32(chunk), chunk


class Incoming:
    """What has arrived of one content."""

    def __init__(self, content: Content, parts: Mapping[int, bytes] = _NOTHING):
        """Begin, or go on from recorded parts; a part that does not fit is fetched again."""
        self.content = check_content(content)
        self._whole: bytes | None = None
        self._parts = {i: data for i, data in parts.items() if len(data) == _length(content, i)}
        self._missing = full(content.chunks)
        for index in self._parts:
            self._missing ^= 1 << index

    @property
    def received(self) -> bytes:
        """A bitmap of the chunks that arrived."""
        return to_bytes(full(self.content.chunks) ^ self._missing, self.content.chunks)

    @property
    def is_complete(self) -> bool:
        """Whether every chunk arrived."""
        return not self._missing

    @property
    def missing(self) -> Iterator[int]:
        """The indices that did not arrive yet, in order."""
        return ones(self._missing)

    def fill(self, data: bytes) -> None:
        """Take the whole from a sender that shares its memory: nothing can have damaged it.

        Raises:
            TransferError: it is of another length than announced.
        """
        if len(data) != self.content.size:
            raise TransferError(other_length(self.content, len(data)))
        self._whole, self._missing = data, 0

    def add(self, index: int, crc32: int, data: bytes) -> bool:
        """Keep a chunk; True if it is new.

        Raises:
            TransferError: an index out of range, a chunk of the wrong length or checksum, or
                other bytes than those already kept for this index.
        """
        expected = _length(self.content, index)
        if expected < 0:
            raise TransferError(_no_such_chunk(self.content, index))
        name = f"chunk {index} of {self.content.digest[:12]}"
        if len(data) != expected:
            raise TransferError(f"{name} has {len(data)} bytes; expected {expected}: cut it so")
        if zlib.crc32(data) != crc32:
            raise TransferError(f"{name} does not match its CRC-32: damaged on the way, resend it")
        if index in self._parts:
            if self._parts[index] != data:
                raise TransferError(f"{name} came again with other bytes: the sender mixed two")
            return False
        self._parts[index] = data
        self._missing ^= 1 << index
        return True

    def assemble(self) -> bytes:
        """The whole content.

        Raises:
            TransferError: chunks are missing, or together they are not what the digest says;
                then nothing of it may be kept.
        """
        if self._missing:
            raise TransferError(
                f"content {self.content.digest[:12]} lacks {self._missing.bit_count()} chunks: "
                "transfer them first"
            )
        if self._whole is not None:
            return self._whole
        data = b"".join(self._parts[index] for index in range(self.content.chunks))
        if sha256(data).hexdigest() != self.content.digest:
            raise TransferError(
                f"content {self.content.digest[:12]} is complete and has another SHA-256: "
                "its manifest or a chunk is wrong, begin again from nothing"
            )
        return data


class Patience:
    """How long to wait for an answer: by the answers so far, and longer with each silence."""

    def __init__(self, timeout_s: float):
        self._timeout_s = timeout_s
        self._usual_s = 0.0
        self._silences = 0

    @property
    def limit_s(self) -> float:
        """So long a silence is nothing to wonder at."""
        grown_s = self._timeout_s * 2.0 ** min(self._silences, 16)
        return max(4 * self._usual_s, min(grown_s, max(LONGEST_SILENCE_S, self._timeout_s)))

    def on_answer(self, delay_s: float) -> None:
        """An answer came after so many seconds."""
        self._silences = 0
        self._usual_s += 0.25 * (delay_s - self._usual_s) if self._usual_s else delay_s

    def on_silence(self) -> None:
        """None came for `limit_s`."""
        self._silences += 1

    def on_link_up(self) -> None:
        """The link is new: silences on the old one say nothing."""
        self._silences = 0


class Download:
    """Pull by bitmap: ask with `request` after each `on_chunk`, `on_link_up` and at `wake_at`."""

    def __init__(self, incoming: Incoming, *, window: int = 8, timeout_s: float = 10.0):
        self.incoming = incoming
        self._window = window
        self._patience = Patience(timeout_s)
        self._asked_at: dict[int, float] = {}
        self._heard_at = float("-inf")

    @property
    def wake_at(self) -> float | None:
        """When the oldest question has waited too long; None if nothing is asked."""
        oldest = min(self._asked_at.values(), default=None)
        return None if oldest is None else oldest + self._patience.limit_s

    def request(self, now: float) -> tuple[int, ...]:
        """The chunks to ask for now; empty while half the window or more is on its way."""
        limit_s = self._patience.limit_s
        expired = [i for i, asked_at in self._asked_at.items() if now >= asked_at + limit_s]
        for index in expired:
            del self._asked_at[index]
        if expired and now >= self._heard_at + limit_s:
            self._patience.on_silence()
        if not expired and len(self._asked_at) > self._window // 2:
            return ()
        unasked = (i for i in self.incoming.missing if i not in self._asked_at)
        wanted = tuple(islice(unasked, self._window - len(self._asked_at)))
        self._asked_at.update(dict.fromkeys(wanted, now))
        return wanted

    def on_chunk(self, index: int, crc32: int, data: bytes, now: float) -> bool:
        """Keep a chunk; True if it is new.

        Raises:
            TransferError: as `Incoming.add`; the chunk is asked for again after its time-out.
        """
        is_new = self.incoming.add(index, crc32, data)
        asked_at = self._asked_at.pop(index, None)
        if asked_at is not None:
            self._patience.on_answer(now - asked_at)
            self._heard_at = now
        return is_new

    def on_link_up(self) -> None:
        """A new connection: what was asked for is void."""
        self._asked_at.clear()
        self._patience.on_link_up()


def _length(content: Content, index: int) -> int:
    if not 0 <= index < content.chunks:
        return -1
    return min(content.chunk_bytes, content.size - index * content.chunk_bytes)


def other_length(content: Content, size: int) -> str:
    """What is wrong where bytes are not as many as their manifest says."""
    return f"content names {content.size} bytes; {size} are here: name what is sent"


def _no_such_chunk(content: Content, index: int) -> str:
    return f"chunk {index} of {content.digest[:12]} is out of range; it has {content.chunks} chunks"
