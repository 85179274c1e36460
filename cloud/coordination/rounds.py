"""One round: who was asked, what became of it, and when it is settled. Pure; time is an argument.

A round never waits for ever: each wait has a name, a deadline and a reason, and `Round.wait`
says them. Absent is never zero: a device that did not answer has no vote (semantics 1).
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import msgspec

from federation.errors import ConfigError
from federation.protocol.messages import Report

Status = Literal[
    "assigned",
    "accepted",
    "training",
    "received",
    "declined",
    "failed",
    "lost",
    "refused",
    "cancelled",
]
"""What became of an attempt. The first three, and `lost` within its grace, are still waited for."""

OPEN: frozenset[Status] = frozenset({"assigned", "accepted", "training"})


class RoundPolicy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many devices a round asks, how few it accepts, and how long it waits.

    `over_selection` asks that many times `devices_per_round` and closes the round as soon as
    `devices_per_round` updates are in. `quorum` is the least number of updates worth a new
    model. `gather_s` is how long a round waits for enough devices to be there before it makes
    do with a quorum, `deadline_s` how long it waits for updates, `lost_grace_s` how long a
    device whose link died is still waited for. `late` says what happens to an update of a
    round that is over: it is dropped, or kept and weighed by its age in the round then open,
    where the method allows that. After `max_abandoned` rounds in a row without a quorum the
    run fails.
    """

    devices_per_round: int
    quorum: int = 1
    over_selection: float = 1.0
    gather_s: float = 30.0
    deadline_s: float = 600.0
    lost_grace_s: float = 30.0
    late: Literal["drop", "keep"] = "drop"
    max_abandoned: int = 10

    def __post_init__(self) -> None:
        if not 1 <= self.quorum <= self.devices_per_round:
            raise ConfigError(
                f"policy.quorum is {self.quorum} and policy.devices_per_round is "
                f"{self.devices_per_round}; a quorum lies between 1 and devices_per_round"
            )
        if not 1.0 <= self.over_selection <= 10.0:
            raise ConfigError(
                f"policy.over_selection is {self.over_selection}; it lies between 1 and 10"
            )
        times = {name: getattr(self, name) for name in ("gather_s", "deadline_s", "lost_grace_s")}
        for name, time_s in times.items():
            # Without an end there would be waits for ever.
            if not 0 <= time_s < math.inf or (name == "deadline_s" and time_s == 0):
                raise ConfigError(
                    f"policy.{name} is {time_s}; it is in seconds, finite and not negative, and "
                    "a deadline is above 0: correct it"
                )
        if self.max_abandoned < 0:
            raise ConfigError(f"policy.max_abandoned is {self.max_abandoned}; it is 0 or more")

    @property
    def wanted(self) -> int:
        """How many devices a round asks."""
        return math.ceil(self.devices_per_round * self.over_selection)


@dataclass(frozen=True, slots=True)
class Wait:
    """Why nothing happens now: a name, a reason for people, and until when at the latest."""

    name: Literal["devices", "updates", "link", "nothing"]
    reason: str
    until: float


@dataclass(slots=True)
class Attempt:
    """One device's part in a round. `level` is what it could train when the round opened."""

    attempt: str
    device: str
    status: Status = "assigned"
    reason: str = ""
    lost_at: float = 0.0
    level: int = 0
    report: Report | None = None


class Round:
    """The open round: its attempts by id, and the rule that settles it.

    Asking whether it is settled costs nothing that grows with the number of devices.
    """

    def __init__(
        self, number: int, policy: RoundPolicy, deadline: float, attempts: Iterable[Attempt]
    ) -> None:
        self.number = number
        self.policy = policy
        self.deadline = deadline
        self.attempts = {entry.attempt: entry for entry in attempts}
        self._open = {a for a, entry in self.attempts.items() if entry.status in OPEN}
        self._lost = {a for a, entry in self.attempts.items() if entry.status == "lost"}
        self._received = {a for a, entry in self.attempts.items() if entry.status == "received"}

    def mark(self, attempt: str, status: Status, reason: str = "", now: float = 0.0) -> bool:
        """Note what became of an attempt; False where that changes nothing.

        An attempt that was received stays received, whatever is said of it later.
        """
        entry = self.attempts.get(attempt)
        if entry is None or entry.status in ("received", status):
            return False
        if (entry.status, status) == ("training", "accepted"):
            return False  # An assignment that was sent twice is accepted twice.
        entry.status, entry.reason = status, reason
        for held in (self._open, self._lost, self._received):
            held.discard(attempt)
        if status in OPEN:
            self._open.add(attempt)
        elif status == "lost":
            entry.lost_at = now
            self._lost.add(attempt)
        elif status == "received":
            self._received.add(attempt)
        return True

    def restart(self, now: float) -> list[Attempt]:
        """The hub has restarted: whoever is waited for is lost until heard of again; who that is.

        The deadline is never longer than the policy's, whatever the clock did meanwhile.
        """
        lost = []
        for entry in self.attempts.values():
            if entry.status in OPEN or entry.status == "lost":
                entry.status, entry.reason, entry.lost_at = "lost", "the hub has restarted", now
                self._open.discard(entry.attempt)
                self._lost.add(entry.attempt)
                lost.append(entry)
        self.deadline = min(self.deadline, now + self.policy.deadline_s)
        return lost

    def receive(self, attempt: str, report: Report) -> None:
        """The update of this attempt is in and counts."""
        self.mark(attempt, "received")
        self.attempts[attempt].report = report

    @property
    def received(self) -> list[Attempt]:
        """The attempts whose updates count, in device order."""
        return sorted((self.attempts[attempt] for attempt in self._received), key=_by_device)

    def dropped(self, now: float) -> list[Attempt]:
        """The attempts whose devices are lost beyond their grace, in device order."""
        gone = [a for a in self._lost if now >= self._grace_ends(a)]
        return sorted((self.attempts[attempt] for attempt in gone), key=_by_device)

    def missing(self, now: float) -> list[Attempt]:
        """The attempts still waited for, in device order: open ones, and lost ones in grace."""
        hoped = [a for a in self._lost if now < self._grace_ends(a)]
        return sorted((self.attempts[attempt] for attempt in [*self._open, *hoped]), key=_by_device)

    def outcome(self, now: float) -> Literal["wait", "close", "abandon"]:
        """Whether to go on waiting, to aggregate, or to give the round up."""
        got = len(self._received)
        if got >= self.policy.devices_per_round:
            return "close"
        hope = bool(self._open) or any(now < self._grace_ends(a) for a in self._lost)
        if hope and now < self.deadline:
            return "wait"
        return "close" if got >= self.policy.quorum else "abandon"

    def next_look(self, now: float) -> float:
        """When time alone may next change the outcome."""
        graces = [end for a in self._lost if (end := self._grace_ends(a)) > now]
        return min([self.deadline, *graces])

    def wait(self, now: float, progress: Callable[[str], float]) -> Wait:
        """What this round waits for, and until when at the latest.

        `progress` gives how far a device said that its training is, 0 to 1.
        """
        missing = self.missing(now)
        who = ", ".join(
            f"{entry.device} ({entry.status}{_percent(progress(entry.device))})"
            for entry in missing[:8]
        )
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        target = min(self.policy.devices_per_round, len(self.attempts))
        reason = f"{len(self._received)} of {target} updates are in; waiting for {who}{more}"
        return Wait("updates", reason, self.deadline)

    def why_abandoned(self, now: float) -> str:
        """The reason to record when a round is given up."""
        fates = Counter(entry.status for entry in self.attempts.values())
        told = ", ".join(f"{count} {status}" for status, count in sorted(fates.items()))
        when = "at the deadline" if now >= self.deadline else "with nobody left to wait for"
        return f"{len(self._received)} updates {when}, quorum is {self.policy.quorum} ({told})"

    def _grace_ends(self, attempt: str) -> float:
        return self.attempts[attempt].lost_at + self.policy.lost_grace_s


def _percent(share: float) -> str:
    return f" {share:.0%}" if share > 0 else ""


def _by_device(entry: Attempt) -> str:
    return entry.device
