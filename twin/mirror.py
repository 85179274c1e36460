"""Data that devices mirror to their twins: only where the owner allows it, and deletable.

```
<folder>/<device>.safetensors    the samples of one device
<folder>/ledger.jsonl            who allowed, sent and deleted what, each line sealed by the next
```

Nothing is kept of a device that was not allowed, and an allowance is for one device. Revoking
deletes the file, and the ledger says so: digest, bytes and time of what is gone. Each entry names
the SHA-256 of the line before it, so no entry can be changed or left out without a trace; only a
last line that a power cut left unfinished is passed over.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec

from federation.errors import CodecError, DataError, StoreError
from federation.learning.data import LocalData
from federation.learning.mirroring import unpack_mirror
from federation.learning.samples import sample_digest
from federation.protocol.mirror import MOST_BYTES


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the ledger. `digest` is of samples, `at` in seconds of the hub's clock."""

    what: Literal["allowed", "mirrored", "deleted", "revoked"]
    device: str
    at: float
    digest: str = ""
    samples: int = 0
    size_bytes: int = 0
    before: str = ""


class MirrorStore:
    """What devices mirror, below one folder. One writer at a time, and any number of readers.

    `is_reader`: somebody else writes, so what a power cut left is not mended here.
    """

    def __init__(
        self, folder: Path, most_bytes: int = MOST_BYTES, *, is_reader: bool = False
    ) -> None:
        self._folder = folder
        self._ledger = folder / "ledger.jsonl"
        self._most_bytes = most_bytes
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._seal, self._length, self._allowed = self._read()
            if not is_reader:
                self._mend()
        except OSError as error:
            raise _failed("open", folder, error) from error

    def _mend(self) -> None:
        """Finish what a power cut left: a deletion after its line, a file half written."""
        for path in self._folder.glob("*.safetensors"):
            if path.stem not in self._allowed:
                path.unlink()
        for path in self._folder.glob(f"*{_ARRIVING}"):
            path.unlink()

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices that have mirrored something, in order."""
        return tuple(sorted(path.stem for path in self._folder.glob("*.safetensors")))

    def allows(self, device: str) -> bool:
        """Whether the owner of this device allows mirroring now."""
        return device in self._allowed

    def allow(self, device: str, now: float) -> None:
        """The owner allows it: said by the device itself. Again is no second entry.

        Raises:
            StoreError: the ledger cannot be written.
        """
        if device not in self._allowed:
            self._write(Entry(what="allowed", device=device, at=now))
            self._allowed.add(device)

    def put(self, device: str, payload: bytes, now: float) -> str:
        """Keep these samples in place of older ones; their digest.

        Raises:
            DataError: the owner does not allow it, more bytes than are kept, or no samples.
            CodecError: bytes that are no tensors.
            StoreError: the disk is full, read-only or broken.
        """
        if device not in self._allowed:
            raise DataError(
                f"{device} mirrors data and its owner has not allowed it: refuse what came"
            )
        if len(payload) > self._most_bytes:
            raise DataError(
                f"{device} mirrors {len(payload)} bytes; at most {self._most_bytes} are kept: "
                "mirror fewer samples"
            )
        data = unpack_mirror(payload)
        digest = sample_digest(data)
        try:
            _write_whole(self._path(device), payload)
        except OSError as error:
            raise _failed("write", self._path(device), error) from error
        self._write(
            Entry(
                what="mirrored",
                device=device,
                at=now,
                digest=digest,
                samples=data.samples,
                size_bytes=len(payload),
            )
        )
        return digest

    def read(self, device: str) -> LocalData:
        """The samples of this device.

        Raises:
            DataError: it mirrors nothing, or its file is damaged.
            StoreError: the file cannot be read.
        """
        path = self._path(device)
        try:
            return unpack_mirror(path.read_bytes())
        except FileNotFoundError as error:
            raise DataError(f"{device} mirrors no data: its owner may allow it") from error
        except CodecError as error:
            raise DataError(f"{path} is damaged ({error}): have it mirrored again") from error
        except OSError as error:
            raise _failed("read", path, error) from error

    def revoke(self, device: str, now: float) -> Entry | None:
        """The owner allows it no more: delete what there is; the ledger's entry of that.

        None where the device was not allowed, or had mirrored nothing. It is written down that
        the allowance is over before the file goes, so that a crash between ends in deletion.

        Raises:
            StoreError: the ledger cannot be written or the file cannot be deleted.
        """
        if device not in self._allowed:
            return None
        path = self._path(device)
        gone = self._describe(device, now) if path.is_file() else None
        self._write(Entry(what="revoked", device=device, at=now))
        self._allowed.discard(device)
        try:
            path.unlink(missing_ok=True)
            _sync_folder(self._folder)
        except OSError as error:
            raise _failed("delete", path, error) from error
        if gone is not None:
            self._write(gone)
        return gone

    def ledger(self) -> list[Entry]:
        """All entries, in order.

        Raises:
            StoreError: the ledger cannot be read, or was tampered with: an entry does not name
                the line before it.
        """
        return [entry for entry, _ in self._entries()]

    def _describe(self, device: str, now: float) -> Entry:
        """What is about to go, by the file itself: a crash may have kept it from the ledger."""
        path = self._path(device)
        try:
            payload = path.read_bytes()
        except OSError as error:
            raise _failed("read", path, error) from error
        digest, samples = "", 0
        with contextlib.suppress(CodecError, DataError):  # A damaged file goes all the same.
            data = unpack_mirror(payload)
            digest, samples = sample_digest(data), data.samples
        return Entry(
            what="deleted",
            device=device,
            at=now,
            digest=digest,
            samples=samples,
            size_bytes=len(payload),
        )

    def _read(self) -> tuple[str, int, set[str]]:
        """The last line's seal, the bytes of all whole lines, and who is allowed."""
        seal, length, allowed = "", 0, set[str]()
        for entry, line in self._entries():
            seal, length = hashlib.sha256(line).hexdigest(), length + len(line) + 1
            if entry.what == "allowed":
                allowed.add(entry.device)
            elif entry.what == "revoked":
                allowed.discard(entry.device)
        return seal, length, allowed

    def _entries(self) -> Iterator[tuple[Entry, bytes]]:
        try:
            data = self._ledger.read_bytes() if self._ledger.is_file() else b""
        except OSError as error:
            raise _failed("read", self._ledger, error) from error
        seal = ""
        # What follows the last line's end was being written when the power went: never said.
        for number, line in enumerate(data.split(b"\n")[:-1], start=1):
            try:
                entry = msgspec.json.decode(line, type=Entry)
            except msgspec.DecodeError as error:
                raise StoreError(
                    f"line {number} of {self._ledger} is no entry ({error}): restore it from a copy"
                ) from error
            if entry.before != seal:
                raise StoreError(
                    f"line {number} of {self._ledger} does not follow the line before it; entries "
                    "were changed or left out: restore it from a copy"
                )
            seal = hashlib.sha256(line).hexdigest()
            yield entry, line

    def _write(self, entry: Entry) -> None:
        line = msgspec.json.encode(msgspec.structs.replace(entry, before=self._seal))
        try:
            with self._ledger.open("ab") as file:
                file.truncate(self._length)  # A line that was cut off must not stay before it.
                file.write(line + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _failed("write", self._ledger, error) from error
        self._seal, self._length = hashlib.sha256(line).hexdigest(), self._length + len(line) + 1

    def _path(self, device: str) -> Path:
        if not device or not set(device) <= _NAME:
            raise DataError(f"{device[:80]!r} is no name of a device: refuse what came")
        return self._folder / f"{device}.safetensors"


_ARRIVING = ".arriving"
_NAME = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-")


def _write_whole(path: Path, payload: bytes) -> None:
    """The file is the old one or the new one, through a power cut too."""
    arriving = path.with_suffix(_ARRIVING)
    with arriving.open("wb") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())
    arriving.replace(path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _failed(verb: str, path: Path, error: OSError) -> StoreError:
    return StoreError(f"cannot {verb} {path} ({error.strerror}): mend the disk or its permissions")
