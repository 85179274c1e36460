"""Opens and closes the rounds of the active run, one after the other.

`advance` is the only place where a round opens or closes. It says until when there is nothing
to do, and why.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Literal

from cloud.coordination.facts import (
    AttemptChanged,
    RoundAbandoned,
    RoundClosed,
    RoundOpened,
    RunEnded,
    Waiting,
)
from cloud.coordination.fleet import Fleet
from cloud.coordination.outbox import Outbox
from cloud.coordination.rounds import OPEN, Attempt, Status, Wait
from cloud.coordination.run import NO_PACES, ActiveRun, attempt_id, parse_attempt
from cloud.coordination.standing_in import LABEL, StandingIn
from federation.protocol import messages as m
from federation.protocol.effects import Link
from optimizer.selection import Selection, Selector

RESEND_S = 10.0
"""How long an assignment may stay unanswered before it is sent again."""

LATE_DEADLINES = 10
"""Where late updates are kept, a device may take this many of the policy's deadlines: when the
round is over is the hub's matter, and a straggler shall not give up before its update is old."""

MAX_CHANGES = 20
"""So many changes of one attempt are recorded; a device that toggles on fills no record."""

MAX_NAMED = 1000
"""In a larger fleet not everybody who is not asked is named in the record."""

WAIT_RECORD_S = 1.0
"""A wait whose reason changes is written down at most this often."""


class Conductor:
    """Conducts the rounds of `run`; there is one active run at a time, or none."""

    def __init__(
        self,
        run: ActiveRun | None,
        *,
        fleet: Fleet,
        select: Selector,
        outbox: Outbox,
        standing_in: StandingIn,
    ) -> None:
        self.run = run
        self._fleet = fleet
        self._select = select
        self._outbox = outbox
        self._standing_in = standing_in
        self._waits_for: tuple[str, int, str] = ("", 0, "")
        self._told, self._told_at = "", 0.0
        self._resend_at = float("inf")
        self._changes: Counter[str] = Counter()
        self._no_link, self._no_link_until = "not connected to the broker yet", float("-inf")

    def advance(self, now: float) -> float:
        """Close, abandon and open rounds until there is something to wait for: until when."""
        while (run := self.run) is not None:
            if run.round is None:
                if run.number >= run.plan.rounds:
                    self.end("finished", f"all {run.plan.rounds} rounds are done", now)
                elif self._no_link:
                    return self._wait_for_link(run, now)
                elif not self._open_round(run, now) and self.run is run:
                    return self._wait_for_devices(run, now)
                continue
            for entry, task in self._standing_in.due(run, now):
                self.mark(entry.attempt, "training", LABEL, now)
                self._outbox.train(task)
            outcome = run.round.outcome(now)
            if outcome == "wait":
                describe = partial(run.round.wait, progress=self._fleet.progress)
                told = self._note_wait("updates", describe, now)
                return min(run.round.next_look(now), self._resend_at, told)
            if outcome == "close":
                self._close_round(run, now)
            else:
                self._abandon_round(run, now)
        return float("inf")

    def on_link(self, link: Link) -> None:
        """The hub's own link came up or died; gathering begins anew when it is up again."""
        if link.is_up and self._no_link and self.run is not None:
            self.run.gathering_since = None
        self._no_link = "" if link.is_up else f"the hub's link is down: {link.reason or 'lost'}"
        self._no_link_until = float("-inf")

    def _open_round(self, run: ActiveRun, now: float) -> bool:
        """Open the next round if enough devices are there, or the wait for them is over."""
        policy, candidates = run.plan.policy, self._fleet.candidates
        there = len(candidates.names)
        if run.gathering_since is None:
            run.gathering_since = now
        waited_enough = now >= run.gathering_since + policy.gather_s
        if not self._are_enough(run, there) and not (waited_enough and there >= policy.quorum):
            if waited_enough:
                self._gather_again(run, there, now)
            return False
        selection = self._select(candidates, policy.wanted, run.number + 1, run.rng())
        able = len(selection.chosen)
        if not able or (able < policy.quorum and not waited_enough):
            # Too few of those that are there can take part now; that may change.
            if waited_enough:
                self._gather_again(run, able, now)
            return False
        excluded, unnamed = self._excluded(selection)
        levels = {name: self._fleet.level(name) for name in selection.chosen}
        planned = selection.planned
        opened = run.open_round(levels, now, paces=planned.paces if planned else NO_PACES)
        self._outbox.note(
            RoundOpened(
                run=run.plan.name,
                round=run.number,
                base=run.content.digest,
                deadline=opened.deadline,
                attempts=tuple(opened.attempts.values()),
                excluded=excluded,
                unnamed=unnamed,
                planned=planned,
                at=now,
            )
        )
        self._resend_at = float("inf")
        self._changes.clear()
        self._standing_in.forget()
        for entry in opened.attempts.values():
            self.assign(entry, now)
        return True

    def _excluded(self, selection: Selection) -> tuple[dict[str, str], dict[str, int]]:
        """Who is not asked and why: by name, or in a large fleet by how many for each reason."""
        fleet, chosen = self._fleet, set(selection.chosen)
        absent = islice(fleet.others, MAX_NAMED)
        named = {name: fleet.why_not(name) for name in absent} | selection.excluded
        if len(fleet) <= MAX_NAMED:
            rest = (n for n in fleet.candidates.names if n not in chosen and n not in named)
            return named | dict.fromkeys(rest, selection.otherwise), {}
        left = len(fleet) - len(chosen) - len(named)
        return named, {selection.otherwise: left} if left else {}

    def _are_enough(self, run: ActiveRun, there: int) -> bool:
        """Whether a round may open at once: devices busy with a late update are not waited for."""
        policy = run.plan.policy
        busy = len(self._fleet.busy)
        return there >= policy.wanted or (
            there >= policy.devices_per_round and there + busy >= policy.wanted
        )

    def _gather_again(self, run: ActiveRun, there: int, now: float) -> None:
        # Nobody was asked, so no round number is spent; the count keeps a run from waiting on.
        policy = run.plan.policy
        run.abandoned_in_a_row += 1
        # However impatient the plan, gathering again takes at least a second.
        run.gathering_since = now + max(policy.gather_s, 1.0) - policy.gather_s
        self._waits_for = ("", 0, "")
        if run.abandoned_in_a_row > policy.max_abandoned:
            reason = f"{there} devices after {policy.gather_s:g} s, quorum is {policy.quorum}"
            self.end("failed", f"{reason}: {run.abandoned_in_a_row} times in a row", now)

    def _wait_for_devices(self, run: ActiveRun, now: float) -> float:
        policy = run.plan.policy
        until = policy.gather_s + (now if run.gathering_since is None else run.gathering_since)

        def describe(_: float) -> Wait:
            there = len(self._fleet.candidates.names)
            reason = f"{there} of {policy.wanted} devices are there, quorum is {policy.quorum}"
            return Wait("devices", reason, until)

        return min(until, self._note_wait("devices", describe, now))

    def _wait_for_link(self, run: ActiveRun, now: float) -> float:
        """Wait for the hub's own link, and say so anew whenever the time told has passed."""
        if now >= self._no_link_until:
            self._no_link_until = now + max(run.plan.policy.gather_s, 1.0)
            self._waits_for = ("", 0, "")
        wait = Wait("link", self._no_link, self._no_link_until)
        return min(self._no_link_until, self._note_wait("link", lambda _: wait, now))

    def _close_round(self, run: ActiveRun, now: float) -> None:
        self.cancel_rest(f"round {run.number} has closed", now)
        devices, report = run.contributors, run.report()
        run.close_round()
        self._outbox.note(
            RoundClosed(
                run=run.plan.name,
                round=run.number,
                content=run.content,
                model=run.model,
                memory=run.memory,
                devices=devices,
                report=report,
                bytes_up=run.bytes_up,
                bytes_down=run.bytes_down,
                at=now,
            )
        )

    def _abandon_round(self, run: ActiveRun, now: float) -> None:
        reason = run.round.why_abandoned(now) if run.round is not None else ""
        self.cancel_rest(f"round {run.number} was abandoned", now)
        run.abandon_round()
        self._outbox.note(
            RoundAbandoned(run=run.plan.name, round=run.number, reason=reason, at=now)
        )
        # Without its link the hub could hear nobody: that fails no run that has rounds to come.
        is_excused = bool(self._no_link) and run.number < run.plan.rounds
        if run.abandoned_in_a_row > run.plan.policy.max_abandoned and not is_excused:
            self.end("failed", f"{run.abandoned_in_a_row} rounds in a row: {reason}", now)

    def end(
        self, status: Literal["finished", "failed", "stopped"], reason: str, now: float
    ) -> None:
        """End the active run and call everybody off: there is no later round to count in."""
        run = self.run
        if run is None:
            return
        told = f"the run is over: {reason}"
        self.cancel_rest(told, now, everybody=True)
        self._outbox.note(RunEnded(run=run.plan.name, status=status, reason=reason, at=now))
        for device, task in self._fleet.busy:
            self._outbox.say(m.Cancel(attempt=task, reason=told), device)
            self._fleet.free(device, task)
        self.run = None

    def assign(self, entry: Attempt, now: float) -> None:
        """Ask a device to take its part in the open round."""
        run = self.run
        if run is None or run.round is None:
            return
        late_s = LATE_DEADLINES * run.plan.policy.deadline_s
        assignment = run.assignment(entry, late_s if run.keeps_late else run.round.deadline - now)
        if assignment.inline is not None:
            run.bytes_down += len(assignment.inline)
        self._fleet.employ(entry.device, entry.attempt)
        self._outbox.say(assignment, entry.device)
        self._resend_at = min(self._resend_at, now + RESEND_S)

    def resend(self, now: float) -> None:
        """Send assignments again that no device has answered: the first may have been lost."""
        if now < self._resend_at:
            return
        self._resend_at = float("inf")
        if self.run is None or self.run.round is None:
            return
        for entry in self.run.round.attempts.values():
            if entry.status == "assigned" and self._fleet.is_there(entry.device):
                self.assign(entry, now)

    def cancel_rest(self, reason: str, now: float, *, everybody: bool = False) -> None:
        """Call off what is still open, but not those whose late update may count: they finish."""
        run = self.run
        if run is None or run.round is None:
            return
        spares = run.keeps_late and not everybody and run.number < run.plan.rounds
        for entry in run.round.missing(now):
            if spares and entry.status != "assigned":
                continue
            self.mark(entry.attempt, "cancelled", reason, now)
            self._outbox.say(m.Cancel(attempt=entry.attempt, reason=reason), entry.device)

    def open_attempts(self, device: str) -> list[Attempt]:
        """The device's part in the open round, if it is still waited for; at most one."""
        if self.run is None or self.run.round is None:
            return []
        attempt = attempt_id(self.run.plan.name, self.run.number, device)
        entry = self.run.round.attempts.get(attempt)
        return [entry] if entry is not None and entry.status in OPEN | {"lost"} else []

    def restart(self, now: float) -> None:
        """The hub has restarted: the devices of the open round are lost until heard of again."""
        run = self.run
        if run is not None and run.round is not None:
            for entry in run.round.restart(now):
                self._note_change(run.plan.name, run.number, entry, now)

    def mark(self, attempt: str, status: Status, reason: str, now: float) -> None:
        """Note what became of an attempt, where it is of the open round and that is news."""
        parsed = parse_attempt(attempt)
        if parsed is None:
            return
        run, number, device = parsed
        if status not in OPEN:
            self._fleet.free(device, attempt)
        opened = self.run.round if self.run is not None else None
        if opened is not None and opened.mark(attempt, status, reason, now):
            self._note_change(run, number, opened.attempts[attempt], now)

    def _note_change(self, run: str, number: int, entry: Attempt, now: float) -> None:
        self._changes[entry.attempt] += 1
        if self._changes[entry.attempt] > MAX_CHANGES:
            return
        self._outbox.note(
            AttemptChanged(
                run=run,
                round=number,
                attempt=entry.attempt,
                device=entry.device,
                status=entry.status,
                reason=entry.reason,
                at=now,
            )
        )

    def _note_wait(self, name: str, describe: Callable[[float], Wait], now: float) -> float:
        """Record what is waited for where that changed; when to look again otherwise.

        Describing costs time that grows with the number of devices, so it is done once when
        a wait begins and then at most every `WAIT_RECORD_S`.
        """
        run = self.run
        if run is None:
            return float("inf")
        begun = (run.plan.name, run.number, name)
        if begun == self._waits_for and now < self._told_at + WAIT_RECORD_S:
            return self._told_at + WAIT_RECORD_S
        wait = describe(now)
        if begun == self._waits_for and wait.reason == self._told:
            return float("inf")
        self._waits_for, self._told, self._told_at = begun, wait.reason, now
        self._outbox.note(
            Waiting(
                run=run.plan.name,
                round=run.number,
                name=wait.name,
                reason=wait.reason,
                until=wait.until,
                at=now,
            )
        )
        return float("inf")
