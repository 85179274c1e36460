"""The hub as a state machine: it answers letters and time with effects, and does no I/O.

The path of one round: `Conductor.advance` opens it and assigns; devices fetch the model
(`_serve`) and send their updates, which `Intake` takes in; `advance` closes it once it is
settled, and opens the next.
"""

from collections.abc import Callable
from itertools import islice

import msgspec

from cloud.config import RunPlan
from cloud.coordination.conductor import Conductor
from cloud.coordination.facts import (
    DeviceBorn,
    DeviceReported,
    HubFact,
    HubMemory,
    PresenceChanged,
    Released,
    RunMemory,
    RunOpened,
)
from cloud.coordination.fleet import Fleet
from cloud.coordination.intake import Intake
from cloud.coordination.outbox import Outbox
from cloud.coordination.run import CHUNK_BYTES, ActiveRun
from cloud.coordination.standing_in import MayStandIn, StandingIn, nobody_may
from federation.errors import ProtocolError, TwinError
from federation.protocol import messages as m
from federation.protocol.effects import Effect, Link, Trained
from federation.protocol.transfer import LARGEST_CHUNK_BYTES, content_of, cut
from federation.protocol.wishes import DesiredState, ReportedState
from optimizer.selection import Selector
from twin.merging import check_document, check_patch

Effects = list[Effect[HubFact]]

MAX_WANTED = 64
"""At most this many chunks are served for one request."""

MAX_SERVED_BYTES = 4 * 1024 * 1024
"""At most this many bytes are served for one request; the device asks again for the rest."""

SMALLEST_SERVED_BYTES = 1024
"""Smaller chunks are not served: each costs the hub and the broker a letter."""


class Coordinator:
    """Coordinates one fleet. `read_content` gives a released or older model by its digest.

    Where hub and devices share their memory, contents of any size ride along in letters, and
    nothing is checked that could only be damaged on a real way.
    """

    def __init__(
        self,
        memory: HubMemory,
        *,
        select: Selector,
        read_content: Callable[[str], bytes | None],
        shares_memory: bool = False,
        may_stand_in: MayStandIn = nobody_may,
    ) -> None:
        self.fleet = Fleet(memory.devices)
        self._outbox = Outbox()
        self._shares_memory = shares_memory
        run = ActiveRun(memory.run, shares_memory=shares_memory) if memory.run else None
        standing_in = StandingIn(may_stand_in)
        self._conductor = Conductor(
            run, fleet=self.fleet, select=select, outbox=self._outbox, standing_in=standing_in
        )
        self._intake = Intake(
            memory,
            fleet=self.fleet,
            conductor=self._conductor,
            outbox=self._outbox,
            shares_memory=shares_memory,
            standing_in=standing_in,
        )
        self._releases = dict(memory.releases)
        self.wishes = dict(memory.wishes)
        self._read_content = read_content

    @property
    def run(self) -> ActiveRun | None:
        """The active run, if there is one."""
        return self._conductor.run

    # The state machine's methods ----------------------------------------------------------

    def start(self, now: float) -> Effects:
        """Go on where the record ends. Devices are lost until they are heard of again."""
        self._conductor.restart(now)
        return self._finish(now)

    def on_link(self, link: Link, now: float) -> Effects:
        """The link came up: say that the hub is there. Devices answer with their births.

        While it is down no round opens, since nobody can be asked.
        """
        self._conductor.on_link(link)
        if link.is_up:
            self._outbox.say(m.HubState(online=True))
            for release in self._releases.values():
                self._outbox.say(release)
        return self._finish(now)

    def on_message(self, envelope: m.Envelope, now: float) -> Effects:  # noqa: C901 - a case a letter
        """A device's letter."""
        device, letter = envelope.sender, envelope.body
        match letter:
            case m.Birth():
                self._on_birth(device, envelope.epoch, letter, now)
            case m.Presence():
                self._on_presence(device, envelope.epoch, letter, now)
            case _ if device not in self.fleet:
                self._outbox.say(m.Rebirth(reason="the hub does not know this device"), device)
            case m.Heartbeat():
                self.fleet.advance(device, letter.progress)
            case m.TaskEvent():
                if self._intake.owns(device, letter.attempt, now):
                    self._conductor.mark(letter.attempt, letter.event, letter.reason, now)
            case m.BlobRequest():
                self._serve(device, letter)
            case m.UpdateOpen():
                self._intake.on_open(device, letter, now)
            case m.UpdateChunk():
                self._intake.on_chunk(device, letter, now)
            case ReportedState():
                self._on_reported(device, letter, now)
            case _:
                reason = f"{type(letter).__name__} is not a letter for the hub"
                self._outbox.refuse(device, reason, now)
        return self._finish(now)

    def on_wake(self, now: float) -> Effects:
        """Time passed: send unanswered assignments again, and see whether a wait is over."""
        self._conductor.resend(now)
        return self._finish(now)

    # What the operator and the exporter ask -----------------------------------------------

    def open_run(self, plan: RunPlan, model: bytes, now: float) -> Effects:
        """Begin a run from these encoded initial weights; one run is active at a time."""
        content = content_of(model, CHUNK_BYTES)
        memory = RunMemory(plan=plan, content=content, model=model)
        self._conductor.run = ActiveRun(memory, shares_memory=self._shares_memory)
        self._outbox.note(RunOpened(run=plan.name, content=content, model=model, at=now))
        return self._finish(now)

    def stop_run(self, run: str, now: float) -> Effects:
        """End the active run before its time; the model of the last closed round stands."""
        if self.run is not None and self.run.plan.name == run:
            self._conductor.end("stopped", "the operator stopped it", now)
        return self._finish(now)

    def on_released(self, release: m.Release, onnx: bytes, now: float) -> Effects:
        """A model was exported: record it and tell all devices."""
        # Milliseconds, so that a hub with a new record goes on above those of its old one.
        newest = max((known.serial for known in self._releases.values()), default=0)
        release = msgspec.structs.replace(release, serial=max(round(now * 1000), newest + 1))
        self._releases[release.run] = release
        self._outbox.note(Released(release=release, onnx=onnx, at=release.serial / 1000))
        self._outbox.say(release)
        return self._finish(now)

    def on_wish(self, device: str, wish: DesiredState, now: float) -> Effects:
        """Something is desired of a device: tell it now, or when it is born next."""
        self.wishes[device] = wish
        if self.fleet.is_there(device):
            self._outbox.say(wish, device)
        return self._finish(now)

    def on_stood_in(self, trained: Trained, now: float) -> Effects:
        """A digital agent is done: its update counts as its device's would, or it says why not."""
        self._intake.on_stood_in(trained, now)
        return self._finish(now)

    def on_unreadable(self, device: str, error: ProtocolError, now: float) -> Effects:
        """A letter on this device's branch could not even be read: record that, go on."""
        self._outbox.refuse(device, str(error), now)
        return self._finish(now)

    # Devices come and go, and fetch models ------------------------------------------------

    def _on_birth(self, device: str, epoch: int, birth: m.Birth, now: float) -> None:
        changed = device in self.fleet and self.fleet.mirrors(device) != birth.capability.mirrors
        self.fleet.born(device, epoch, birth)
        fact = DeviceBorn(device=device, epoch=epoch, capability=birth.capability, at=now)
        if changed:
            # That an owner allows the mirror no more is obeyed however often the device is born.
            self._outbox.note(fact)
        else:
            self._outbox.note_of(device, fact, now)
        mine = self._conductor.open_attempts(device)
        listed = [entry.attempt for entry in mine]
        working = birth.working
        if working is not None and self._intake.awaits(device, working):
            # What the Welcome does not list, the device drops: then it is no task of it.
            self.fleet.employ(device, working)
            listed += [working] if working not in listed else []
        for entry in mine:
            if entry.attempt == birth.working or entry.attempt in birth.finished:
                self._conductor.mark(entry.attempt, "accepted", "", now)
            else:
                self._conductor.mark(entry.attempt, "assigned", "", now)
                self._conductor.assign(entry, now)
        self._outbox.say(m.Welcome(epoch=epoch, open_attempts=tuple(listed)), device)
        if device in self.wishes:
            self._outbox.say(self.wishes[device], device)

    def _on_presence(self, device: str, epoch: int, presence: m.Presence, now: float) -> None:
        if not self.fleet.present(device, epoch, presence):
            return
        fact = PresenceChanged(device=device, epoch=epoch, state=presence.state, at=now)
        self._outbox.note_of(device, fact, now)
        if presence.state != "ready":
            for entry in self._conductor.open_attempts(device):
                reason = self.fleet.why_not(device)
                self._conductor.mark(entry.attempt, "lost", reason, now)

    def _on_reported(self, device: str, said: ReportedState, now: float) -> None:
        try:
            for document in (said.document, said.results):
                check_document(check_patch(document))
        except TwinError as error:
            self._outbox.refuse(device, str(error), now)
            return
        fact = DeviceReported(device, said.applied, said.results, said.document, now)
        self._outbox.note_of(device, fact, now)

    def _serve(self, device: str, request: m.BlobRequest) -> None:
        content, run = request.content, self.run
        data = run.content_named(content.digest) if run is not None else None
        data = data if data is not None else self._read_content(content.digest)
        is_cut_well = SMALLEST_SERVED_BYTES <= content.chunk_bytes <= LARGEST_CHUNK_BYTES
        if data is None or len(data) != content.size or not is_cut_well:
            reason = "the hub has no such content: the run that needed it may be over"
            self._outbox.say(m.BlobGone(digest=content.digest, reason=reason), device)
            return
        wanted = dict.fromkeys(index for index in request.wanted if 0 <= index < content.chunks)
        most = min(MAX_WANTED, MAX_SERVED_BYTES // content.chunk_bytes)
        for index in islice(wanted, most):
            crc32, chunk = cut(data, content, index)
            letter = m.BlobChunk(digest=content.digest, index=index, crc32=crc32, data=chunk)
            self._outbox.say(letter, device)
            if run is not None:
                run.bytes_down += len(chunk)

    def _finish(self, now: float) -> Effects:
        return self._outbox.take(self._conductor.advance(now))
