"""Finished updates on their way to the hub: kept until it has answered for each of them."""

from collections.abc import Iterable, Iterator, Mapping

from edge_agent.facts import Memory, UpdateKept
from federation.protocol.effects import Send, Trained
from federation.protocol.messages import INLINE_BYTES, UpdateAck, UpdateChunk, UpdateOpen
from federation.protocol.transfer import chunk_size, content_named, content_of
from federation.protocol.upload import Upload


class Outgoing:
    """The updates that are kept, and the state of their transfers, by attempt."""

    def __init__(
        self, kept: Mapping[str, UpdateKept], timeout_s: float, *, shares_memory: bool = False
    ) -> None:
        self._shares_memory = shares_memory
        self._kept = dict(kept)
        self._timeout_s = timeout_s
        self._uploads = {attempt: self._upload(update) for attempt, update in kept.items()}
        self._link_bps = 0.0

    @property
    def attempts(self) -> tuple[str, ...]:
        """The attempts whose updates are kept."""
        return tuple(sorted(self._kept))

    @property
    def wakes(self) -> list[float]:
        """When the transfers want to be looked at."""
        return [upload.wake_at for upload in self._uploads.values() if upload.wake_at is not None]

    def holds(self, attempt: str) -> bool:
        """Whether this attempt is finished and not yet answered for."""
        return attempt in self._kept

    def owes_memory(self, run: str) -> bool:
        """Whether an update of this run, if it counts, changes what the next training sees."""
        return any(
            update.memory is not None and update.memory.run == run for update in self._kept.values()
        )

    def keep(
        self,
        trained: Trained,
        memory: Memory | None,
        keepalive_s: float,
        max_payload: int,
        *,
        pace: float = 0.0,
    ) -> UpdateKept:
        """Take a finished update in, cut for the link as it has been of late, or for its pace."""
        link_bps = 8.0 * pace or self._link_bps
        size = chunk_size(link_bps=link_bps, keepalive_s=keepalive_s, max_payload=max_payload)
        if self._shares_memory:
            content = content_named(trained.attempt, trained.update, size)
        else:
            if len(trained.update) <= INLINE_BYTES:
                size = max(len(trained.update), 1)
            content = content_of(trained.update, size)
        report, data = trained.report, trained.update
        update = UpdateKept(trained.attempt, content, report, data, memory, pace)
        self._kept[trained.attempt] = update
        self._uploads[trained.attempt] = self._upload(update)
        return update

    def open(self, attempt: str, device: str, now: float) -> Iterator[Send]:
        """Say that this update is about to travel; a small one rides along."""
        update, upload = self._kept[attempt], self._uploads[attempt]
        upload.open(now)
        yield self._opening(update, device)

    def open_all(self, device: str, now: float) -> Iterator[Send]:
        """Begin every transfer again, as after a new connection."""
        for attempt in self.attempts:
            yield from self.open(attempt, device, now)

    def on_ack(self, ack: UpdateAck, device: str, now: float) -> Iterator[Send]:
        """The hub has some chunks: send the next ones."""
        upload = self._uploads.get(ack.attempt)
        if upload is None or upload.content.digest != ack.digest:
            return
        indices = upload.on_ack(ack.received, now)
        if not self._kept[ack.attempt].pace:
            self._link_bps = upload.rate_bps or self._link_bps
        yield from self._chunks(ack.attempt, indices, device)

    def _chunks(self, attempt: str, indices: Iterable[int], device: str) -> Iterator[Send]:
        upload = self._uploads[attempt]
        for index in indices:
            crc32, data = upload.chunk(index)
            digest = upload.content.digest
            chunk = UpdateChunk(attempt=attempt, digest=digest, index=index, crc32=crc32, data=data)
            yield Send(chunk, device)

    def on_wake(self, device: str, now: float) -> Iterator[Send]:
        """Ask again where the hub has been silent for too long; begin what never began.

        Chunks that a pace held back go when their time has come.
        """
        for attempt in self.attempts:
            upload = self._uploads[attempt]
            if upload.wake_at is None:
                yield from self.open(attempt, device, now)
            elif upload.on_timeout(now):
                yield self._opening(self._kept[attempt], device)
            else:
                yield from self._chunks(attempt, upload.on_pace(now), device)

    def forget(self, attempt: str, digest: str) -> UpdateKept | None:
        """The hub has answered for this update; None where it is not the one that is kept."""
        kept = self._kept.get(attempt)
        if kept is None or kept.content.digest != digest:
            return None
        del self._kept[attempt], self._uploads[attempt]
        return kept

    def _opening(self, update: UpdateKept, device: str) -> Send:
        small = self._shares_memory or update.content.size <= INLINE_BYTES
        letter = UpdateOpen(
            attempt=update.attempt,
            content=update.content,
            report=update.report,
            inline=update.data if small else None,
        )
        return Send(letter, device)

    def _upload(self, update: UpdateKept) -> Upload:
        return Upload(
            update.content,
            update.data,
            timeout_s=self._timeout_s,
            pace_bytes_per_s=update.pace,
        )
