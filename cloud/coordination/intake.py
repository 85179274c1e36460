"""Takes updates in: from the opening letter to the acknowledgement after the record.

The path of one update: `on_open` and `on_chunk` gather its bytes, `_complete` checks the whole
against the model it was made from, and an accepted one is recorded before it is acknowledged.
"""

from cloud.coordination import uploads as up
from cloud.coordination.conductor import Conductor
from cloud.coordination.facts import (
    ChunkStored,
    HubMemory,
    UpdateAccepted,
    UpdateRefused,
)
from cloud.coordination.fleet import Fleet
from cloud.coordination.outbox import Outbox
from cloud.coordination.run import REMEMBERED_ROUNDS, Contribution, parse_attempt
from federation.errors import CodecError, TransferError
from federation.protocol import messages as m
from federation.protocol.messages import Verdict


class Intake:
    """All updates on their way, and the verdicts on those of recent rounds."""

    def __init__(
        self,
        memory: HubMemory,
        *,
        fleet: Fleet,
        conductor: Conductor,
        outbox: Outbox,
        shares_memory: bool,
    ) -> None:
        self._fleet = fleet
        self._shares_memory = shares_memory
        self._uploads = up.Uploads(memory.uploads)
        self._settled: dict[str, Verdict] = dict(memory.run.settled) if memory.run else {}
        self._oldest_settled = 0
        self._conductor = conductor
        self._outbox = outbox

    def on_open(self, device: str, letter: m.UpdateOpen, now: float) -> None:
        """An update is about to travel: say what has arrived of it, or that it need not."""
        if not self.owns(device, letter.attempt, now):
            # As from a device that was renamed: without an answer it would wait for ever.
            reason = "the attempt belongs to another device"
            digest = letter.content.digest
            self._acknowledge(device, letter.attempt, digest, "rejected", reason)
            return
        if self._turns_away(device, letter.attempt, letter.content.digest, now):
            return
        try:
            up.check_announced(letter, self._largest_update())
            upload = self._uploads.open(letter, now)
            if letter.inline is not None and self._shares_memory:
                self._take_whole(upload, letter.inline)
            elif letter.inline is not None:
                self._take(upload, up.inline_chunk(letter))
        except TransferError as error:
            digest = letter.content.digest
            self._refuse(device, letter.attempt, digest, "rejected", str(error), now)
            return
        self._after_arrival(device, letter.attempt, upload, now)

    def on_chunk(self, device: str, letter: m.UpdateChunk, now: float) -> None:
        """A chunk of an update: store it, acknowledge it, and see whether that was the last."""
        if not self.owns(device, letter.attempt, now):
            return
        # The round may have closed since the opening letter.
        if self._turns_away(device, letter.attempt, letter.digest, now):
            return
        upload = self._uploads.get(letter.attempt, letter.digest)
        if upload is None:
            # Nothing is known of this content: the device asks again with an opening letter.
            return
        try:
            self._take(upload, letter)
        except TransferError as error:
            self._outbox.refuse(device, str(error), now)
        self._after_arrival(device, letter.attempt, upload, now)

    def _take(self, upload: up.Upload, chunk: m.UpdateChunk) -> None:
        if not upload.incoming.add(chunk.index, chunk.crc32, chunk.data):
            return
        if self._conductor.run is not None:
            self._conductor.run.bytes_up += len(chunk.data)
        self._outbox.note(
            ChunkStored(
                attempt=chunk.attempt,
                content=upload.content,
                index=chunk.index,
                data=chunk.data,
                report=upload.report,
            )
        )

    def _take_whole(self, upload: up.Upload, data: bytes) -> None:
        upload.incoming.fill(data)
        if self._conductor.run is not None:
            self._conductor.run.bytes_up += len(data)

    def _after_arrival(self, device: str, attempt: str, upload: up.Upload, now: float) -> None:
        if upload.incoming.is_complete:
            self._complete(device, attempt, upload, now)
            return
        digest, received = upload.content.digest, upload.incoming.received
        self._outbox.say(m.UpdateAck(attempt=attempt, digest=digest, received=received), device)

    def _complete(self, device: str, attempt: str, upload: up.Upload, now: float) -> None:
        digest, run = upload.content.digest, self._conductor.run
        parsed = parse_attempt(attempt)
        if run is None or parsed is None:
            return
        try:
            data = upload.incoming.assemble()
            update = run.read_update(data, device)
        except TransferError as error:
            if self._uploads.restart(attempt):
                self._outbox.refuse(device, str(error), now)
                self._outbox.say(m.UpdateAck(attempt=attempt, digest=digest), device)
            else:
                self._refuse(device, attempt, digest, "rejected", str(error), now)
            return
        except CodecError as error:
            self._refuse(device, attempt, digest, "rejected", str(error), now)
            return
        number = parsed[1]
        run.contribute(Contribution(attempt, device, number, update, upload.report))
        if run.round is not None and attempt in run.round.attempts:
            run.round.receive(attempt, upload.report)
        self._fleet.free(device, attempt)
        self._uploads.forget(attempt)
        self._settle(attempt, "stored")
        self._outbox.note(
            UpdateAccepted(
                attempt=attempt,
                run=run.plan.name,
                round=number,
                device=device,
                content=upload.content,
                report=upload.report,
                counts_in=run.number if run.round is not None else run.number + 1,
                at=now,
                opened_at=upload.opened_at,
            )
        )
        self._acknowledge(device, attempt, digest, "stored", "")

    def _turns_away(self, device: str, attempt: str, digest: str, now: float) -> bool:
        """Answer an update that cannot count any more; False where it may be taken."""
        verdict, reason = self._standing(attempt)
        if verdict == "open":
            return False
        if verdict == "too-late" and attempt not in self._settled and self._is_of_run(attempt):
            self._refuse(device, attempt, digest, verdict, reason, now)
            return True
        if attempt not in self._settled:
            # Nothing is kept of an invented name but a bounded number of refusals.
            self._fleet.free(device, attempt)
            self._outbox.refuse(device, reason, now)
        self._acknowledge(device, attempt, digest, verdict, reason)
        return True

    def awaits(self, device: str, attempt: str) -> bool:
        """Whether this device's update may still count, in its own round or a later one."""
        parsed = parse_attempt(attempt)
        is_own = parsed is not None and parsed[2] == device
        return is_own and self._standing(attempt)[0] == "open"

    def _standing(self, attempt: str) -> tuple[Verdict, str]:
        """What an update of this attempt may expect: to be taken, or a verdict at once."""
        if attempt in self._settled:
            verdict = self._settled[attempt]
            return ("duplicate", "stored already") if verdict == "stored" else (verdict, "")
        run, parsed = self._conductor.run, parse_attempt(attempt)
        if run is None or parsed is None or not self._is_of_run(attempt):
            return "too-late", "its run is over, or there was none of this name"
        if run.round is not None and attempt in run.round.attempts:
            return "open", ""
        if not run.was_asked(parsed[1], parsed[2]):
            return "rejected", f"{parsed[2]} was not asked in round {parsed[1]}, or long ago"
        if run.keeps_late:
            return "open", ""
        return "too-late", f"round {parsed[1]} is over; round {run.number} is the newest"

    def _is_of_run(self, attempt: str) -> bool:
        """Whether the attempt names the active run; any other name may be an invention."""
        run, parsed = self._conductor.run, parse_attempt(attempt)
        return run is not None and parsed is not None and parsed[0] == run.plan.name

    def _settle(self, attempt: str, verdict: Verdict) -> None:
        """Remember a verdict for a while, so that an update that comes again hears it."""
        self._settled[attempt] = verdict
        newest = self._conductor.run.number if self._conductor.run is not None else 0
        if newest - self._oldest_settled > 2 * REMEMBERED_ROUNDS:
            self._oldest_settled = newest - REMEMBERED_ROUNDS
            self._settled = {
                a: v for a, v in self._settled.items() if _number(a) >= self._oldest_settled
            }

    def _largest_update(self) -> int:
        # An update is at most as large as the model, plus a header with other names.
        return (self._conductor.run.content.size if self._conductor.run else 0) * 11 // 10 + 65536

    def _acknowledge(
        self, device: str, attempt: str, digest: str, verdict: Verdict, reason: str
    ) -> None:
        letter = m.UpdateAck(attempt=attempt, digest=digest, verdict=verdict, reason=reason)
        self._outbox.say(letter, device)

    def _refuse(
        self, device: str, attempt: str, digest: str, verdict: Verdict, reason: str, now: float
    ) -> None:
        self._fleet.free(device, attempt)
        self._uploads.forget(attempt)
        self._settle(attempt, verdict)
        self._outbox.note(
            UpdateRefused(
                attempt=attempt,
                device=device,
                digest=digest,
                verdict=verdict,
                reason=reason,
                at=now,
            )
        )
        if verdict == "rejected":
            self._conductor.mark(attempt, "refused", reason, now)
        self._acknowledge(device, attempt, digest, verdict, reason)

    def owns(self, device: str, attempt: str, now: float) -> bool:
        """Whether this attempt is the device's own; if not, that is recorded."""
        parsed = parse_attempt(attempt)
        if parsed is not None and parsed[2] == device:
            return True
        self._outbox.refuse(device, f"attempt {attempt[:80]!r} does not belong to {device}", now)
        return False


def _number(attempt: str) -> int:
    parsed = parse_attempt(attempt)
    return parsed[1] if parsed is not None else 0
