"""How what devices say of their attempts changes the tables, for many attempts at once.

These facts are nearly all that a busy hub records, and those of different attempts do not meet:
so a whole batch takes a handful of statements, however many devices it is of.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, TypeAlias

from sqlalchemy import Connection, Executable, bindparam, func, select, update

from cloud.coordination import facts as f
from cloud.record import receiving
from cloud.record import tables as t
from cloud.record.database import insert_into
from cloud.record.events import bounded
from federation.errors import StoreError

Arrival: TypeAlias = f.AttemptChanged | f.ChunkStored | f.UpdateAccepted

MAX_AT_ONCE = 1000
"""So many facts share their statements: databases bound the parameters of one."""


def record_arrivals(connection: Connection, facts: Sequence[Arrival]) -> list[bool]:
    """Write these facts as if one after the other; which of them the log shall tell of.

    Raises:
        StoreError: an update that is to count with chunks missing.
    """
    told: list[bool] = []
    for begin in range(0, len(facts), MAX_AT_ONCE):
        told += _record_some(connection, facts[begin : begin + MAX_AT_ONCE])
    return told


def _record_some(connection: Connection, facts: Sequence[Arrival]) -> list[bool]:
    chunks = [fact for fact in facts if isinstance(fact, f.ChunkStored)]
    if chunks:
        receiving.store_chunks(connection, chunks)
    fresh = _accept(connection, [fact for fact in facts if isinstance(fact, f.UpdateAccepted)])
    rows = _rows_of(connection, facts)
    changed: dict[str, dict[str, Any]] = {}
    told = []
    for fact in facts:
        now_is: dict[str, Any] = {}
        match fact:
            case f.AttemptChanged():
                now_is = _changed(rows.get(fact.attempt, {}), fact)
            case f.UpdateAccepted() if fact.attempt in fresh:
                fresh.discard(fact.attempt)
                now_is = {"status": "received", "verdict": "stored"}
                now_is["reason"] = bounded(fact.stood_in)
                now_is["changed_at"] = fact.at
            case _:
                pass
        told.append(bool(now_is))
        if now_is and (row := rows.get(fact.attempt)) is not None:
            row |= now_is
            changed[fact.attempt] = row
    if changed:
        connection.execute(_change_of_attempts(), list(changed.values()))
    return told


def _rows_of(connection: Connection, facts: Sequence[Arrival]) -> dict[str, dict[str, Any]]:
    """The attempts' rows before these facts, as parameters of `_change_of_attempts`."""
    touched = {fact.attempt for fact in facts if not isinstance(fact, f.ChunkStored)}
    if not touched:
        return {}
    found = connection.execute(_attempts_named(), {"names": list(touched)})
    return {row.key: row._asdict() for row in found}


# Statements are built once: building one costs more than a database takes to carry it out.


@cache
def _attempts_named() -> Any:
    return select(
        t.Attempt.attempt.label("key"),
        t.Attempt.status,
        t.Attempt.reason,
        t.Attempt.lost_at,
        t.Attempt.changed_at,
        t.Attempt.verdict,
    ).where(t.Attempt.attempt.in_(bindparam("names", expanding=True)))


@cache
def _change_of_attempts() -> Executable:
    names = ("status", "reason", "lost_at", "changed_at", "verdict")
    this = t.Attempt.__table__.c.attempt == bindparam("key")
    return update(t.Attempt).where(this).values({name: bindparam(name) for name in names})


@cache
def _chunks_of_uploads() -> Any:
    named = t.Upload.attempt.in_(bindparam("names", expanding=True))
    return (
        select(t.Upload.attempt, t.Upload.digest, func.count())
        .join(t.Chunk, t.Chunk.attempt == t.Upload.attempt)
        .where(named)
        .group_by(t.Upload.attempt, t.Upload.digest)
    )


def _changed(row: dict[str, Any], fact: f.AttemptChanged) -> dict[str, Any]:
    # The rule of `Round.mark`: what was received stays received, the same again is nothing.
    if not row or row["status"] in ("received", fact.status):
        return {}
    now_is: dict[str, Any] = {
        "status": fact.status,
        "reason": bounded(fact.reason),
        "changed_at": fact.at,
    }
    return now_is | {"lost_at": fact.at} if fact.status == "lost" else now_is


def _accept(connection: Connection, facts: Sequence[f.UpdateAccepted]) -> set[str]:
    """Count updates, each once: the keys of the table see to it; which were not counted yet."""
    if not facts:
        return set()
    rows = [
        {
            "attempt": fact.attempt,
            "run": fact.run,
            "round": fact.round,
            "device": fact.device,
            "digest": fact.content.digest,
            "size": fact.content.size,
            "report": fact.report,
            "counts_in": fact.counts_in,
            "at": fact.at,
        }
        for fact in facts
    ]
    counted = insert_into(connection, t.Update).on_conflict_do_nothing()
    fresh = set(connection.scalars(counted.returning(t.Update.attempt), rows))
    _check_whole(connection, [fact for fact in facts if fact.attempt in fresh])
    return fresh


def _check_whole(connection: Connection, facts: Sequence[f.UpdateAccepted]) -> None:
    names = [fact.attempt for fact in facts]
    held = connection.execute(_chunks_of_uploads(), {"names": names})
    chunks = {(attempt, digest): count for attempt, digest, count in held}
    for fact in facts:
        count = chunks.get((fact.attempt, fact.content.digest), 0)
        if count != fact.content.chunks:
            raise StoreError(
                f"update {fact.attempt} is to count with {count} of its {fact.content.chunks} "
                "chunks recorded; record every chunk before the update"
            )
