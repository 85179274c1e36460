"""A device as a state machine: it answers letters and time with effects, and does no I/O.

The path of one update: an `Assignment` is kept, its base model is fetched (`_fetch`), trained
from (`Train`), and what comes back (`on_trained`) is kept and uploaded until the hub's own
acknowledgement lets go of it (`_on_ack`).
"""

import random
from dataclasses import dataclass

from edge_agent.facts import (
    AgentFact,
    AssignmentForgotten,
    AssignmentKept,
    ContentForgotten,
    Held,
    Memory,
    ReleaseKept,
    UpdateForgotten,
)
from edge_agent.fetching import Fetching
from edge_agent.terms import Terms
from edge_agent.uploading import Outgoing
from federation.errors import TransferError
from federation.protocol import messages as m
from federation.protocol.effects import (
    Effect,
    Link,
    Record,
    Send,
    StopTraining,
    Train,
    Trained,
    WakeAt,
)
from federation.protocol.transfer import check_content
from federation.protocol.wishes import DesiredState

Effects = list[Effect[AgentFact]]


@dataclass(frozen=True, slots=True)
class AgentSettings:
    """How an agent behaves on its link; times in seconds.

    `timeout_s` is the first patience with an unanswered transfer. After the hub came back, a
    device says its birth within `birth_spread_s`, drawn at random, so that a fleet does not
    speak all at once. A device that shares its memory with the hub, in a simulation, sends
    updates of any size within one letter, and named after their attempt, not by their digest.
    `energy` is what its owner knows of its draw, for the hub's forecasts.
    """

    heartbeat_s: float = 30.0
    keepalive_s: float = 30.0
    timeout_s: float = 10.0
    birth_spread_s: float = 0.5
    shares_memory: bool = False
    energy: dict[str, float] | None = None


class Agent:
    """One device of a fleet. `held` is what its journal gave back."""

    def __init__(
        self,
        device: str,
        capability: m.Capability,
        held: Held,
        *,
        settings: AgentSettings,
        rng: random.Random,
    ) -> None:
        self.device = device
        self.assignment = held.assignment
        self.progress = 0.0
        self.release = held.release
        self._memory = held.memory
        self._base: bytes | None = None
        self._settings = settings
        self._terms = Terms(capability, held.wish, settings.heartbeat_s, settings.energy)
        self._rng = rng
        self._link = Link(is_up=False, epoch=0)
        self._max_payload = 0
        self.hub_epoch = -1
        self._hub_is_online = self._is_introduced = self._awaits_welcome = False
        self._wanted: m.Release | None = None
        self._fetching = Fetching(held.parts, settings.timeout_s)
        shares_memory = settings.shares_memory
        self._outgoing = Outgoing(held.updates, settings.timeout_s, shares_memory=shares_memory)
        self._deadline = self._birth_at = self._heartbeat_at = float("inf")
        self._started_at = 0.0
        self._out: Effects = []

    # The state machine's methods ----------------------------------------------------------

    def start(self, now: float) -> Effects:
        """Go on where the journal ends: fetch on, train on, or upload on."""
        self._started_at = now
        if self.release is not None:
            # The power may have gone between taking a release in and letting its chunks go.
            self._drop_content(self.release.content.digest)
        self._heartbeat_at = now + self._terms.heartbeat_s
        kept = self.assignment
        if kept and (self._outgoing.holds(kept.attempt) or self._terms.objection(kept, now)):
            # The power failed after the update was kept and before the task was forgotten;
            # or the device was set up anew and no longer takes such a task.
            self._forget_assignment(kept)
        if self.assignment is not None:
            # How long the device was away is not known; the hub will call it off if too long.
            self._deadline = now + self.assignment.deadline_s
            self._fetch(self.assignment)
        return self._finish(now)

    def stand_by(self, epoch: int, hub_epoch: int, now: float) -> Effects:
        """In place of `start`: as if it had begun, and been linked and welcomed, long ago."""
        self._started_at = now
        self._heartbeat_at = now + self._terms.heartbeat_s
        self._link = Link(is_up=True, epoch=epoch)
        self.hub_epoch, self._hub_is_online, self._is_introduced = hub_epoch, True, True
        return self._finish(now)

    def on_link(self, link: Link, now: float) -> Effects:
        """The link came up: say that this device is here. The hub's state should come next."""
        self._link = link
        self._is_introduced = False
        if link.is_up:
            self._max_payload = link.max_payload
            self._say(m.Presence(state="ready"))
            self._fetching.on_link_up(link.max_payload)
            # A broker may lose what the hub says while it still takes in who wants to hear it.
            self._birth_at = now + self._settings.timeout_s
        return self._finish(now)

    def on_message(self, envelope: m.Envelope, now: float) -> Effects:
        """A letter of the hub. What a hub said that has been replaced is void."""
        if envelope.epoch >= self.hub_epoch:
            self._take(envelope, now)
        return self._finish(now)

    def _take(self, envelope: m.Envelope, now: float) -> None:  # noqa: C901 - one case a letter
        match envelope.body:
            case m.HubState() as letter:
                self._on_hub_state(envelope.epoch, letter, now)
            case m.Assignment() as letter:
                self._on_assignment(letter, now)
            case m.Cancel() as letter:
                self._abandon(letter.attempt, "")
            case m.Welcome() as letter if self.is_welcomed(letter):
                self._on_welcome(envelope.epoch, letter)
            case m.BlobChunk() as letter:
                self._on_chunk(letter, now)
            case m.BlobGone() as letter:
                self._on_gone(letter)
            case m.UpdateAck() as letter:
                self._on_ack(letter, now)
            case m.Rebirth():
                self._introduce(now)
            case m.Release() as letter:
                self._on_release(letter)
            case DesiredState() as letter:
                self._on_desired(letter, envelope.epoch, now)
            case _:
                pass  # What devices say is not for devices.

    def on_trained(self, trained: Trained, now: float) -> Effects:
        """Training ended: keep the update and send it, or say why there is none."""
        assignment = self.assignment
        if assignment is None or assignment.attempt != trained.attempt:
            return self._finish(now)
        if trained.failure:
            self._event(trained.attempt, "failed", trained.failure)
            self._forget_assignment(assignment)
            return self._finish(now)
        memory = Memory(assignment.run, trained.memory) if trained.memory else None
        limits, pace = (self._settings.keepalive_s, self._max_payload), assignment.plan.uplink.pace
        kept = self._outgoing.keep(trained, memory, *limits, pace=pace)
        self._note(kept)
        self._out.extend(self._terms.spend(assignment.base.size, kept.content.size, now))
        self._forget_assignment(assignment)
        if self._can_talk:
            self._out.extend(self._outgoing.open(kept.attempt, self.device, now))
        return self._finish(now)

    def on_wake(self, now: float) -> Effects:
        """Time passed: repeat what went unanswered, show a sign of life, give up what is late."""
        if self.assignment is not None and now >= self._deadline:
            self._abandon(self.assignment.attempt, "the deadline has passed")
        if now >= self._birth_at:
            self._introduce(now)
        if now >= self._heartbeat_at:
            self._heartbeat_at = now + self._terms.heartbeat_s
            self._say_heartbeat(now)
        if self._can_talk:
            self._out.extend(self._outgoing.on_wake(self.device, now))
        return self._finish(now)

    @property
    def is_idle(self) -> bool:
        """Whether it has nothing to do, send or fetch, and the hub knows that it is there."""
        return (
            self.assignment is None
            and self._wanted is None
            and self._can_talk
            and self._is_introduced
            and not self._awaits_welcome
            and self._birth_at == float("inf")
            and not self._outgoing.attempts
            and not self._fetching.wakes
        )

    # What the hub says --------------------------------------------------------------------

    def _on_hub_state(self, epoch: int, letter: m.HubState, now: float) -> None:
        has_restarted = epoch > self.hub_epoch or not self._hub_is_online
        self.hub_epoch, self._hub_is_online = epoch, letter.online
        if not letter.online:
            self._birth_at = float("inf")
        elif not self._is_introduced:
            self._introduce(now)
        elif has_restarted:
            # It may have missed anything; a whole fleet hears this at the same moment.
            self._birth_at = now + self._rng.uniform(0.0, self._settings.birth_spread_s)

    def _introduce(self, now: float) -> None:
        """Say what this device is and holds, and begin all its transfers again."""
        self._birth_at = float("inf")
        self._is_introduced = self._awaits_welcome = True
        birth = m.Birth(
            capability=self._terms.capability,
            working=self.assignment.attempt if self.assignment is not None else None,
            finished=self._outgoing.attempts,
            release=self.release.content.digest if self.release is not None else None,
        )
        self._say(birth)
        if self._terms.has_something_to_say:
            self._say(self._terms.report())
        self._out.extend(self._outgoing.open_all(self.device, now))

    def is_welcomed(self, letter: m.Welcome) -> bool:
        """Whether this answers its newest birth: a broker may deliver twice, and late."""
        return self._awaits_welcome and letter.epoch == self._link.epoch

    def _on_welcome(self, epoch: int, letter: m.Welcome) -> None:
        self.hub_epoch, self._hub_is_online = epoch, True  # Its state may never have come.
        self._awaits_welcome = False
        in_hand = self.assignment
        if in_hand is not None and in_hand.attempt not in letter.open_attempts:
            # Said aloud: a hub that thinks this device busy gives it nothing else.
            self._abandon(in_hand.attempt, "the hub no longer waits for it")

    def _on_assignment(self, letter: m.Assignment, now: float) -> None:
        in_hand = self.assignment is not None and self.assignment.attempt == letter.attempt
        if in_hand or self._outgoing.holds(letter.attempt):
            self._event(letter.attempt, "accepted")
            return
        objection = self._terms.objection(letter, now)
        if objection:
            self._event(letter.attempt, "declined", objection)
            return
        if self.assignment is not None:
            self._abandon(self.assignment.attempt, "another assignment came after it")
        self.assignment = letter
        self._deadline = now + letter.deadline_s
        self._note(AssignmentKept(letter))
        for digest in self._fetching.set_aside - {letter.base.digest}:
            self._drop_content(digest)
        if letter.inline is None or self._outgoing.owes_memory(letter.run):
            # Else it trains at once, and saying so says that it has accepted.
            self._event(letter.attempt, "accepted")
        self._fetch(letter)

    def _on_desired(self, letter: DesiredState, epoch: int, now: float) -> None:
        self._out.extend(self._terms.obey(letter, epoch, self.device))
        self._heartbeat_at = min(self._heartbeat_at, now + self._terms.heartbeat_s)
        if (task := self.assignment) and (why := self._terms.objection(task, now)):
            self._abandon(task.attempt, why)

    def _on_ack(self, letter: m.UpdateAck, now: float) -> None:
        if letter.verdict == "open":
            self._out.extend(self._outgoing.on_ack(letter, self.device, now))
        elif (update := self._outgoing.forget(letter.attempt, letter.digest)) is not None:
            counted = letter.verdict in ("stored", "duplicate")
            self._memory = (update.memory if counted else None) or self._memory
            self._note(UpdateForgotten(letter.attempt, counted))
            if self.assignment is not None and self._base is not None:
                self._train(self.assignment, self._base)

    # Fetching -----------------------------------------------------------------------------

    def _fetch(self, assignment: m.Assignment) -> None:
        """Train at once if the base is here, else begin or go on fetching it."""
        base = assignment.inline or self._fetching.begin(assignment.base)
        if base is not None:
            self._train(assignment, base)

    def _train(self, assignment: m.Assignment, base: bytes) -> None:
        """Train, or wait for the verdict on an update whose memory this training begins from."""
        self._base = base if self._outgoing.owes_memory(assignment.run) else None
        if self._base is not None:
            return
        self._event(assignment.attempt, "training")
        kept = self._memory
        memory = kept.data if kept is not None and kept.run == assignment.run else b""
        self._out.append(Train(assignment, base, memory))

    def _on_chunk(self, letter: m.BlobChunk, now: float) -> None:
        data, facts = self._fetching.on_chunk(letter, now)
        for fact in facts:
            self._note(fact)
        if data is None:
            return
        if self.assignment is not None and self.assignment.base.digest == letter.digest:
            self._train(self.assignment, data)
        if self._wanted is not None and self._wanted.content.digest == letter.digest:
            self._install(self._wanted, data)

    def _on_gone(self, letter: m.BlobGone) -> None:
        if not self._fetching.is_under_way(letter.digest):
            return
        self._drop_content(letter.digest)
        if self._wanted is not None and self._wanted.content.digest == letter.digest:
            self._wanted = None
        if self.assignment is not None and self.assignment.base.digest == letter.digest:
            self._abandon(self.assignment.attempt, letter.reason)

    def _on_release(self, letter: m.Release) -> None:
        newest = self._wanted or self.release
        is_new = newest is None or letter.serial > newest.serial
        if not self._terms.capability.infers or not is_new:
            return
        try:
            check_content(letter.content)
        except TransferError:
            return  # The hub names a content that cannot be: there is nothing to fetch.
        superseded, self._wanted = self._wanted, letter
        digest = letter.content.digest
        if superseded is not None and superseded.content.digest != digest:
            self._drop_content(superseded.content.digest)
        if self.release is not None and self.release.content.digest == digest:
            self.release, self._wanted = letter, None  # The same model: only its number is new.
            return
        data = self._fetching.begin(letter.content)
        if data is not None:
            self._install(letter, data)

    def _install(self, release: m.Release, data: bytes) -> None:
        self.release, self._wanted = release, None
        self._note(ReleaseKept(release, data))
        self._drop_content(release.content.digest)

    @property
    def _can_talk(self) -> bool:
        return self._link.is_up and self._hub_is_online

    def _abandon(self, attempt: str, reason: str) -> None:
        """Drop the assignment in hand; tell the hub why unless it knows."""
        assignment = self.assignment
        if assignment is None or assignment.attempt != attempt:
            return
        self._out.append(StopTraining(attempt))
        if reason:
            self._event(attempt, "cancelled", reason)
        self._forget_assignment(assignment)

    def _forget_assignment(self, assignment: m.Assignment) -> None:
        self.assignment, self.progress, self._base = None, 0.0, None
        self._deadline = float("inf")
        # The next round may begin from the same base, as after a cancel: it stays until then.
        self._fetching.suspend(assignment.base.digest)
        self._note(AssignmentForgotten(assignment.attempt))

    def _drop_content(self, digest: str) -> None:
        self._fetching.forget(digest)
        self._note(ContentForgotten(digest))

    def _say_heartbeat(self, now: float) -> None:
        attempt = self.assignment.attempt if self.assignment is not None else None
        uptime_s = now - self._started_at
        self._say(m.Heartbeat(attempt=attempt, progress=self.progress, uptime_s=uptime_s))

    def _event(self, attempt: str, event: m.TaskState, reason: str = "") -> None:
        self._say(m.TaskEvent(attempt=attempt, event=event, reason=reason[:500]))

    def _say(self, letter: m.AnyLetter) -> None:
        if self._link.is_up:
            self._out.append(Send(letter, self.device))

    def _note(self, fact: AgentFact) -> None:
        self._out.append(Record(fact))

    def _finish(self, now: float) -> Effects:
        """Ask for what is missing, and hand over what is to be done until the next look."""
        waits = [self._deadline, self._birth_at, self._heartbeat_at]
        if self._can_talk:
            for request in self._fetching.requests(now):
                self._say(request)
            waits += self._outgoing.wakes + self._fetching.wakes
        self._out.append(WakeAt(max(min(waits), now)))
        out, self._out = self._out, []
        return out
