"""Hubs and agents as real processes, for the demonstration, the tests and the benchmarks."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from cloud.config import HubConfig
from cloud.record.store import Store
from federation.errors import HeadwaterError


def write_toml(path: Path, value: Any) -> Path:
    """Write a record as TOML, leaving out what is None; its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = msgspec.to_builtins(value, enc_hook=str, str_keys=True)
    path.write_bytes(msgspec.toml.encode(_without_none(plain)))
    return path


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value


def free_port() -> int:
    """A TCP port on 127.0.0.1 that nobody listens on at this moment."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@dataclass(slots=True)
class Process:
    """One command line that may be started, killed without warning, and started again.

    What it prints is appended to `log`.
    """

    command: list[str]
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    _running: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; it must not be running."""
        if self.is_running:
            raise HeadwaterError(f"{self.command[-1]} is running already; end it first")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._running = subprocess.Popen(  # noqa: S603 -- our own commands
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self.environment},
            )

    @property
    def pid(self) -> int:
        """The process id of the last start; 0 before the first."""
        return self._running.pid if self._running is not None else 0

    @property
    def is_running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._running is not None and self._running.poll() is None

    def kill(self) -> int:
        """End it by SIGKILL, as a power cut would; the exit status (minus the signal)."""
        return self._end(signal.SIGKILL, 10.0)

    def stop(self, patience_s: float = 15.0) -> int:
        """Ask it to end, and wait; killed where it does not within this patience."""
        return self._end(signal.SIGTERM, patience_s)

    def _end(self, number: signal.Signals, patience_s: float) -> int:
        process = self._running
        if process is None:
            return 0
        if process.poll() is None:
            process.send_signal(number)
        try:
            return process.wait(patience_s)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait(patience_s)

    def last_words(self, lines: int = 15) -> str:
        """The end of what it printed."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join(text.splitlines()[-lines:])


def hub_process(config: HubConfig, folder: Path, *, verbose: bool = False) -> Process:
    """A hub whose `hub.toml`, record and log lie in this folder."""
    path = write_toml(folder / "hub.toml", config)
    command = [sys.executable, "-m", "cloud", "serve", str(path)]
    return Process([*command, "--verbose"] if verbose else command, folder / "hub.log")


def agent_process(config: Any, folder: Path, *, verbose: bool = False) -> Process:
    """An agent (of an `AgentConfig`, or a mapping like one), its files in this folder."""
    path = write_toml(folder / "agent.toml", config)
    command = [sys.executable, "-m", "edge_agent"]
    command += ["--verbose"] if verbose else []
    return Process([*command, "run", str(path)], folder / "agent.log")


def open_record(config: HubConfig) -> Store:
    """The hub's record, for reading beside it."""
    return Store(config.database_url)
