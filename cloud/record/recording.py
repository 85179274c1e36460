"""How each fact changes the tables, all within one transaction of the caller's.

A fact that comes again has no second effect.
"""

from collections.abc import Sequence
from typing import assert_never

from sqlalchemy import Connection, delete, insert, select, update

from cloud.coordination import facts as f
from cloud.record import arriving, coming, receiving
from cloud.record import tables as t
from cloud.record.database import insert_into, insert_once
from cloud.record.events import bounded, event_of
from federation.protocol.messages import Content

_APART = (f.Waiting, f.LetterRefused, f.DeviceReported, f.MirrorTaken)
"""Facts that do not meet those of attempts, so that it is all one which are written first."""


def files_of(fact: f.HubFact) -> tuple[str, Content, bytes] | None:
    """The model file a fact brings: its kind, what it should be, its bytes."""
    match fact:
        case f.RunOpened() | f.RoundClosed():
            return "weights", fact.content, fact.model
        case f.Released():
            return "onnx", fact.release.content, fact.onnx
        case _:
            return None


def manifests_changed(facts: Sequence[f.HubFact]) -> set[str]:
    """The runs whose models these facts add to."""
    closed = {fact.run for fact in facts if isinstance(fact, f.RunOpened | f.RoundClosed)}
    return closed | {fact.release.run for fact in facts if isinstance(fact, f.Released)}


def write(connection: Connection, facts: Sequence[f.HubFact]) -> None:
    """Write these facts, in order, with one event for each that changed something.

    Raises:
        StoreError: a fact that cannot follow from what is recorded.
    """
    told = [False] * len(facts)
    arrivals: list[tuple[int, arriving.Arrival]] = []
    comings: list[coming.Coming] = []
    for place, fact in enumerate(facts):
        if isinstance(fact, f.AttemptChanged | f.ChunkStored | f.UpdateAccepted):
            arrivals.append((place, fact))
            continue
        if isinstance(fact, f.DeviceBorn | f.PresenceChanged):
            comings.append(fact)
            told[place] = True
            continue
        if not isinstance(fact, _APART):
            _settle(connection, arrivals, told)
        told[place] = _apply(connection, fact)
    _settle(connection, arrivals, told)
    coming.record_comings(connection, comings)
    events = [event_of(fact) for fact, is_told in zip(facts, told, strict=True) if is_told]
    if events:
        connection.execute(insert(t.Event), events)


def _settle(
    connection: Connection, arrivals: list[tuple[int, arriving.Arrival]], told: list[bool]
) -> None:
    """Write what waits to be written together."""
    if arrivals:
        written = arriving.record_arrivals(connection, [fact for _, fact in arrivals])
        for (place, _), is_told in zip(arrivals, written, strict=True):
            told[place] = is_told
        arrivals.clear()


def _apply(connection: Connection, fact: f.HubFact) -> bool:  # noqa: C901, PLR0911
    # One line a fact; the functions below say what it does. False: it changed nothing.
    match fact:
        case f.DeviceBorn() | f.PresenceChanged():
            coming.record_comings(connection, [fact])
            return True
        case f.RunOpened():
            return _run_opened(connection, fact)
        case f.RunEnded():
            return _run_ended(connection, fact)
        case f.RoundOpened():
            return _round_opened(connection, fact)
        case f.Waiting():
            return _waiting(connection, fact)
        case f.AttemptChanged() | f.ChunkStored() | f.UpdateAccepted():
            return arriving.record_arrivals(connection, [fact])[0]
        case f.UpdateRefused():
            return receiving.refuse_update(connection, fact)
        case f.RoundClosed():
            return _round_closed(connection, fact)
        case f.RoundAbandoned():
            return _round_abandoned(connection, fact)
        case f.Released():
            return _released(connection, fact)
        case f.LetterRefused() | f.DeviceReported() | f.MirrorTaken():
            return True  # The log has them; twins are folded from it, and keep what is mirrored.
        case _:
            assert_never(fact)


# Runs -------------------------------------------------------------------------------------


def _run_opened(connection: Connection, fact: f.RunOpened) -> bool:
    _add_model(connection, fact.content, "weights")
    opened = connection.execute(
        update(t.Run)
        .where(t.Run.name == fact.run, t.Run.status == "requested")
        .values(
            status="active",
            opened_at=fact.at,
            model=fact.content.digest,
            chunk_bytes=fact.content.chunk_bytes,
        )
    )
    if not opened.rowcount:
        receiving.plan_of(connection, fact.run)
    return bool(opened.rowcount)


def _run_ended(connection: Connection, fact: f.RunEnded) -> bool:
    ended = connection.execute(
        update(t.Run)
        .where(t.Run.name == fact.run, t.Run.status.in_(("requested", "active")))
        .values(status=fact.status, reason=bounded(fact.reason), ended_at=fact.at, wait_name="")
    )
    receiving.forget_uploads(connection, select(t.Attempt.attempt).where(t.Attempt.run == fact.run))
    connection.execute(delete(t.MethodMemory).where(t.MethodMemory.run == fact.run))
    return bool(ended.rowcount)


def _waiting(connection: Connection, fact: f.Waiting) -> bool:
    connection.execute(
        update(t.Run)
        .where(t.Run.name == fact.run)
        .values(
            wait_name=fact.name,
            wait_reason=bounded(fact.reason),
            wait_round=fact.round,
            wait_until=fact.until,
            wait_at=fact.at,
        )
    )
    return True


def _released(connection: Connection, fact: f.Released) -> bool:
    release = fact.release
    _add_model(connection, release.content, "onnx")
    now_is = {
        "digest": release.content.digest,
        "size": release.content.size,
        "chunk_bytes": release.content.chunk_bytes,
        "labels": release.labels,
        "at": fact.at,
    }
    row = insert_into(connection, t.Release).values(run=release.run, round=release.round, **now_is)
    # A hub that was killed may export the same round again, to other bytes of the same worth.
    row = row.on_conflict_do_update(
        index_elements=["run", "round"],
        set_=now_is,
        where=t.Release.digest != release.content.digest,
    )
    released = connection.execute(row, execution_options={"preserve_rowcount": True})
    return released.rowcount > 0


def _add_model(connection: Connection, content: Content, kind: str) -> None:
    insert_once(connection, t.Model, digest=content.digest, size=content.size, kind=kind)


# Rounds and attempts ----------------------------------------------------------------------


def _round_opened(connection: Connection, fact: f.RoundOpened) -> bool:
    is_new = insert_once(
        connection,
        t.Round,
        run=fact.run,
        number=fact.round,
        status="open",
        reason="",
        base=fact.base,
        deadline=fact.deadline,
        opened_at=fact.at,
        excluded={device: bounded(reason) for device, reason in fact.excluded.items()},
    )
    if not is_new:
        return False
    # The records of the attempts may have changed since this fact was noted; the facts that
    # follow say how, so here all of them begin.
    rows = [
        {
            "attempt": entry.attempt,
            "run": fact.run,
            "round": fact.round,
            "device": entry.device,
            "level": entry.level,
            "status": "assigned",
            "reason": "",
            "lost_at": 0.0,
            "changed_at": fact.at,
        }
        for entry in fact.attempts
    ]
    if rows:
        connection.execute(insert(t.Attempt), rows)
    return True


def _round_closed(connection: Connection, fact: f.RoundClosed) -> bool:
    _add_model(connection, fact.content, "weights")
    closed = connection.execute(
        update(t.Round)
        .where(t.Round.run == fact.run, t.Round.number == fact.round, t.Round.status == "open")
        .values(
            status="closed",
            ended_at=fact.at,
            model=fact.content.digest,
            devices=fact.devices,
            report=fact.report,
            bytes_up=fact.bytes_up,
            bytes_down=fact.bytes_down,
        )
    )
    if not closed.rowcount:
        return False
    connection.execute(
        update(t.Run)
        .where(t.Run.name == fact.run)
        .values(
            model=fact.content.digest,
            chunk_bytes=fact.content.chunk_bytes,
            abandoned_in_a_row=0,
            bytes_up=fact.bytes_up,
            bytes_down=fact.bytes_down,
        )
    )
    if fact.memory:
        kept = insert_into(connection, t.MethodMemory).values(run=fact.run, data=fact.memory)
        kept = kept.on_conflict_do_update(index_elements=["run"], set_={"data": kept.excluded.data})
        connection.execute(kept)
    counted = select(t.Update.attempt).where(
        t.Update.run == fact.run, t.Update.counts_in <= fact.round
    )
    receiving.forget_uploads(connection, counted)
    receiving.forget_unfinished(connection, fact.run, fact.round)
    return True


def _round_abandoned(connection: Connection, fact: f.RoundAbandoned) -> bool:
    counted = connection.execute(
        update(t.Run)
        .where(t.Run.name == fact.run, t.Run.abandoned_at.is_distinct_from(fact.at))
        .values(abandoned_in_a_row=t.Run.abandoned_in_a_row + 1, abandoned_at=fact.at)
    )
    abandoned = connection.execute(
        update(t.Round)
        .where(t.Round.run == fact.run, t.Round.number == fact.round, t.Round.status == "open")
        .values(status="abandoned", reason=bounded(fact.reason), ended_at=fact.at)
    )
    if not abandoned.rowcount:
        # No round was open: too few devices came to open one, and that counts as well.
        return bool(counted.rowcount)
    # Updates of this very round are dropped; late ones that were kept count in the next.
    mine = (t.Update.run == fact.run, t.Update.counts_in == fact.round)
    receiving.forget_uploads(
        connection, select(t.Update.attempt).where(*mine, t.Update.round == fact.round)
    )
    connection.execute(
        update(t.Update).where(*mine, t.Update.round < fact.round).values(counts_in=fact.round + 1)
    )
    receiving.forget_unfinished(connection, fact.run, fact.round)
    return True
