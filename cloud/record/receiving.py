"""How the bytes of updates come to the tables and go: chunks, refusal, and forgetting."""

from collections.abc import Sequence
from functools import cache

from sqlalchemy import Connection, Select, bindparam, delete, func, insert, select, update

from cloud.config import RunPlan
from cloud.coordination import facts as f
from cloud.record import tables as t
from cloud.record.database import insert_into
from cloud.record.events import bounded
from federation.errors import StoreError


def store_chunks(connection: Connection, facts: Sequence[f.ChunkStored]) -> None:
    """Keep these chunks; where an attempt now sends another content, that replaces the old."""
    newest = {fact.attempt: fact for fact in facts}
    digests = dict(connection.execute(_uploads_named(), {"names": list(newest)}).all())
    replaced = [
        a for a, fact in newest.items() if digests.get(a) not in (None, fact.content.digest)
    ]
    if replaced:
        connection.execute(delete(t.Upload).where(t.Upload.attempt.in_(replaced)))
    uploads = [
        {
            "attempt": attempt,
            "digest": fact.content.digest,
            "size": fact.content.size,
            "chunk_bytes": fact.content.chunk_bytes,
            "report": fact.report,
        }
        for attempt, fact in newest.items()
        if digests.get(attempt) != fact.content.digest
    ]
    if uploads:
        connection.execute(insert(t.Upload), uploads)
    chunks = [
        {"attempt": fact.attempt, "index": fact.index, "data": fact.data}
        for fact in facts
        if fact.content.digest == newest[fact.attempt].content.digest
    ]
    # A chunk that comes again replaces the one before: an upload whose whole turned out to be
    # damaged is sent anew under the same digest.
    row = insert_into(connection, t.Chunk)
    row = row.on_conflict_do_update(
        index_elements=["attempt", "index"], set_={"data": row.excluded.data}
    )
    connection.execute(row, chunks)


@cache
def _uploads_named() -> Select[str, str]:
    named = t.Upload.attempt.in_(bindparam("names", expanding=True))
    return select(t.Upload.attempt, t.Upload.digest).where(named)


def refuse_update(connection: Connection, fact: f.UpdateRefused) -> bool:
    """Keep the verdict, the first if there are several, and forget what was stored."""
    # What was accepted stays so, and its bytes with it. The attempt may be the device's invention.
    attempt = bounded(fact.attempt)
    this = (t.Attempt.attempt == attempt, t.Attempt.verdict.is_distinct_from("stored"))
    told = connection.execute(
        update(t.Attempt)
        .where(*this)
        .values(verdict=func.coalesce(t.Attempt.verdict, fact.verdict))
    )
    if told.rowcount:
        forget_uploads(connection, select(t.Attempt.attempt).where(*this))
    return True


def forget_uploads(connection: Connection, attempts: Select[str]) -> None:
    """Delete what is stored of these attempts' updates; their chunks go with them."""
    connection.execute(delete(t.Upload).where(t.Upload.attempt.in_(attempts)))


def forget_unfinished(connection: Connection, run: str, number: int) -> None:
    """Delete what came of updates that can no longer count, where late ones are dropped."""
    if plan_of(connection, run).policy.late == "keep":
        return
    late = (
        select(t.Attempt.attempt)
        .join(t.Upload, t.Upload.attempt == t.Attempt.attempt)
        .outerjoin(t.Update, t.Update.attempt == t.Attempt.attempt)
        .where(t.Attempt.run == run, t.Attempt.round <= number, t.Update.attempt.is_(None))
    )
    forget_uploads(connection, late)


def plan_of(connection: Connection, run: str) -> RunPlan:
    """The plan of a run; StoreError where it was never requested."""
    plan = connection.scalar(select(t.Run.plan).where(t.Run.name == run))
    if plan is None:
        raise StoreError(f"run {run!r} is not in the record; request it before it opens")
    return plan
