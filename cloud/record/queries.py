"""What people ask of the record: small frozen results. Encode them with `enc_hook=str`.

Times are seconds of the hub's clock; accuracies are shares between 0 and 1, absent (None)
where nothing was measured.
"""

from typing import Any, Literal

import msgspec
from sqlalchemy import Connection, Row, func, select

from cloud.config import RunPlan
from cloud.coordination.rounds import Wait
from cloud.record import tables as t
from cloud.record.registry import ManifestEntry
from federation.errors import ConfigError
from federation.protocol.messages import Capability, Report

RunState = Literal["requested", "active", "finished", "failed", "stopped"]


class EvaluationRow(msgspec.Struct, frozen=True, kw_only=True):
    """What a round's model was measured to be on the data set `name`.

    `loss_sum` is None where the loss was not a number.
    """

    round: int
    name: str
    correct: int
    loss_sum: float | None
    samples: int

    @property
    def accuracy(self) -> float | None:
        """The share of samples it got right."""
        return self.correct / self.samples if self.samples else None


class RunStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How a run stands.

    `round` is the newest round, 0 before the first. `wait` is what it waits for now. Bytes are
    counted from the run's beginning to its last closed round.
    """

    plan: RunPlan
    status: RunState
    reason: str
    round: int
    is_open: bool
    wait: Wait | None
    evaluations: tuple[EvaluationRow, ...]
    bytes_up: int
    bytes_down: int
    opened_at: float | None
    ended_at: float | None

    @property
    def accuracy(self) -> float | None:
        """The newest measured accuracy."""
        return self.evaluations[-1].accuracy if self.evaluations else None


class RoundRow(msgspec.Struct, frozen=True, kw_only=True):
    """One round. `devices` are those that count; bytes are from the run's beginning.

    `report` has the sums of what the devices said of their own training data.
    """

    run: str
    number: int
    status: Literal["open", "closed", "abandoned"]
    reason: str
    base: str
    model: str | None
    deadline: float
    opened_at: float
    ended_at: float | None
    asked: int
    received: int
    excluded: int
    devices: tuple[str, ...]
    report: Report | None
    bytes_up: int | None
    bytes_down: int | None
    evaluations: tuple[EvaluationRow, ...]


class DeviceRow(msgspec.Struct, frozen=True, kw_only=True):
    """One device as the record has it; `task` is its part in the open round, if it has one."""

    device: str
    epoch: int
    state: str
    capability: Capability
    born_at: float
    changed_at: float
    task: str | None
    task_status: str | None
    task_reason: str | None


class AttemptRow(msgspec.Struct, frozen=True, kw_only=True):
    """One device's part in a round, and what became of its update."""

    attempt: str
    run: str
    round: int
    device: str
    status: str
    reason: str
    changed_at: float
    verdict: str | None
    counts_in: int | None
    report: Report | None


class EventRow(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the log; `kind` is the fact's name in lower case with hyphens."""

    id: int
    at: float
    kind: str
    run: str
    round: int
    device: str
    detail: dict[str, Any]


def runs(connection: Connection, name: str | None = None) -> list[RunStatus]:
    """All runs, or the one of this name, in the order they were asked for."""
    chosen = select(t.Run).order_by(t.Run.id)
    if name is not None:
        chosen = chosen.where(t.Run.name == name)
    return [_run_status(connection, row) for row in connection.execute(chosen).all()]


def run_status(connection: Connection, run: str) -> RunStatus:
    """How this run stands; ConfigError where there is none of this name."""
    found = runs(connection, run)
    if not found:
        raise unknown_run(connection, run)
    return found[0]


def unknown_run(connection: Connection, run: str) -> ConfigError:
    """The error that says which runs there are."""
    names = connection.scalars(select(t.Run.name).order_by(t.Run.id.desc()).limit(8)).all()
    known = f"there are {', '.join(sorted(names))}" if names else "no run was ever started"
    return ConfigError(f"no run {run[:80]!r}; {known}: check the name")


def _run_status(connection: Connection, row: Row[t.Run]) -> RunStatus:
    last = connection.execute(
        select(t.Round.number, t.Round.status)
        .where(t.Round.run == row.name)
        .order_by(t.Round.number.desc())
        .limit(1)
    ).one_or_none()
    wait = Wait(row.wait_name, row.wait_reason, row.wait_until) if row.wait_name else None
    return RunStatus(
        plan=row.plan,
        status=row.status,
        reason=row.reason,
        round=last.number if last is not None else 0,
        is_open=last is not None and last.status == "open",
        wait=wait,
        evaluations=_evaluations(connection, row.name),
        bytes_up=row.bytes_up,
        bytes_down=row.bytes_down,
        opened_at=row.opened_at,
        ended_at=row.ended_at,
    )


def _evaluations(connection: Connection, run: str) -> tuple[EvaluationRow, ...]:
    rows = connection.execute(
        select(
            t.Evaluation.round,
            t.Evaluation.name,
            t.Evaluation.correct,
            t.Evaluation.loss_sum,
            t.Evaluation.samples,
        )
        .where(t.Evaluation.run == run)
        .order_by(t.Evaluation.round, t.Evaluation.name)
    )
    return tuple(EvaluationRow(**row._asdict()) for row in rows)


def rounds(connection: Connection, run: str) -> list[RoundRow]:
    """The rounds of a run, in order."""
    parts = (
        select(
            t.Attempt.round,
            func.count().label("asked"),
            func.count(t.Update.attempt).label("received"),
        )
        .outerjoin(t.Update, t.Update.attempt == t.Attempt.attempt)
        .where(t.Attempt.run == run)
        .group_by(t.Attempt.round)
    )
    counts = {row.round: row for row in connection.execute(parts)}
    measured: dict[int, list[EvaluationRow]] = {}
    for entry in _evaluations(connection, run):
        measured.setdefault(entry.round, []).append(entry)
    chosen = select(t.Round).where(t.Round.run == run).order_by(t.Round.number)
    found = []
    for row in connection.execute(chosen):
        said = row._asdict()
        count = counts.get(row.number)
        said |= {
            "excluded": len(row.excluded),
            "devices": row.devices or (),
            "asked": count.asked if count else 0,
            "received": count.received if count else 0,
            "evaluations": tuple(measured.get(row.number, ())),
        }
        found.append(RoundRow(**said))
    return found


def devices(connection: Connection) -> list[DeviceRow]:
    """All devices by name, each with its part in a round that is open now."""
    tasks = (
        select(t.Attempt.device, t.Attempt.attempt, t.Attempt.status, t.Attempt.reason)
        .join(t.Round, (t.Round.run == t.Attempt.run) & (t.Round.number == t.Attempt.round))
        .join(t.Run, t.Run.name == t.Round.run)
        .where(t.Round.status == "open", t.Run.status == "active")
    )
    open_tasks = {row.device: row for row in connection.execute(tasks)}
    found = []
    for row in connection.execute(select(t.Device).order_by(t.Device.device)):
        task = open_tasks.get(row.device)
        found.append(
            DeviceRow(
                **row._asdict(),
                task=task.attempt if task else None,
                task_status=task.status if task else None,
                task_reason=task.reason if task else None,
            )
        )
    return found


def attempts(connection: Connection, run: str, number: int) -> list[AttemptRow]:
    """Who was asked in a round and what became of it, in device order."""
    rows = connection.execute(
        select(
            t.Attempt.attempt,
            t.Attempt.run,
            t.Attempt.round,
            t.Attempt.device,
            t.Attempt.status,
            t.Attempt.reason,
            t.Attempt.changed_at,
            t.Attempt.verdict,
            t.Update.counts_in,
            t.Update.report,
        )
        .outerjoin(t.Update, t.Update.attempt == t.Attempt.attempt)
        .where(t.Attempt.run == run, t.Attempt.round == number)
        .order_by(t.Attempt.device)
    )
    return [AttemptRow(**row._asdict()) for row in rows]


def excluded(connection: Connection, run: str, number: int) -> dict[str, str]:
    """Who was not asked in a round, and why; by device."""
    found = connection.scalar(
        select(t.Round.excluded).where(t.Round.run == run, t.Round.number == number)
    )
    return found or {}


def events(connection: Connection, run: str | None, after_id: int, limit: int) -> list[EventRow]:
    """The log in order, from the entry after `after_id` on; of one run, or all of it."""
    chosen = select(t.Event).where(t.Event.id > after_id).order_by(t.Event.id).limit(limit)
    if run is not None:
        chosen = chosen.where(t.Event.run == run)
    return [EventRow(**row._asdict()) for row in connection.execute(chosen)]


def manifest(connection: Connection, run: str) -> list[ManifestEntry]:
    """What the rounds of a run gave, for the registry to say beside its files."""
    sizes = dict(connection.execute(select(t.Model.digest, t.Model.size)).all())
    found: dict[int, dict[str, Any]] = {}
    begun = select(t.Round.base, t.Round.opened_at).where(t.Round.run == run, t.Round.number == 1)
    for base, at in connection.execute(begun):
        if base in sizes:
            found[0] = {"weights": base, "weights_bytes": sizes[base], "at": at}
    closed = select(t.Round.number, t.Round.model, t.Round.ended_at).where(
        t.Round.run == run, t.Round.status == "closed"
    )
    for row in connection.execute(closed):
        size = sizes[row.model or ""]
        found[row.number] = {"weights": row.model, "weights_bytes": size, "at": row.ended_at}
    released = select(t.Release.round, t.Release.digest, t.Release.size, t.Release.at)
    for release in connection.execute(released.where(t.Release.run == run)):
        entry = found.setdefault(release.round, {"at": release.at})
        entry |= {"onnx": release.digest, "onnx_bytes": release.size}
    return [ManifestEntry(round=number, **found[number]) for number in sorted(found)]


def models(connection: Connection) -> set[str]:
    """The digests of all model files the record refers to."""
    return set(connection.scalars(select(t.Model.digest)))
