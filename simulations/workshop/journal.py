"""A file that only grows: values by their keys, each whole or absent after a kill.

It begins with a line that says what it is, then come frames: the length of a body and its
CRC-32, and the body, which is a key of 32 bytes and its value. The first frame says of which run
the journal is. What a kill or a power loss tore is at the end, and is cut off.
"""

import fcntl
import os
import struct
import zlib
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

from federation.errors import ConfigError, StoreError
from simulations.workshop.offsets import read_at, write_at

_MAGIC = b"headwater journal 1\n"
_HEAD = struct.Struct("<QI")
_KEY_BYTES = 32
_OWNER = sha256(b"owner").digest()
_SCAN_BYTES = 1024 * 1024


class Journal:
    """One journal, open for reading and appending by this process alone."""

    def __init__(self, path: Path, owner: str) -> None:
        """Go on with the journal of this owner, or begin it.

        Raises:
            ConfigError: it is another owner's, or another process uses it, or it is no journal.
            StoreError: the disk is full, read-only or broken.
        """
        self._path = path
        self._places: dict[bytes, tuple[int, int]] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise _store_error("open", path, error) from error
        try:
            self._end = self._open(owner)
        except BaseException:
            os.close(self._file)
            raise

    def __len__(self) -> int:
        return len(self._places) - 1

    def knows(self, key: str) -> bool:
        """Whether there is a value of this key."""
        return sha256(key.encode()).digest() in self._places

    def get(self, key: str) -> bytes | None:
        """The value of a key; None where there is none.

        Raises:
            StoreError: the disk cannot be read.
        """
        return self._get(sha256(key.encode()).digest())

    def add(self, key: str, value: bytes) -> None:
        """Append a value; it survives a kill from when this returns.

        Raises:
            StoreError: the disk is full, read-only or broken; the value does not count.
        """
        self._append(sha256(key.encode()).digest(), value)

    def close(self) -> None:
        """Let go of the file; it stays."""
        os.close(self._file)

    def remove(self) -> None:
        """Let go of the file, and remove it."""
        self._path.unlink(missing_ok=True)
        self.close()

    def _open(self, owner: str) -> int:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{self._path} is in use by another process: let that run end, or give this one "
                "another folder"
            ) from None
        try:
            self._end = self._scan()
        except OSError as error:
            raise _store_error("read", self._path, error) from error
        found = self._get(_OWNER)
        if found is None:
            self._append(_OWNER, owner.encode())
        elif found != owner.encode():
            raise ConfigError(
                f"{self._path} is of a run that was not finished, {found.decode()}; this one is "
                f"{owner}: finish that one, give this one another folder, or remove the file"
            )
        return self._end

    def _scan(self) -> int:
        """Find what is there, cut off what is torn: where the last whole frame ends."""
        size = os.fstat(self._file).st_size
        begun = os.pread(self._file, len(_MAGIC), 0)
        if begun != _MAGIC:
            if not _MAGIC.startswith(begun):
                raise ConfigError(f"{self._path} is not a journal: give the run another folder")
            os.pwrite(self._file, _MAGIC, 0)
        end = len(_MAGIC)
        for key, start, stop in self._frames(size):
            self._places[key] = (start, stop - start)
            end = stop
        os.ftruncate(self._file, end)
        return end

    def _frames(self, size: int) -> Iterator[tuple[bytes, int, int]]:
        """The key of each whole frame, and where its value is, up to the first that is not."""
        at = len(_MAGIC)
        while at + _HEAD.size + _KEY_BYTES <= size:
            length, check = _HEAD.unpack(os.pread(self._file, _HEAD.size, at))
            start, at = at + _HEAD.size, at + _HEAD.size + length
            if length < _KEY_BYTES or at > size or self._checksum(start, at) != check:
                return
            yield os.pread(self._file, _KEY_BYTES, start), start + _KEY_BYTES, at

    def _checksum(self, start: int, stop: int) -> int:
        check = 0
        for at in range(start, stop, _SCAN_BYTES):
            check = zlib.crc32(os.pread(self._file, min(_SCAN_BYTES, stop - at), at), check)
        return check

    def _get(self, key: bytes) -> bytes | None:
        place = self._places.get(key)
        if place is None:
            return None
        try:
            return read_at(self._file, place[1], place[0])
        except OSError as error:
            raise _store_error("read", self._path, error) from error

    def _append(self, key: bytes, value: bytes) -> None:
        check = zlib.crc32(value, zlib.crc32(key))
        head = _HEAD.pack(_KEY_BYTES + len(value), check) + key
        end = self._end + len(head) + len(value)
        try:
            write_at(self._file, head, self._end)
            write_at(self._file, value, self._end + len(head))
        except OSError as error:
            raise _store_error("write", self._path, error) from error
        self._places[key] = (end - len(value), len(value))
        self._end = end


def _store_error(act: str, path: Path, error: OSError) -> StoreError:
    return StoreError(
        f"cannot {act} {path}: {error.strerror}; the run's folder must be writable and have "
        "room for the updates of a run: free space or give another folder"
    )
