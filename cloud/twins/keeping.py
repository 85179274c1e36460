"""How twins are read from their tables and written back, within a transaction of the caller's."""

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import Connection, Row, delete, insert, select, update

from cloud.config import RunPlan
from cloud.record import tables as t
from cloud.record.database import insert_into, insert_once
from cloud.record.queries import EventRow
from cloud.twins.following import Fold, Key
from cloud.twins.judging import Part
from federation.errors import TwinError
from twin.history import Retention, needs_snapshot
from twin.model import TwinModel
from twin.shadow import Change, Shadow

MOST = 100_000
"""More changes than any twin keeps."""

AT_ONCE = 500
"""So many names stand in one statement: databases bound its parameters."""


class RecordDesk:
    """What the fold of one page begins from; the twins it names are read at once."""

    def __init__(self, connection: Connection, events: Sequence[EventRow]) -> None:
        self._connection = connection
        self._twins: dict[str, tuple[Shadow, TwinModel]] = {}
        self._looked_for: set[str] = set()
        self._look_for(_named(events))
        self._plans: dict[str, RunPlan | None] = {}
        self._parts: dict[Key, Part] = {}
        for (run, number), devices in _by_round(events).items():
            self._parts |= _open(connection, run, number, devices)

    def twin(self, device: str) -> tuple[Shadow, TwinModel] | None:
        """The twin of a device, as it was before this page of the log."""
        self._look_for([device])
        return self._twins.get(device)

    def plan(self, run: str) -> RunPlan | None:
        """What was asked for under this name."""
        if run not in self._plans:
            chosen = select(t.Run.plan).where(t.Run.name == run)
            self._plans[run] = self._connection.scalar(chosen)
        return self._plans[run]

    def size(self, digest: str) -> int:
        """The bytes of a model; 0 where it is not known."""
        chosen = select(t.Model.size).where(t.Model.digest == digest)
        return self._connection.scalar(chosen) or 0

    def part(self, key: Key) -> Part | None:
        """A device's part in a round, if it was open before this page."""
        if key not in self._parts:
            # An event that names no round of its own, as a refusal does, may still be of one.
            self._parts |= _open(self._connection, key[0], key[1], [key[2]])
        return self._parts.get(key)

    def open_parts(self, run: str, number: int) -> list[Key]:
        """The parts of a round that were open before this page."""
        found = _open(self._connection, run, number, None)
        self._parts = found | self._parts
        self._look_for([device for _, _, device in found])
        return list(found)

    def _look_for(self, devices: Sequence[str]) -> None:
        """Read the twins of these devices, once, whether they have any or not."""
        new = sorted(set(devices) - self._looked_for)
        if new:
            self._looked_for.update(new)
            self._twins |= twins_named(self._connection, new, for_update=True)


def row_of(
    connection: Connection, device: str, *, for_update: bool = False
) -> Row[Shadow, TwinModel]:
    """A twin's shadow and model; TwinError where there is none."""
    chosen = select(t.Twin.shadow, t.Twin.model).where(t.Twin.device == device)
    found = connection.execute(chosen.with_for_update() if for_update else chosen).one_or_none()
    if found is None:
        raise TwinError(
            f"there is no twin of {device[:80]!r}; it has one from its first birth on: "
            "check the name"
        )
    return found


def changes(connection: Connection, device: str, after: int, limit: int) -> list[Change]:
    """A twin's kept changes in order, from the revision after this one on."""
    chosen = select(t.TwinChange.change).where(
        t.TwinChange.device == device, t.TwinChange.revision > after
    )
    return list(connection.scalars(chosen.order_by(t.TwinChange.revision).limit(limit)))


def snapshot_before(
    connection: Connection, newest: Shadow, revision: int | None, at: float | None
) -> Shadow:
    """The last kept shadow that is not later than a revision or a time; else the empty one."""
    chosen = select(t.TwinSnapshot.shadow).where(t.TwinSnapshot.device == newest.device)
    if revision is not None:
        chosen = chosen.where(t.TwinSnapshot.revision <= revision)
    elif at is not None:
        chosen = chosen.where(t.TwinSnapshot.received_at <= at)
    found = connection.scalar(chosen.order_by(t.TwinSnapshot.revision.desc()).limit(1))
    if found is not None:
        return found
    begun = newest.created_at
    if at is not None and at < begun:
        raise TwinError(f"{newest.device} was not yet known at {at}; it is since {begun}")
    return Shadow(device=newest.device, created_at=begun, modified_at=begun)


def write_shadow(connection: Connection, shadow: Shadow) -> None:
    """Write a twin's shadow as it is now."""
    connection.execute(update(t.Twin).where(t.Twin.device == shadow.device).values(_now_is(shadow)))


def add_changes(connection: Connection, made: Iterable[tuple[Change, Shadow]]) -> None:
    """Add changes to the history, with the shadows that are kept whole, and let old ones go."""
    kept = list(made)
    if not kept:
        return
    rows = [
        {
            "device": change.device,
            "revision": change.revision,
            "received_at": change.received_at,
            "change": change,
        }
        for change, _ in kept
    ]
    connection.execute(insert(t.TwinChange), rows)
    for change, shadow in kept:
        if needs_snapshot(change.revision):
            _keep_whole(connection, shadow, change.received_at, Retention())


def position(connection: Connection) -> int:
    """How far the log was followed; whoever asks keeps others from following meanwhile."""
    insert_once(connection, t.TwinFollowing, id=1, event=0, fleet=TwinModel())
    return connection.scalar(select(t.TwinFollowing.event).with_for_update()) or 0


def fleet(connection: Connection) -> TwinModel:
    """What is estimated of all devices together."""
    return connection.scalar(select(t.TwinFollowing.fleet)) or TwinModel()


def write_fold(connection: Connection, fold: Fold, event: int) -> None:
    """Write all that a page of the log came to, up to this event."""
    twins = [
        {"device": device, **_now_is(shadow), "model": fold.models[device]}
        for device, shadow in sorted(fold.shadows.items())
        if fold.is_changed(device)
    ]
    if twins:
        row = insert_into(connection, t.Twin)
        columns = {name: row.excluded[name] for name in twins[0] if name != "device"}
        connection.execute(
            row.on_conflict_do_update(index_elements=["device"], set_=columns), twins
        )
    add_changes(connection, fold.changes)
    if fold.parts:
        _write_parts(connection, fold.parts)
    now_is = update(t.TwinFollowing).values(event=event, fleet=fold.fleet)
    connection.execute(now_is)


def _write_parts(connection: Connection, parts: dict[Key, Part]) -> None:
    rows = [
        {
            "run": run,
            "round": number,
            "device": device,
            "asked_at": part.trial.asked_at,
            "outcome": part.outcome,
            "trial": part.trial,
            "forecast": part.forecast,
        }
        for (run, number, device), part in parts.items()
    ]
    row = insert_into(connection, t.TwinForecast)
    changed = {name: row.excluded[name] for name in ("outcome", "trial")}
    keys = ["run", "round", "device"]
    connection.execute(row.on_conflict_do_update(index_elements=keys, set_=changed), rows)


def _keep_whole(
    connection: Connection, shadow: Shadow, received_at: float, retention: Retention
) -> None:
    device = shadow.device
    insert_once(
        connection,
        t.TwinSnapshot,
        device=device,
        revision=shadow.revision,
        received_at=received_at,
        shadow=shadow,
    )
    # The past is cut at a snapshot, so that what is left can be told from its beginning.
    oldest = connection.scalar(
        select(t.TwinSnapshot.revision)
        .where(t.TwinSnapshot.device == device)
        .where(
            (t.TwinSnapshot.revision <= shadow.revision - retention.changes)
            | (t.TwinSnapshot.received_at <= received_at - retention.age_s)
        )
        .order_by(t.TwinSnapshot.revision.desc())
        .limit(1)
    )
    if oldest is not None:
        for table in (t.TwinChange, t.TwinSnapshot):
            gone = table.revision <= oldest if table is t.TwinChange else table.revision < oldest
            connection.execute(delete(table).where(table.device == device, gone))


def _now_is(shadow: Shadow) -> dict[str, Any]:
    return {
        "revision": shadow.revision,
        "desired_version": shadow.desired.version,
        "modified_at": shadow.modified_at,
        "shadow": shadow,
    }


def _named(events: Sequence[EventRow]) -> list[str]:
    """Every device that these events are about."""
    names = {event.device for event in events if event.device}
    rounds = (event for event in events if event.kind == "round-opened")
    return sorted(names.union(*(event.detail["attempts"] for event in rounds)))


def twins_named(
    connection: Connection, devices: Sequence[str], *, for_update: bool = False
) -> dict[str, tuple[Shadow, TwinModel]]:
    """The twins of these devices, by name; whoever has none is left out."""
    found: dict[str, tuple[Shadow, TwinModel]] = {}
    for begin in range(0, len(devices), AT_ONCE):
        chosen = (
            select(t.Twin.device, t.Twin.shadow, t.Twin.model)
            .where(t.Twin.device.in_(devices[begin : begin + AT_ONCE]))
            .order_by(t.Twin.device)
        )
        rows = connection.execute(chosen.with_for_update() if for_update else chosen)
        found |= {row.device: (row.shadow, row.model) for row in rows}
    return found


def _by_round(events: Sequence[EventRow]) -> dict[tuple[str, int], list[str]]:
    """The devices that these events name, by the round they are about."""
    found: dict[tuple[str, int], set[str]] = {}
    for event in events:
        if event.round and event.device:
            found.setdefault((event.run, event.round), set()).add(event.device)
    return {place: sorted(devices) for place, devices in found.items()}


def _open(
    connection: Connection, run: str, number: int, devices: list[str] | None
) -> dict[Key, Part]:
    """The parts of a round that are open: those of some devices, or all."""
    chosen = select(t.TwinForecast.device, t.TwinForecast.trial, t.TwinForecast.forecast).where(
        t.TwinForecast.run == run,
        t.TwinForecast.round == number,
        t.TwinForecast.outcome.is_(None),
    )
    if devices is not None:
        chosen = chosen.where(t.TwinForecast.device.in_(devices))
    return {
        (run, number, row.device): Part(trial=row.trial, forecast=row.forecast)
        for row in connection.execute(chosen)
    }
