"""Bytes from one process to another through shared memory, with a few bytes over a socket.

A parcel is a file without a name, in memory: an index of sizes, then the parts. What goes over
the socket is the file's descriptor and the size of its index, so nothing is copied but into the
file and out of it. Nobody needs to clean up: the memory goes with the last descriptor, when a
process is killed too.
"""

import os
import socket
import struct
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from simulations.workshop.offsets import read_at, write_at

_HEADER = struct.Struct("<QQQ")
_FILES = 2
"""A parcel, and what it shares with others."""


@dataclass(frozen=True, slots=True)
class SharedFile:
    """Parts in memory that other processes can read; `serial` tells it from any other."""

    descriptor: int
    index_bytes: int
    serial: int = 0

    def read(self) -> list[bytes]:
        """Copies of the parts."""
        index = os.pread(self.descriptor, self.index_bytes, 0)
        parts, offset = [], self.index_bytes
        for size in msgspec.msgpack.decode(index, type=list[int]):
            parts.append(read_at(self.descriptor, size, offset))
            offset += size
        return parts

    def close(self) -> None:
        """Let go of it; it stays for whom it was sent to."""
        os.close(self.descriptor)


def shared_file(parts: Sequence[bytes], serial: int = 0) -> SharedFile:
    """A new file of these parts. Files that go to one receiver have serials of their own."""
    index = msgspec.msgpack.encode([len(part) for part in parts])
    descriptor = _nameless_file()
    offset = 0
    for part in (index, *parts):
        write_at(descriptor, part, offset)
        offset += len(part)
    return SharedFile(descriptor, len(index), serial)


def send_parcel(
    channel: socket.socket, parts: Sequence[bytes], shared: SharedFile | None = None
) -> None:
    """Send a parcel, and with it a shared file that stays the sender's to close.

    Raises:
        OSError: the other side is gone.
    """
    parcel = shared_file(parts)
    try:
        if shared is None:
            header, files = _HEADER.pack(parcel.index_bytes, 0, 0), [parcel.descriptor]
        else:
            header = _HEADER.pack(parcel.index_bytes, shared.index_bytes, shared.serial)
            files = [parcel.descriptor, shared.descriptor]
        socket.send_fds(channel, [header], files)
    finally:
        parcel.close()


class Receiver:
    """Takes parcels from a channel; what several in a row share is read once."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._serial = 0
        self._shared: list[bytes] = []

    def receive(self) -> tuple[list[bytes], list[bytes]] | None:
        """The parts of the next parcel and of what it shares; None when the sender is gone."""
        try:
            header, files, _, _ = socket.recv_fds(self._channel, _HEADER.size, _FILES)
        except OSError:
            return None
        try:
            if len(header) < _HEADER.size:
                return None
            parcel_bytes, shared_bytes, serial = _HEADER.unpack(header)
            if serial and serial != self._serial:
                self._shared = SharedFile(files[1], shared_bytes, serial).read()
                self._serial = serial
            return SharedFile(files[0], parcel_bytes).read(), self._shared if serial else []
        finally:
            for file in files:
                os.close(file)


def _nameless_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("headwater", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
