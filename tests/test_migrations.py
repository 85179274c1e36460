import threading
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, inspect, text

from cloud.record.database import open_database
from cloud.record.migrations import HEAD, configuration, revision_of, upgrade
from cloud.record.store import Store
from cloud.record.tables import Base
from federation.errors import StoreError


def test_the_steps_lead_to_the_tables(database_url: str) -> None:
    """Upgrading an empty database gives exactly the tables that the code works with."""
    engine = open_database(database_url)

    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        differences = compare_metadata(context, Base.metadata)

    engine.dispose()
    assert differences == []


def test_the_comparison_sees_a_difference(database_url: str) -> None:
    """The comparison above would not pass on a database that lacks a table or a column."""
    engine = open_database(database_url)
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE evaluations"))
        connection.execute(text("ALTER TABLE events ADD COLUMN surprise TEXT"))

    with engine.connect() as connection:
        differences = compare_metadata(MigrationContext.configure(connection), Base.metadata)

    engine.dispose()
    assert {difference[0] for difference in differences} == {"add_table", "remove_column"}


def test_the_newest_revision_is_known_without_alembic() -> None:
    """The constant that spares a start from loading Alembic is the newest step's name."""
    steps = ScriptDirectory.from_config(configuration())

    assert steps.get_heads() == [HEAD]


def test_the_steps_can_be_taken_back(database_url: str) -> None:
    """Each step that was taken can be taken back, and taken again."""
    from alembic import command

    engine = open_database(database_url)

    with engine.begin() as connection:
        command.downgrade(configuration(connection), "base")
    with engine.connect() as connection:
        tables = set(inspect(connection).get_table_names())
    with engine.begin() as connection:
        upgrade(connection)

    assert tables == {"alembic_version"}
    with engine.connect() as connection:
        assert revision_of(connection) == HEAD
    engine.dispose()


def test_two_may_start_on_an_empty_database(database_url: str) -> None:
    """Processes that open the same empty database at once all find it ready."""
    failures: list[BaseException] = []
    barrier = threading.Barrier(4)

    def start() -> None:
        try:
            barrier.wait()
            Store(database_url).close()
        except BaseException as error:
            failures.append(error)

    starters = [threading.Thread(target=start) for _ in range(4)]
    for starter in starters:
        starter.start()
    for starter in starters:
        starter.join(60)

    assert failures == []


def test_a_newer_database_is_refused(database_url: str) -> None:
    """A database that a newer version wrote is left alone, and the message says so."""
    Store(database_url).close()
    engine = create_engine(database_url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()

    with pytest.raises(StoreError, match=r"revision 9999.*newer Headwater"):
        Store(database_url)


def test_steps_are_found_beside_their_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub that starts in any folder, without pyproject.toml, finds the steps."""
    monkeypatch.chdir(tmp_path)

    store = Store("sqlite:///here.db")

    assert store.next_epoch() == 1
    store.close()
