"""A content on disk as far as it has been fetched: its bytes in place, and an index of chunks.

The index begins with the content's size and chunk size and goes on with one record a chunk,
each with a checksum of its own. A chunk counts only if its bytes match its record, so neither
file needs to reach the disk before the other: what a power loss takes is fetched again.
"""

import os
import struct
import zlib
from pathlib import Path

from edge_agent.durable import remove, set_aside, store_error, sync_folder, write_whole
from federation.errors import TransferError
from federation.protocol.messages import Content
from federation.protocol.transfer import check_content

SYNC_BYTES = 1024 * 1024
"""After so many bytes they are forced to disk: the most that a power loss takes back."""

_HEADER = struct.Struct("<QI")
_RECORD = struct.Struct("<II")
_CHECK = struct.Struct("<I")
_HEADER_BYTES = _HEADER.size + _CHECK.size
_RECORD_BYTES = _RECORD.size + _CHECK.size


class Partial:
    """One content under way, open for writing."""

    def __init__(self, folder: Path, content: Content) -> None:
        """Go on with what is there of this content, or begin.

        Raises:
            TransferError: a manifest whose digest may not name a file.
            StoreError: the disk is full, read-only or broken.
        """
        self.content = check_content(content)
        self._data_path, self._index_path = paths(folder, content.digest)
        if read_content(self._index_path) != content:
            remove(self._data_path)
            header = _HEADER.pack(content.size, content.chunk_bytes)
            write_whole(self._index_path, _checked(header))
        try:
            self._data = os.open(self._data_path, os.O_RDWR | os.O_CREAT, 0o600)
            self._index = os.open(self._index_path, os.O_RDWR)
            sync_folder(folder)
            records = (os.fstat(self._index).st_size - _HEADER_BYTES) // _RECORD_BYTES
        except OSError as error:
            raise store_error("open", self._data_path, error) from error
        self._end = _HEADER_BYTES + max(records, 0) * _RECORD_BYTES
        self._unsynced = 0

    def write(self, index: int, data: bytes) -> None:
        """Put a verified chunk in its place.

        Raises:
            StoreError: the disk is full, read-only or broken; the chunk does not count.
        """
        record = _checked(_RECORD.pack(index, zlib.crc32(data)))
        try:
            _write_at(self._data, data, index * self.content.chunk_bytes)
            _write_at(self._index, record, self._end)
            self._unsynced += len(data)
            if self._unsynced >= SYNC_BYTES:
                os.fsync(self._data)
                os.fsync(self._index)
                self._unsynced = 0
        except OSError as error:
            raise store_error("write", self._data_path, error) from error
        self._end += _RECORD_BYTES

    def close(self) -> None:
        """Let go of the files."""
        os.close(self._data)
        os.close(self._index)


def paths(folder: Path, digest: str) -> tuple[Path, Path]:
    """Where the bytes and the index of a content are."""
    return folder / f"{digest}.part", folder / f"{digest}.index"


def read_content(index_path: Path) -> Content | None:
    """The manifest in an index; None if there is none or it was damaged and set aside."""
    try:
        with index_path.open("rb") as file:
            header = _unchecked(file.read(_HEADER_BYTES), _HEADER)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise store_error("read", index_path, error) from error
    if header is not None:
        size, chunk_bytes = _HEADER.unpack(header)
        content = Content(digest=index_path.stem, size=size, chunk_bytes=chunk_bytes)
        try:
            return check_content(content)
        except TransferError:
            pass
    set_aside(index_path, "its beginning is not that of an index")
    return None


def read_parts(index_path: Path) -> dict[int, bytes]:
    """The chunks of a content whose bytes match their records, by index."""
    content = read_content(index_path)
    data_path = index_path.with_suffix(".part")
    if content is None or not data_path.exists():
        return {}
    try:
        records = index_path.read_bytes()[_HEADER_BYTES:]
        with data_path.open("rb") as data:
            return dict(_verified(data.fileno(), content, records))
    except OSError as error:
        raise store_error("read", data_path, error) from error


def forget(folder: Path, digest: str) -> None:
    """Remove what there is of a content; the index first, for bytes without one count for nothing.

    Raises:
        StoreError: the files cannot be removed.
    """
    data_path, index_path = paths(folder, digest)
    remove(index_path)
    remove(data_path)


def _verified(data: int, content: Content, records: bytes) -> list[tuple[int, bytes]]:
    found = []
    for start in range(0, len(records), _RECORD_BYTES):
        record = _unchecked(records[start : start + _RECORD_BYTES], _RECORD)
        if record is None:
            continue  # Torn or damaged: that chunk is fetched again.
        index, crc32 = _RECORD.unpack(record)
        offset = index * content.chunk_bytes
        chunk = os.pread(data, max(min(content.chunk_bytes, content.size - offset), 0), offset)
        if chunk and zlib.crc32(chunk) == crc32:
            found.append((index, chunk))
    return found


def _write_at(descriptor: int, data: bytes, offset: int) -> None:
    rest = memoryview(data)
    while rest:
        written = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[written:], offset + written


def _checked(body: bytes) -> bytes:
    return body + _CHECK.pack(zlib.crc32(body))


def _unchecked(data: bytes, layout: struct.Struct) -> bytes | None:
    body = data[: layout.size]
    return body if data == _checked(body) and len(body) == layout.size else None
