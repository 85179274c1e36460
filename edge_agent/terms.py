"""On what terms a device takes part: what it can do, and what the hub desires of it.

The hub's wishes are a document of known keys (`federation.protocol.wishes`). What cannot be
obeyed is answered so, and the rest is obeyed all the same. They outlive a power loss, with the
bytes of the day where those are bounded.
"""

import math
from typing import Any

from edge_agent.facts import AgentFact, WishKept
from federation.errors import TransferError
from federation.protocol.effects import Effect, Record, Send
from federation.protocol.messages import Assignment, Capability
from federation.protocol.mirror import MIRROR
from federation.protocol.transfer import check_content
from federation.protocol.wishes import (
    APPLIED,
    DAY_S,
    REJECTED,
    UNSUPPORTED,
    DesiredState,
    ReportedState,
    is_within,
    objection_to,
)

MAX_RESULTS = 64
"""It is said of so many keys what became of them; a sane document has fewer."""

NEVER_TOLD = WishKept(epoch=-1, version=0, document={})

Effects = list[Effect[AgentFact]]


class Terms:
    """The terms of one device. `kept` is what its journal has of the hub's wishes.

    `heartbeat_s` and `energy`, what the device draws, are as its owner set them up.
    """

    def __init__(
        self,
        capability: Capability,
        kept: WishKept | None,
        heartbeat_s: float,
        energy: dict[str, float] | None = None,
    ) -> None:
        self.capability = capability
        self._own_heartbeat_s = heartbeat_s
        self._energy = energy or {}
        self._kept = kept or NEVER_TOLD
        self._update_bytes = 0

    @property
    def heartbeat_s(self) -> float:
        """Seconds between two signs of life: the hub's wish, else as its owner set it up."""
        return float(self._obeyed.get("heartbeat_s", self._own_heartbeat_s))

    @property
    def has_something_to_say(self) -> bool:
        """Whether there is more to report than a birth tells."""
        return bool(self._kept.version or self._energy)

    def objection(self, letter: Assignment, now: float) -> str:
        """Why this device cannot take an assignment, or may not; empty where it can."""
        if not self.capability.trains:
            return "this device does not train, it only infers"
        if letter.plan.method == MIRROR and not self.capability.mirrors:
            return "the owner of this device does not let its data be mirrored"
        if not (math.isfinite(letter.deadline_s) and letter.deadline_s >= 0.0):
            return f"the deadline is in {letter.deadline_s} s; expected seconds from 0 on"
        pace = letter.plan.uplink.pace
        if not (math.isfinite(pace) and pace >= 0.0):
            return f"the pace is {pace} bytes a second; expected 0 (none) or more"
        try:
            check_content(letter.base)
        except TransferError as error:
            return str(error)
        return self._prohibition(letter, now)

    def obey(self, letter: DesiredState, epoch: int, device: str) -> Effects:
        """Take the wishes of a hub's epoch over, where they are newer, and say what is in effect.

        A hub that lost its record counts its versions anew, but not its epochs.
        """
        out: Effects = []
        if (epoch, letter.version) > (self._kept.epoch, self._kept.version):
            before = self._kept
            self._kept = WishKept(
                epoch=epoch,
                version=letter.version,
                document=letter.document,
                day=before.day,
                bytes_today=before.bytes_today,
            )
            out.append(Record(self._kept))
        return [*out, Send(self.report(), device)]

    def report(self) -> ReportedState:
        """All that is to be said of how this device is set up."""
        obeyed = self._obeyed
        settings: dict[str, Any] = {"enabled": True, "heartbeat_s": self._own_heartbeat_s}
        document: dict[str, Any] = {"settings": settings | obeyed}
        if self._energy:
            document["energy"] = dict(self._energy)
        results = {
            key: _result(key, value)
            for key, value in list(self._kept.document.items())[:MAX_RESULTS]
        }
        return ReportedState(applied=self._kept.version, results=results, document=document)

    def spend(self, base_bytes: int, update_bytes: int, now: float) -> Effects:
        """Note what a training cost in bytes; it is written down only where they are bounded."""
        self._update_bytes = update_bytes
        if "max_bytes_per_day" not in self._obeyed:
            return []
        spent = self._spent_today(now) + base_bytes + update_bytes
        kept = self._kept
        self._kept = WishKept(
            epoch=kept.epoch,
            version=kept.version,
            document=kept.document,
            day=_day(now),
            bytes_today=spent,
        )
        return [Record(self._kept)]

    @property
    def _obeyed(self) -> dict[str, Any]:
        return {
            key: value
            for key, value in self._kept.document.items()
            if objection_to(key, value) == ""
        }

    def _prohibition(self, letter: Assignment, now: float) -> str:
        """Which of the hub's wishes forbids it; empty where none does."""
        obeyed = self._obeyed
        if not obeyed.get("enabled", True):
            return "the hub desires that this device does not train: enabled is false"
        hours = obeyed.get("allowed_hours")
        if hours is not None and not is_within((hours[0], hours[1]), now):
            return f"it is outside of the allowed hours, {hours[0]:g} to {hours[1]:g} h UTC"
        most = obeyed.get("max_bytes_per_day")
        expected = letter.base.size + (self._update_bytes or letter.base.size)
        if most is not None and self._spent_today(now) + expected > most:
            return (
                f"{self._spent_today(now)} bytes went today and some {expected} are needed; "
                f"at most {most} a day are desired"
            )
        return ""

    def _spent_today(self, now: float) -> int:
        return self._kept.bytes_today if self._kept.day == _day(now) else 0


def _result(key: str, value: Any) -> str:
    why = objection_to(key, value)
    if why is None:
        return UNSUPPORTED
    return f"{REJECTED}: {why}" if why else APPLIED


def _day(now: float) -> int:
    return int(now // DAY_S)
