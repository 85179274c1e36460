"""Folds the hub's log into twins: each event in order, each exactly once, nothing from the future.

A forecast is made where the log says that a round opened, from what the events before it had
told. So what twins say, and how well they did, follows from the log alone, however late it is
read, and reading it again from the beginning gives the same twins.
"""

import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
from sqlalchemy.exc import SQLAlchemyError

from cloud.config import RunPlan
from cloud.record.queries import EventRow
from cloud.twins.judging import Part, family_of, settle, work_of
from federation.errors import TwinError
from federation.protocol.messages import Capability, Report
from twin.availability import observed
from twin.forecast import forecast, power_of
from twin.merging import JsonObject, difference, merge_patch
from twin.model import Trial, TwinModel, is_cold
from twin.shadow import Change, Edit, Shadow, Source, write

SAID = frozenset({"settings", "energy"})
"""Features that a device says of itself in a `ReportedState`; it has all of them each time."""

_log = logging.getLogger("headwater.twins")

Key = tuple[str, int, str]
"""Run, round and device."""


class Desk(Protocol):
    """Where the fold finds what it begins from."""

    def twin(self, device: str) -> tuple[Shadow, TwinModel] | None:
        """The twin of a device, as it was before this page of the log."""
        ...

    def plan(self, run: str) -> RunPlan | None:
        """What was asked for under this name."""
        ...

    def size(self, digest: str) -> int:
        """The bytes of a model; 0 where it is not known."""
        ...

    def part(self, key: Key) -> Part | None:
        """A device's part in a round, if it was open before this page."""
        ...

    def open_parts(self, run: str, number: int) -> list[Key]:
        """The parts of a round that were open before this page."""
        ...


@dataclass
class Fold:
    """One page of the log on its way into the twins. Afterwards the fields say what to write."""

    desk: Desk
    fleet: TwinModel
    shadows: dict[str, Shadow] = field(default_factory=dict)
    models: dict[str, TwinModel] = field(default_factory=dict)
    changes: list[tuple[Change, Shadow]] = field(default_factory=list)
    parts: dict[Key, Part] = field(default_factory=dict)

    def take(self, event: EventRow) -> None:
        """Fold one event in; those that tell nothing of a device are passed over."""
        handler = _HANDLERS.get(event.kind)
        if handler is None:
            return
        try:
            handler(self, event)
        except SQLAlchemyError:
            raise  # The page is folded again once the database answers.
        except Exception as error:  # outermost: one entry shall not keep all twins from the rest
            # Another version wrote it, or it was cut, or its figures cannot be.
            _log.warning("event %d of kind %s left out: %r", event.id, event.kind, error)

    def is_known(self, device: str) -> bool:
        """Whether there is a twin of this device; it is then in `shadows` and `models`."""
        if device in self.shadows:
            return True
        found = self.desk.twin(device)
        if found is None:
            return False
        self.shadows[device], self.models[device] = found
        return True

    def is_changed(self, device: str) -> bool:
        """Whether this page of the log says anything new of the device."""
        before = self.desk.twin(device)
        # All records are frozen: what is the same object is as it was.
        return (
            before is None
            or before[0] is not self.shadows[device]
            or before[1] is not self.models[device]
        )

    def report(self, event: EventRow, patch: JsonObject, source: Source, cause: str) -> None:
        """Write what a device reported into its shadow."""
        edit = Edit(
            writer="device",
            part="reported",
            patch=patch,
            actor=event.device,
            cause=cause,
            received_at=event.at,
            source=source,
        )
        self.shadows[event.device], change = write(self.shadows[event.device], edit)
        if change is not None:
            self.changes.append((change, self.shadows[event.device]))

    def update(self, device: str, **values: Any) -> None:
        """Change some of what is estimated of a device."""
        self.models[device] = msgspec.structs.replace(self.models[device], **values)

    def part(self, key: Key) -> Part | None:
        """A part that is still open."""
        found = self.parts.get(key) or self.desk.part(key)
        return found if found is not None and found.outcome is None else None

    def see(self, key: Key, **moments: Any) -> None:
        """Note what was seen of a part that is open."""
        part = self.part(key)
        if part is not None:
            trial = msgspec.structs.replace(part.trial, **moments)
            self.parts[key] = msgspec.structs.replace(part, trial=trial)

    def end(self, key: Key, outcome: str, at: float) -> None:
        """End a part so, learn from it, and judge what was forecast of it."""
        part = self.part(key)
        if part is None or not self.is_known(key[2]):
            return
        self.parts[key] = msgspec.structs.replace(part, outcome=outcome)
        model = self.models[key[2]]
        self.models[key[2]], self.fleet = settle(model, self.fleet, self.parts[key], at)

    def open_keys(self, run: str, number: int) -> list[Key]:
        """The parts of a round that are open, in device order."""
        keys = {key for key in self.parts if key[:2] == (run, number)}
        keys |= set(self.desk.open_parts(run, number))
        return sorted(key for key in keys if self.part(key) is not None)


# Devices ----------------------------------------------------------------------------------


def _born(fold: Fold, event: EventRow) -> None:
    capability = msgspec.convert(event.detail["capability"], Capability)
    if not fold.is_known(event.device):
        fold.shadows[event.device] = Shadow(
            device=event.device, created_at=event.at, modified_at=event.at
        )
        fold.models[event.device] = TwinModel()
    hardware = msgspec.json.decode(msgspec.json.encode(capability))
    connection = {"state": "ready", "epoch": event.detail.get("epoch", 0)}
    fold.report(event, {"hardware": hardware, "connection": connection}, "configured", "birth")
    seen = observed(fold.models[event.device].availability, event.at, is_there=True)
    fold.update(event.device, availability=seen, memory_mb=capability.memory_mb)


def _presence(fold: Fold, event: EventRow) -> None:
    if not fold.is_known(event.device):
        return
    state = event.detail.get("state")
    connection = {"state": state, "epoch": event.detail.get("epoch", 0)}
    fold.report(event, {"connection": connection}, "measured", "presence")
    known = fold.models[event.device]
    restarted = known.was_restarted
    if state == "disconnected":
        restarted = True  # It said goodbye: its program ended.
    elif state == "lost" and not restarted:
        restarted = None
    seen = observed(known.availability, event.at, is_there=state == "ready")
    fold.update(event.device, availability=seen, was_restarted=restarted)


def _reported(fold: Fold, event: EventRow) -> None:
    """The full state as the device has it: what it no longer says is no longer so."""
    if not fold.is_known(event.device):
        return
    detail = event.detail
    said = {key: value for key, value in detail.get("document", {}).items() if key in SAID}
    said["applied"] = {"version": detail.get("applied", 0), "results": detail.get("results", {})}
    known = fold.shadows[event.device].reported.state
    before = {key: value for key, value in known.items() if key in SAID or key == "applied"}
    # What is repeated goes into the patch as well, so that it is young again.
    patch = merge_patch(difference(before, said), said)
    with contextlib.suppress(TwinError):  # What cannot be kept is not; the log has it.
        fold.report(event, patch, "configured", "said")


# Rounds -----------------------------------------------------------------------------------


def _opened(fold: Fold, event: EventRow) -> None:
    plan = fold.desk.plan(event.run)
    if plan is None:
        return
    deadline_s = event.detail["deadline"] - event.at
    size = fold.desk.size(event.detail["base"])
    for device in event.detail["attempts"]:
        if not fold.is_known(device):
            continue
        model = fold.models[device]
        work = work_of(plan, size, deadline_s, fold.shadows[device])
        cold = is_cold(model, event.at)
        power = power_of(fold.shadows[device].reported.state)
        said = forecast(model, fold.fleet, work, event.at, is_cold=cold, power=power)
        fold.parts[event.run, event.round, device] = Part(
            trial=Trial(work=work, asked_at=event.at, is_cold=cold), forecast=said
        )


def _changed(fold: Fold, event: EventRow) -> None:
    key, status = (event.run, event.round, event.device), event.detail["status"]
    part = fold.part(key)
    if part is None:
        return
    moments: dict[str, Any] = {"status": status}
    if status in ("accepted", "training") and part.trial.accepted_at is None:
        moments["accepted_at"] = event.at
    if status == "training" and part.trial.training_at is None:
        moments["training_at"] = event.at
    if status == "lost":
        moments["is_whole"] = False
    fold.see(key, **moments)
    if status in ("declined", "failed"):
        fold.end(key, status, event.at)


def _accepted(fold: Fold, event: EventRow) -> None:
    key = (event.run, event.round, event.device)
    report = msgspec.convert(event.detail["report"], Report)
    fold.see(
        key,
        status="received",
        opened_at=event.detail.get("opened_at"),
        received_at=event.at,
        up_bytes=event.detail["content"]["size"],
        samples=report.samples,
        seconds=report.seconds,
    )
    is_late = event.detail["counts_in"] != event.round
    fold.end(key, "late" if is_late else "received", event.at)
    if fold.is_known(event.device):
        plan = fold.desk.plan(event.run)
        family = family_of(plan, fold.shadows[event.device]) if plan is not None else ""
        # What it took differs each time: that is the model's matter, and no change of the shadow.
        said = {"training": {"samples": report.samples, "steps": report.steps, "family": family}}
        fold.report(event, said, "measured", f"{event.run} round {event.round}")


def _refused(fold: Fold, event: EventRow) -> None:
    run, _, rest = event.detail["attempt"].partition("_")
    number, _, device = rest.partition("_")
    if device == event.device and number.isdecimal():
        is_late = event.detail.get("verdict") == "too-late"
        fold.end((run, int(number), device), "late" if is_late else "refused", event.at)


def _ended(fold: Fold, event: EventRow) -> None:
    for key in fold.open_keys(event.run, event.round):
        part = fold.part(key)
        if part is None:
            continue
        is_over = event.at >= part.trial.asked_at + part.trial.work.deadline_s - 1e-3
        silent = {"lost": "lost", "assigned": "silent" if is_over else "spared"}
        usual = "late" if is_over else "spared"
        fold.end(key, silent.get(part.trial.status, usual), event.at)


_HANDLERS: Mapping[str, Callable[[Fold, EventRow], None]] = {
    "device-born": _born,
    "presence-changed": _presence,
    "device-reported": _reported,
    "round-opened": _opened,
    "attempt-changed": _changed,
    "update-accepted": _accepted,
    "update-refused": _refused,
    "round-closed": _ended,
    "round-abandoned": _ended,
}
