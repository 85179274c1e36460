"""Which hub works in a folder: one at a time, and whoever asks is told whether one does."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from federation.errors import ConfigError

LOCK = "hub.lock"

PATIENCE_S = 2.0
"""A hub that is just ending, or somebody who looks, may hold the lock for a moment."""


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """The hub at work in a folder: its process, its broker's address, when it started."""

    pid: int
    broker: str
    since: float


@contextmanager
def hold(folder: Path) -> Iterator[int]:
    """Take the folder for this process; gives the handle that `introduce` takes.

    Raises:
        ConfigError: another hub works in it, or it cannot be used at all.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(
            f"folder {folder} cannot be used ({error.strerror}); the hub keeps its record there: "
            "name one that it may create and write to"
        ) from error
    try:
        _take(handle, folder)
        yield handle
        os.ftruncate(handle, 0)
    finally:
        os.close(handle)


def introduce(handle: int, holder: Holder) -> None:
    """Leave word, for `find_holder`, of who holds the folder."""
    os.pwrite(handle, msgspec.json.encode(holder) + b"\n", 0)


def find_holder(folder: Path) -> Holder | None:
    """The hub that works in this folder now; None where none does."""
    try:
        with (folder / LOCK).open("rb") as file:
            if _lock(file.fileno(), fcntl.LOCK_SH):
                return None
            return msgspec.json.decode(file.read(), type=Holder)
    except (OSError, msgspec.DecodeError):
        return None  # Nobody was here, or somebody who has just begun and not left word yet.


def _take(handle: int, folder: Path) -> None:
    give_up_at = time.monotonic() + PATIENCE_S
    while not _lock(handle, fcntl.LOCK_EX):
        if time.monotonic() > give_up_at:
            said = os.pread(handle, 4096, 0)
            raise ConfigError(
                f"another hub works in folder {folder} ({_who(said)}); one at a time may: "
                "stop it, or name another folder"
            )
        time.sleep(0.05)
    os.ftruncate(handle, 0)


def _who(said: bytes) -> str:
    try:
        return f"process {msgspec.json.decode(said, type=Holder).pid}"
    except msgspec.DecodeError:
        return "it has just begun"


def _lock(handle: int, mode: int) -> bool:
    try:
        # Not lockf: its locks belong to the process, and looking from within would free ours.
        fcntl.flock(handle, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
