"""Content on its way down: base models and releases, pulled chunk by chunk."""

from collections.abc import Iterator, Mapping

from edge_agent.facts import AgentFact, ChunkKept, ContentForgotten
from federation.errors import TransferError
from federation.protocol.messages import BlobChunk, BlobRequest, Content
from federation.protocol.transfer import (
    DEFAULT_CHUNK_BYTES,
    MAX_CHUNKS,
    Download,
    Incoming,
    check_content,
    chunk_size,
)


class Fetching:
    """The downloads under way, by digest, and what is set aside until it is asked for again.

    `parts` is what the journal gave back: set aside, too.
    """

    def __init__(self, parts: Mapping[str, Mapping[int, bytes]], timeout_s: float) -> None:
        self._parts = dict(parts)
        self._timeout_s = timeout_s
        self._largest_chunk = DEFAULT_CHUNK_BYTES
        self._downloads: dict[str, Download] = {}
        self._suspended: dict[str, Incoming] = {}

    @property
    def wakes(self) -> list[float]:
        """When the downloads want to be looked at."""
        wakes = [download.wake_at for download in self._downloads.values()]
        return [wake for wake in wakes if wake is not None]

    @property
    def set_aside(self) -> set[str]:
        """The digests of contents that are here, whole or in part, and not under way."""
        return self._parts.keys() | self._suspended.keys()

    def is_under_way(self, digest: str) -> bool:
        """Whether chunks of this content are awaited."""
        return digest in self._downloads

    def begin(self, content: Content) -> bytes | None:
        """Begin or go on; the whole content where nothing of it is missing.

        Raises:
            TransferError: the content is not one that can be transferred.
        """
        check_content(content)
        if self.is_under_way(content.digest):
            return None
        incoming = self._recall(content)
        if not incoming.is_complete and incoming.content.chunk_bytes > self._largest_chunk:
            incoming = Incoming(_cut_at_most(content, self._largest_chunk))
        self._downloads[content.digest] = Download(incoming, timeout_s=self._timeout_s)
        return self._take_whole(content.digest)[0] if incoming.is_complete else None

    def suspend(self, digest: str) -> None:
        """Ask for no more of this content; what is here of it stays."""
        download = self._downloads.pop(digest, None)
        if download is not None:
            self._suspended[digest] = download.incoming

    def forget(self, digest: str) -> None:
        """This content is no longer wanted."""
        self._downloads.pop(digest, None)
        self._suspended.pop(digest, None)
        self._parts.pop(digest, None)

    def on_link_up(self, max_payload: int) -> None:
        """A new connection: what was asked for on the last one is void.

        Where this broker takes smaller letters than the last one, chunks are cut anew.
        """
        self._largest_chunk = chunk_size(link_bps=0, keepalive_s=0, max_payload=max_payload)
        for digest, download in self._downloads.items():
            content = download.incoming.content
            finer = _cut_at_most(content, self._largest_chunk)
            if finer != content:
                self._downloads[digest] = Download(Incoming(finer), timeout_s=self._timeout_s)
            else:
                download.on_link_up()

    def requests(self, now: float) -> Iterator[BlobRequest]:
        """Questions for chunks that are missing and not on their way."""
        for download in self._downloads.values():
            wanted = download.request(now)
            if wanted:
                yield BlobRequest(content=download.incoming.content, wanted=wanted)

    def on_chunk(self, letter: BlobChunk, now: float) -> tuple[bytes | None, list[AgentFact]]:
        """Take a chunk in: the whole content if that was the last, and what to write down."""
        download = self._downloads.get(letter.digest)
        if download is None:
            return None, []
        try:
            if not download.on_chunk(letter.index, letter.crc32, letter.data, now):
                return None, []
        except TransferError:
            return None, []  # It is asked for again when its time is up.
        facts: list[AgentFact] = [ChunkKept(download.incoming.content, letter.index, letter.data)]
        if not download.incoming.is_complete:
            return None, facts
        data, more = self._take_whole(letter.digest)
        return data, facts + more

    def _recall(self, content: Content) -> Incoming:
        """What is set aside of this content, or nothing of it."""
        suspended = self._suspended.pop(content.digest, None)
        if suspended is not None and suspended.content.size == content.size:
            return suspended
        parts = self._parts.pop(content.digest, {})
        incoming = Incoming(content, parts)
        if parts and not any(incoming.received):
            # A broker that takes only smaller letters had it cut finer than the hub named it.
            incoming = Incoming(_cut_at_most(content, max(map(len, parts.values()))), parts)
        return incoming

    def _take_whole(self, digest: str) -> tuple[bytes | None, list[AgentFact]]:
        incoming = self._downloads[digest].incoming
        try:
            data = incoming.assemble()
        except TransferError:
            # Every chunk was sound and the whole is not: begin again from nothing.
            self._downloads[digest] = Download(
                Incoming(incoming.content), timeout_s=self._timeout_s
            )
            return None, [ContentForgotten(digest)]
        self.suspend(digest)
        return data, []


def _cut_at_most(content: Content, chunk_bytes: int) -> Content:
    # Never into more chunks than a manifest may name, whatever the broker takes.
    smaller = min(content.chunk_bytes, max(chunk_bytes, -(-content.size // MAX_CHUNKS)))
    return Content(digest=content.digest, size=content.size, chunk_bytes=smaller)
