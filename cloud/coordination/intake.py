"""Takes updates in: from the opening letter to the acknowledgement after the record.

The path of one update: `on_open` and `on_chunk` gather its bytes, `_complete` checks the whole
against the model it was made from, and an accepted one is recorded before it is acknowledged.
"""

from dataclasses import replace

from cloud.coordination import uploads as up
from cloud.coordination.conductor import Conductor
from cloud.coordination.facts import (
    ChunkStored,
    HubMemory,
    MirrorTaken,
    UpdateAccepted,
    UpdateRefused,
)
from cloud.coordination.fleet import Fleet
from cloud.coordination.outbox import Outbox
from cloud.coordination.run import (
    CHUNK_BYTES,
    REMEMBERED_ROUNDS,
    ActiveRun,
    Contribution,
    parse_attempt,
)
from cloud.coordination.standing_in import StandingIn
from federation.errors import CodecError, TransferError
from federation.protocol import messages as m
from federation.protocol.codec import Weights
from federation.protocol.effects import Trained
from federation.protocol.messages import Verdict
from federation.protocol.mirror import MOST_BYTES
from federation.protocol.transfer import Incoming, content_of, cut


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
        standing_in: StandingIn,
    ) -> None:
        self._fleet = fleet
        self._shares_memory = shares_memory
        self._standing_in = standing_in
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
            self._check_allowed(device)
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

    def _check_allowed(self, device: str) -> None:
        """Refuse samples of a device whose owner does not allow it, or does no more.

        Raises:
            TransferError: so it is.
        """
        run = self._conductor.run
        if run is not None and run.plan.mirror and not self._fleet.mirrors(device):
            raise TransferError(f"the owner of {device} does not let its data be mirrored")

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
        if run.plan.mirror:
            self._outbox.note(MirrorTaken(attempt, run.plan.name, parsed[1], device, data, now))
        self._count(run, self._accepted(run, attempt, upload, now), update)
        self._acknowledge(device, attempt, digest, "stored", "")

    def _accepted(
        self, run: ActiveRun, attempt: str, upload: up.Upload, now: float
    ) -> UpdateAccepted:
        _, number, device = parse_attempt(attempt) or ("", 0, "")
        return UpdateAccepted(
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

    def _count(self, run: ActiveRun, fact: UpdateAccepted, update: Weights) -> None:
        attempt = fact.attempt
        run.contribute(Contribution(attempt, fact.device, fact.round, update, fact.report))
        if run.round is not None and attempt in run.round.attempts:
            run.round.receive(attempt, fact.report)
        self._fleet.free(fact.device, attempt)
        self._uploads.forget(attempt)
        self._settle(attempt, "stored")
        self._outbox.note(fact)

    def on_stood_in(self, trained: Trained, now: float) -> None:
        """A digital agent is done with an attempt that was given to it."""
        run, parsed = self._conductor.run, parse_attempt(trained.attempt)
        if run is None or parsed is None or run.round is None:
            return
        entry = run.round.attempts.get(trained.attempt)
        if entry is None or entry.status == "received":
            return  # The round is over, or the device was back in time.
        if not self._standing_in.has_asked(trained.attempt):
            return  # Asked before the hub began anew: where it is still wanted, it is asked again.
        device = entry.device
        failure = self._standing_in.objection(run, device) or trained.failure
        if not failure:
            try:
                update = run.read_update(trained.update, device)
            except CodecError as error:
                failure = str(error)
        if failure:
            self._conductor.mark(trained.attempt, "failed", f"its digital agent: {failure}", now)
            return
        upload = self._stood_in_upload(trained)
        for index in range(upload.content.chunks):
            _, chunk = cut(trained.update, upload.content, index)
            self._outbox.note(
                ChunkStored(trained.attempt, upload.content, index, chunk, upload.report)
            )
        fact = self._accepted(run, trained.attempt, upload, now)
        label = f"{device} dropped out; its digital agent finished in its place"
        self._count(run, replace(fact, stood_in=label), update)
        if self._fleet.is_there(device):
            self._outbox.say(m.Cancel(attempt=trained.attempt, reason=label), device)

    def _stood_in_upload(self, trained: Trained) -> up.Upload:
        """The update as if it had come: cut as the device had begun to send the same bytes."""
        content = content_of(trained.update, CHUNK_BYTES)
        begun = self._uploads.get(trained.attempt, content.digest)
        content = begun.content if begun is not None else content
        return up.Upload(content, trained.report, Incoming(content))

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
        run = self._conductor.run
        if run is not None and run.plan.mirror:
            return MOST_BYTES
        return (run.content.size if run is not None else 0) * 11 // 10 + 65536

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
