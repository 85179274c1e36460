"""The hub's record: every fact in one transaction per batch, and all of it back after a crash.

Written by one hub. Other processes may ask and read at the same time: `headwater-hub start`,
`stop` and `status` open the same database.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from sqlalchemy import Connection, select, update

from cloud.config import RunPlan
from cloud.coordination.facts import HubFact, HubMemory
from cloud.record import queries, recording, restoring
from cloud.record import tables as t
from cloud.record.database import in_words, insert_once, open_database
from cloud.record.events import bounded
from cloud.record.queries import AttemptRow, DeviceRow, EventRow, RoundRow, RunStatus
from cloud.record.registry import Registry
from federation.errors import ConfigError, StoreError


class Store:
    """The record in a database. May be used from several threads.

    Raises StoreError, from every method, where the database cannot be reached, read or
    written; nothing of what that call was to write is then in it.
    """

    def __init__(self, url: str) -> None:
        self._engine = open_database(url)

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    # What operators ask for ---------------------------------------------------------------

    def request_run(self, plan: RunPlan) -> None:
        """Ask for a run; the hub opens it when the one before has ended.

        Raises:
            ConfigError: there is a run of this name, or was one.
        """
        with self._writing("request a run in") as connection:
            is_new = insert_once(
                connection,
                t.Run,
                name=plan.name,
                plan=plan,
                status="requested",
                reason="",
                stop_requested=False,
                abandoned_in_a_row=0,
                bytes_up=0,
                bytes_down=0,
                wait_name="",
                wait_reason="",
                wait_round=0,
                wait_until=0.0,
                wait_at=0.0,
            )
            if not is_new:
                raise ConfigError(
                    f"there is a run {plan.name!r} already; give this one another name"
                )

    def request_stop(self, run: str) -> None:
        """Ask for the end of a run that is active or still to come.

        Raises:
            ConfigError: there is no such run, or it is over.
        """
        with self._writing("request a stop in") as connection:
            status = connection.scalar(select(t.Run.status).where(t.Run.name == run))
            if status is None:
                raise queries.unknown_run(connection, run)
            if status not in ("requested", "active"):
                raise ConfigError(f"run {run!r} is over: it is {status}; there is nothing to stop")
            connection.execute(update(t.Run).where(t.Run.name == run).values(stop_requested=True))

    def requested(self) -> list[RunPlan]:
        """The runs that were asked for and not yet opened, in the order of asking."""
        with self._reading() as connection:
            chosen = select(t.Run.plan).where(t.Run.status == "requested").order_by(t.Run.id)
            return list(connection.scalars(chosen))

    def stop_requested(self) -> list[str]:
        """The runs that are not over and shall stop."""
        with self._reading() as connection:
            chosen = select(t.Run.name).where(
                t.Run.status.in_(("requested", "active")), t.Run.stop_requested
            )
            return list(connection.scalars(chosen.order_by(t.Run.id)))

    # What the hub writes and reads back ---------------------------------------------------

    def next_epoch(self, first: int = 1) -> int:
        """The hub's next epoch: one more than any before, or `first` in a new record."""
        with self._writing("begin an epoch in") as connection:
            insert_once(connection, t.Hub, id=1, epoch=first - 1)
            grown = update(t.Hub).values(epoch=t.Hub.epoch + 1).returning(t.Hub.epoch)
            return connection.execute(grown).scalar_one()

    def record(self, facts: Sequence[HubFact], registry: Registry) -> None:
        """Write all of these facts, or none. Model files are safe before a row names them.

        Raises:
            StoreError: also where a fact cannot follow from what is recorded, or brings
                another model than it says.
        """
        for fact in facts:
            if (file := recording.files_of(fact)) is not None:
                _, content, data = file
                if registry.put(data) != content.digest:
                    raise StoreError(
                        f"{type(fact).__name__} brings a model that is not {content.digest}; "
                        "the content must be of these bytes"
                    )
        with self._writing("record facts in") as connection:
            recording.write(connection, facts)
        for run in recording.manifests_changed(facts):
            self._write_manifest(run, registry)

    def record_evaluation(
        self,
        run: str,
        round: int,  # noqa: A002
        name: str,
        correct: int,
        loss_sum: float,
        samples: int,
    ) -> None:
        """Write down what a round's model was measured to be; the first measurement stays."""
        with self._writing("record an evaluation in") as connection:
            insert_once(
                connection,
                t.Evaluation,
                run=run,
                round=round,
                name=bounded(name),
                correct=correct,
                loss_sum=None if math.isnan(loss_sum) else loss_sum,
                samples=samples,
            )

    def restore(self, registry: Registry) -> HubMemory:
        """All that a coordinator begins from, as the record has it.

        Raises:
            StoreError: also where the newest model or an accepted update is absent or damaged.
        """
        with self._reading() as connection:
            memory = restoring.restore(connection, registry)
        if memory.run is not None:
            # The hub may have ended after its last commit and before the manifest was written.
            self._write_manifest(memory.run.plan.name, registry)
        return memory

    # What people ask ----------------------------------------------------------------------

    def runs(self) -> list[RunStatus]:
        """All runs in the order they were asked for."""
        with self._reading() as connection:
            return queries.runs(connection)

    def run_status(self, run: str) -> RunStatus:
        """How a run stands.

        Raises:
            ConfigError: there is no run of this name.
        """
        with self._reading() as connection:
            return queries.run_status(connection, run)

    def rounds(self, run: str) -> list[RoundRow]:
        """The rounds of a run in order."""
        with self._reading() as connection:
            return queries.rounds(connection, run)

    def devices(self) -> list[DeviceRow]:
        """All devices in order, each with its part in the open round."""
        with self._reading() as connection:
            return queries.devices(connection)

    def attempts(self, run: str, round: int) -> list[AttemptRow]:  # noqa: A002
        """Who was asked in a round and what became of it, in device order."""
        with self._reading() as connection:
            return queries.attempts(connection, run, round)

    def excluded(self, run: str, round: int) -> dict[str, str]:  # noqa: A002
        """Who was not asked in a round, and why."""
        with self._reading() as connection:
            return queries.excluded(connection, run, round)

    def events(
        self, run: str | None = None, after_id: int = 0, limit: int = 1000
    ) -> list[EventRow]:
        """The log in order, after the entry `after_id`; of one run, or all of it."""
        with self._reading() as connection:
            return queries.events(connection, run, after_id, limit)

    def models(self) -> set[str]:
        """The digests of all model files the record refers to: what `Registry.prune` keeps."""
        with self._reading() as connection:
            return queries.models(connection)

    def _write_manifest(self, run: str, registry: Registry) -> None:
        with self._reading() as connection:
            entries = queries.manifest(connection, run)
        registry.write_manifest(run, entries)

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
