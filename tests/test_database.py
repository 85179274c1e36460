import re
import socket
import sqlite3
from pathlib import Path

import pytest
from sqlalchemy import make_url, text

from cloud.record.database import open_database
from cloud.record.registry import Registry
from cloud.record.store import Store
from federation.errors import StoreError
from tests.histories import commit, with_open_round


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("hub.db", "cannot be read; write sqlite:///"),
        ("mysql://root@localhost/hub", "'mysql' is not supported; use sqlite or postgresql"),
        ("sqlite://", "must outlive the hub; name a file"),
        ("sqlite:///:memory:", "must outlive the hub; name a file"),
        ("postgresql+psycopg2://localhost/hub", "use postgresql+psycopg://"),
    ],
)
def test_a_url_that_cannot_be_used_is_said(url: str, words: str) -> None:
    """A database URL of another kind is refused with one that would do."""
    with pytest.raises(StoreError, match=re.escape(words)):
        Store(url)


def test_a_file_that_is_something_else_is_left_alone(tmp_path: Path) -> None:
    """A file that is no database is refused and not touched."""
    path = tmp_path / "hub.db"
    path.write_text("dear diary, " * 1000)

    with pytest.raises(StoreError, match=r"file is not a database; .* give another path"):
        Store(f"sqlite:///{path}")

    assert path.read_text().startswith("dear diary, ")


def test_a_path_that_cannot_be_is_said(tmp_path: Path) -> None:
    """A folder where the file should be, or a file where the folder should be, is refused."""
    (tmp_path / "file").write_text("")

    with pytest.raises(StoreError, match=r"cannot create the folder .*file/deeper"):
        Store(f"sqlite:///{tmp_path}/file/deeper/hub.db")
    with pytest.raises(StoreError, match=r"unable to open database file; check that the folder"):
        Store(f"sqlite:///{tmp_path}")


def test_a_locked_file_is_said(tmp_path: Path, registry: Registry) -> None:
    """Where another program keeps the file locked, the hub says so and writes nothing."""
    url = f"sqlite:///{tmp_path}/hub.db?timeout=0.05"
    store = Store(url)
    history = with_open_round(store)
    other = sqlite3.connect(tmp_path / "hub.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")

    with pytest.raises(StoreError, match=r"database is locked; another program holds it"):
        store.record(history.noted, registry)
    other.execute("ROLLBACK")
    other.close()
    commit(store, history, registry)

    assert len(store.rounds("demo")) == 1
    store.close()


def test_a_damaged_file_is_said(tmp_path: Path, registry: Registry) -> None:
    """A database whose pages were overwritten is an error, never a wrong memory."""
    path = tmp_path / "hub.db"
    store = Store(f"sqlite:///{path}")
    commit(store, with_open_round(store), registry)
    store.close()
    damaged = bytearray(path.read_bytes())
    damaged[4096:] = b"\xff" * (len(damaged) - 4096)
    path.write_bytes(damaged)

    with pytest.raises(StoreError, match="the file is damaged: put back a copy"):
        Store(f"sqlite:///{path}").restore(registry)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"password": "wrong"}, "check the user and the password in the URL"),
        ({"username": "nobody"}, "check the user and the password in the URL"),
        ({"database": "absent"}, "check the name at the end of the URL"),
        ({"port": 0}, "check the host and port in the URL, and that PostgreSQL runs there"),
    ],
)
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_server_that_refuses_is_said(
    database_url: str, change: dict[str, str | int], words: str
) -> None:
    """A wrong password, name or port is told apart, and the password is not shown."""
    if "port" in change:
        with socket.create_server(("127.0.0.1", 0)) as closed_soon:
            change = {"port": closed_soon.getsockname()[1]}
    url = make_url(database_url).set(**change)  # type: ignore[arg-type]

    with pytest.raises(StoreError, match=re.escape(words)) as caught:
        Store(url.render_as_string(hide_password=False))

    assert "***" in str(caught.value)
    assert "only for tests" not in str(caught.value)


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_connection_that_was_cut_is_made_anew(database_url: str, registry: Registry) -> None:
    """After the server dropped all connections the store goes on with new ones."""
    store, killer = Store(database_url), open_database(database_url)
    commit(store, with_open_round(store), registry)
    with killer.begin() as connection:
        others = "datname = current_database() AND pid <> pg_backend_pid()"
        dropped = connection.execute(
            text(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}")
        ).all()

    memory = store.restore(registry)

    assert dropped
    assert memory.run is not None
    store.close()
    killer.dispose()


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")
