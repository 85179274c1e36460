"""The hub's side of updates that are on their way: what has arrived, and what it turned into."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from cloud.coordination.facts import UploadMemory
from federation.errors import TransferError
from federation.protocol.messages import Content, Report, UpdateChunk, UpdateOpen
from federation.protocol.transfer import Incoming, check_content

MAX_RESTARTS = 3
"""How often a content whose digest does not hold is asked for again before it is refused."""

MOST = 2**40
"""No report counts more samples, steps or right answers."""

LARGEST = 1e30
"""No report has a larger sum of losses, or time."""


@dataclass(slots=True)
class Upload:
    """One update that is on its way; `opened_at` is None where an earlier hub opened it."""

    content: Content
    report: Report
    incoming: Incoming
    opened_at: float | None = None
    restarts: int = 0


class Uploads:
    """All updates that are on their way, by attempt."""

    def __init__(self, memory: Mapping[str, UploadMemory]) -> None:
        self._by_attempt = {
            attempt: Upload(kept.content, kept.report, Incoming(kept.content, kept.parts))
            for attempt, kept in memory.items()
        }

    def get(self, attempt: str, digest: str) -> Upload | None:
        """The upload of this attempt, if it is of this content."""
        upload = self._by_attempt.get(attempt)
        return upload if upload is not None and upload.content.digest == digest else None

    def open(self, letter: UpdateOpen, now: float) -> Upload:
        """Begin an upload, or go on with it where the same content is already under way.

        Raises:
            TransferError: the inline content is not what the letter says it is.
        """
        upload = self._by_attempt.get(letter.attempt)
        if upload is None or upload.content != letter.content:
            upload = Upload(letter.content, letter.report, Incoming(letter.content), now)
            self._by_attempt[letter.attempt] = upload
        return upload

    def forget(self, attempt: str) -> None:
        """Drop what has arrived for this attempt."""
        self._by_attempt.pop(attempt, None)

    def restart(self, attempt: str) -> bool:
        """Begin again with nothing, since the whole was damaged; False: once too often."""
        upload = self._by_attempt[attempt]
        upload.restarts += 1
        upload.incoming = Incoming(upload.content)
        return upload.restarts <= MAX_RESTARTS


def inline_chunk(letter: UpdateOpen) -> UpdateChunk:
    """The content that rode along in an opening letter, as the one chunk that it is.

    Raises:
        TransferError: its size is not the content's, or the content has several chunks.
    """
    data = letter.inline or b""
    if letter.content.chunks != 1 or len(data) != letter.content.size:
        raise TransferError(
            f"inline content has {len(data)} bytes; {letter.content.size} in one chunk were "
            "announced: send it as chunks"
        )
    return UpdateChunk(
        attempt=letter.attempt,
        digest=letter.content.digest,
        index=0,
        crc32=zlib.crc32(data),
        data=data,
    )


def check_announced(letter: UpdateOpen, largest_bytes: int) -> None:
    """Refuse an update by what its opening letter says, before a byte of it is taken.

    Raises:
        TransferError: as `check_content`; larger than an update of this model can be, or a
            report whose numbers cannot weigh anything.
    """
    content, report = check_content(letter.content), letter.report
    if not 0 < content.size <= largest_bytes:
        raise TransferError(
            f"update of {content.size} bytes; one of this model has between 1 and {largest_bytes}"
        )
    if not 1 <= report.samples <= MOST:
        raise TransferError(f"report of {report.samples} samples; an update has at least 1")
    if not (0 <= report.steps <= MOST and 0 <= report.correct <= MOST):
        raise TransferError(f"report of {report.steps} steps and {report.correct} right answers")
    # Finite is not enough: two devices' sum may be infinite, and all figures of the round with it.
    if not (abs(report.loss_sum) <= LARGEST and abs(report.seconds) <= LARGEST):
        raise TransferError("report with a loss or time that is not finite, or beyond all reason")
