"""The twins in the hub's database: read by anybody, wishes written by operators, the rest folded.

It has connections of its own, so it may be used from any thread while the hub works. Two may
write to one twin, whoever folds the log and whoever makes a wish; each holds the row meanwhile.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec
from sqlalchemy import Connection, func, select

from cloud.record import queries
from cloud.record import tables as t
from cloud.record.database import in_words, open_database
from cloud.twins import keeping
from cloud.twins.following import Fold
from federation.errors import TwinError
from federation.protocol.wishes import DesiredState
from twin.forecast import Forecast
from twin.history import as_of_revision, as_of_time
from twin.model import Trial, TwinModel
from twin.shadow import Change, Edit, PartName, Shadow, write


class TwinRow(msgspec.Struct, frozen=True, kw_only=True):
    """A twin: its shadow, and what is estimated of the device."""

    shadow: Shadow
    model: TwinModel


class ForecastRow(msgspec.Struct, frozen=True, kw_only=True):
    """What was forecast of a device's part in a round, and what came of it."""

    run: str
    round: int
    device: str
    asked_at: float
    outcome: str | None
    trial: Trial
    forecast: Forecast | None


def wish_of(shadow: Shadow) -> DesiredState:
    """The letter that tells a device what is desired of it."""
    return DesiredState(version=shadow.desired.version, document=shadow.desired.state)


class TwinStore:
    """All twins. Raises StoreError, from every method, where the database cannot be used."""

    def __init__(self, url: str) -> None:
        self._engine = open_database(url)

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    # Reading ------------------------------------------------------------------------------

    def twins(self, after: str = "", limit: int = 1000) -> list[TwinRow]:
        """Twins in device order, those after this name."""
        chosen = select(t.Twin.shadow, t.Twin.model).where(t.Twin.device > after)
        with self._reading() as connection:
            rows = connection.execute(chosen.order_by(t.Twin.device).limit(limit))
            return [TwinRow(shadow=row.shadow, model=row.model) for row in rows]

    def count(self) -> int:
        """How many twins there are."""
        with self._reading() as connection:
            return connection.scalar(select(func.count()).select_from(t.Twin)) or 0

    def twin(self, device: str) -> TwinRow:
        """The twin of a device.

        Raises:
            TwinError: the hub never heard of it.
        """
        with self._reading() as connection:
            return TwinRow(**keeping.row_of(connection, device)._asdict())

    def of(self, devices: Sequence[str]) -> dict[str, TwinRow]:
        """The twins of these devices, by name; whoever has none is left out."""
        with self._reading() as connection:
            found = keeping.twins_named(connection, sorted(devices))
        return {
            device: TwinRow(shadow=shadow, model=model) for device, (shadow, model) in found.items()
        }

    def fleet(self) -> TwinModel:
        """What is estimated of all devices together."""
        with self._reading() as connection:
            return connection.scalar(select(t.TwinFollowing.fleet)) or TwinModel()

    def followed(self) -> int:
        """The event up to which the log was folded into the twins; 0 before the first."""
        with self._reading() as connection:
            return connection.scalar(select(t.TwinFollowing.event)) or 0

    def wishes(self) -> dict[str, DesiredState]:
        """What is desired of each device of which anything ever was."""
        chosen = select(t.Twin.shadow).where(t.Twin.desired_version > 0)
        with self._reading() as connection:
            found = connection.scalars(chosen.order_by(t.Twin.device))
            return {each.device: wish_of(each) for each in found}

    def changes(self, device: str, after: int = 0, limit: int = 1000) -> list[Change]:
        """What is kept of a twin's history, from the revision after this one on.

        Raises:
            TwinError: the hub never heard of the device.
        """
        with self._reading() as connection:
            keeping.row_of(connection, device)
            return keeping.changes(connection, device, after, limit)

    def as_it_was(
        self, device: str, *, revision: int | None = None, at: float | None = None
    ) -> Shadow:
        """The shadow at a revision, or at a time on the hub's clock.

        Raises:
            TwinError: the hub never heard of the device, or its past is not kept so far back.
        """
        with self._reading() as connection:
            newest: Shadow = keeping.row_of(connection, device).shadow
            if revision is not None and revision > newest.revision:
                raise TwinError(
                    f"{device} is at revision {newest.revision}; there is no {revision} yet"
                )
            start = keeping.snapshot_before(connection, newest, revision, at)
            later = keeping.changes(connection, device, start.revision, keeping.MOST)
        if revision is not None:
            return as_of_revision(start, later, revision)
        return as_of_time(start, later, newest.modified_at if at is None else at)

    def forecasts(
        self, *, run: str | None = None, device: str | None = None, limit: int = 10_000
    ) -> list[ForecastRow]:
        """What was forecast and what came of it, in order of asking; of a run, of a device."""
        chosen = select(t.TwinForecast)
        if run is not None:
            chosen = chosen.where(t.TwinForecast.run == run)
        if device is not None:
            chosen = chosen.where(t.TwinForecast.device == device)
        order = (t.TwinForecast.asked_at, t.TwinForecast.device)
        with self._reading() as connection:
            rows = connection.execute(chosen.order_by(*order).limit(limit))
            return [ForecastRow(**row._asdict()) for row in rows]

    # Writing ------------------------------------------------------------------------------

    def edit(
        self, device: str, edits: Sequence[Edit], expected: dict[PartName, int]
    ) -> tuple[Shadow, list[Change]]:
        """Make these edits, or none; `expected` gives the versions that the writer has seen.

        Raises:
            TwinConflictError: somebody wrote in between.
            TwinError: the hub never heard of the device, or an edit may not be made.
        """
        made = []
        with self._writing("write a twin in") as connection:
            shadow: Shadow = keeping.row_of(connection, device, for_update=True).shadow
            for edit in edits:
                shadow, change = write(shadow, edit, expected.get(edit.part))
                if change is not None:
                    made.append((change, shadow))
            keeping.write_shadow(connection, shadow)
            keeping.add_changes(connection, made)
        return shadow, [change for change, _ in made]

    def follow(self, limit: int = 500) -> int:
        """Fold the next events of the log into the twins; how many there were.

        Where the log lies is written in the same transaction, so each counts exactly once.
        """
        with self._reading() as connection:
            after = connection.scalar(select(t.TwinFollowing.event)) or 0
            # Mostly there is nothing, and then nobody shall wait for a writer's place.
            events = queries.events(connection, None, after, limit)
        if not events:
            return 0
        with self._writing("follow the log in") as connection:
            if keeping.position(connection) != after:
                return 0  # Somebody else follows the same log, and was faster.
            desk = keeping.RecordDesk(connection, events)
            fold = Fold(desk=desk, fleet=keeping.fleet(connection))
            for event in events:
                fold.take(event)
            keeping.write_fold(connection, fold, events[-1].id)
        return len(events)

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        with in_words(self._engine.url, "read"), self._engine.connect() as connection:
            yield connection

    @contextmanager
    def _writing(self, doing: str) -> Iterator[Connection]:
        with (
            in_words(self._engine.url, doing),
            self._engine.connect() as connection,
            connection.execution_options(writes=True).begin(),
        ):
            yield connection
