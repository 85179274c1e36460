"""The database itself: opened, brought to the newest revision, its errors put into words."""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase

from cloud.record.migrations import HEAD, revision_of, upgrade
from federation.errors import StoreError

BUSY_S = 5.0
"""How long a statement waits for another process that writes to the same SQLite file."""

CONNECT_S = 10
"""How long a PostgreSQL server may take to answer at first."""

_UPGRADE_LOCK = 0x68656164

_REMEDIES = (
    ("locked", "another program holds it: end that program, or wait, and try again"),
    ("not a database", "the file is something else: give another path, or move the file away"),
    ("malformed", "the file is damaged: put back a copy, or move it away and begin anew"),
    ("unable to open", "check that the folder exists and may be written to"),
    ("readonly", "check who owns the file and its folder: the hub must be able to write"),
    ("is full", "make room on the disk"),
    ("password", "check the user and the password in the URL"),
    ('role "', "check the user in the URL, or create that role"),
    ('database "', "check the name at the end of the URL, or create that database"),
    ("permission denied", "give the user of the URL the right to create tables and write rows"),
    ("already exists", "the tables are not Headwater's: give a database of its own"),
    ("refused", "check the host and port in the URL, and that PostgreSQL runs there"),
    ("resolve", "check the host in the URL"),
    ("timeout", "check the host and port in the URL, and that nothing on the way blocks them"),
    ("overflow", "check the values that are to be recorded"),
)


@contextmanager
def in_words(url: URL, doing: str) -> Iterator[None]:
    """Turn a failure of the database into a StoreError that says what to do about it."""
    try:
        yield
    except (SQLAlchemyError, OverflowError, msgspec.ValidationError) as error:
        cause = error.orig if isinstance(error, DBAPIError) else error
        lines = str(cause).strip().splitlines() or [type(cause).__name__]
        # A server that cannot be reached is reported once an address: the last line sums up.
        fact = " ".join(line.strip() for line in lines[:3])[:500]
        known = (remedy for sign, remedy in _REMEDIES if sign in fact.lower())
        remedy = next(known, "check the database and try again")
        shown = url.render_as_string(hide_password=True)
        raise StoreError(f"cannot {doing} {shown}: {fact}; {remedy}") from error


def open_database(url: str) -> Engine:
    """An engine on a database that has the newest tables.

    Raises:
        StoreError: a URL that cannot be used, a server that does not answer or refuses, a file
            that is locked, damaged or something else, tables of a newer Headwater.
    """
    parsed = _parse(url)
    if parsed.get_backend_name() == "sqlite":
        engine = _open_sqlite(parsed)
    else:
        engine = _open_postgresql(parsed)
    try:
        with in_words(parsed, "open"):
            _bring_to_head(engine)
    except StoreError:
        engine.dispose()
        raise
    return engine


def insert_into(
    connection: Connection, table: type[DeclarativeBase]
) -> sqlite.Insert | postgresql.Insert:
    """An INSERT that knows ON CONFLICT: both dialects spell it alike, the neutral one cannot."""
    if connection.dialect.name == "postgresql":
        return postgresql.insert(table)
    return sqlite.insert(table)


def insert_once(connection: Connection, table: type[DeclarativeBase], **values: Any) -> bool:
    """Insert a row unless a key of the table forbids it; whether it was inserted."""
    row = insert_into(connection, table).values(values).on_conflict_do_nothing()
    result = connection.execute(row, execution_options={"preserve_rowcount": True})
    return result.rowcount > 0


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
        backend = parsed.get_backend_name()
    except (ArgumentError, ValueError) as error:
        raise StoreError(
            "the database URL cannot be read; write sqlite:///path/hub.db or "
            "postgresql+psycopg://user:password@host/name"
        ) from error
    if backend not in ("sqlite", "postgresql"):
        raise StoreError(f"database {backend!r} is not supported; use sqlite or postgresql")
    if backend == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise StoreError("the record must outlive the hub; name a file: sqlite:///path/hub.db")
    return parsed


def _open_sqlite(url: URL) -> Engine:
    folder = Path(url.database or "").parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"cannot create the folder {folder}: {error.strerror}; "
            "give a path in a folder that may be written to"
        ) from error
    connect_args = {} if "timeout" in url.query else {"timeout": BUSY_S}
    engine = create_engine(url, connect_args=connect_args)
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    # The driver's own way of beginning transactions leaves out those that only read or create
    # tables, so it is switched off and `_begin_sqlite` does it.
    connection.isolation_level = None
    cursor = connection.cursor()
    _switch_to_wal(cursor)
    for pragma in (
        "synchronous = FULL",
        "foreign_keys = ON",
        # Chunks come and go by the megabyte; to overwrite them with zeros costs more than them.
        "secure_delete = OFF",
        "wal_autocheckpoint = 4000",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _switch_to_wal(cursor: Any) -> None:
    """Turn write-ahead logging on; SQLite's own patience does not cover this one statement."""
    deadline = time.monotonic() + BUSY_S
    while True:
        try:
            cursor.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        else:
            return


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that reads first and writes later fails at once, without waiting, when
    # another one wrote in between; one that will write takes its place in the queue now.
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _open_postgresql(url: URL) -> Engine:
    if url.drivername == "postgresql":
        url = url.set(drivername="postgresql+psycopg")
    connect_args = {} if "connect_timeout" in url.query else {"connect_timeout": CONNECT_S}
    try:
        return create_engine(url, connect_args=connect_args, pool_pre_ping=True)
    except (SQLAlchemyError, ImportError) as error:
        raise StoreError(
            f"cannot load the driver of {url.drivername!r}: {error}; use postgresql+psycopg://"
        ) from error


def _bring_to_head(engine: Engine) -> None:
    with engine.connect() as connection:
        if revision_of(connection) == HEAD:
            return
    with engine.connect().execution_options(writes=True) as connection, connection.begin():
        if connection.dialect.name == "postgresql":
            # Two processes may start at once; SQLite's BEGIN IMMEDIATE lets one in at a time.
            connection.execute(text(f"SELECT pg_advisory_xact_lock({_UPGRADE_LOCK})"))
        if (found := revision_of(connection)) != HEAD:
            _upgrade(connection, found)


def _upgrade(connection: Connection, found: str | None) -> None:
    from alembic.util import CommandError

    try:
        upgrade(connection)
    except CommandError as error:
        raise StoreError(
            f"the database is at revision {found}, which is not known here (newest: {HEAD}): "
            "it was written by a newer Headwater; install that one"
        ) from error
