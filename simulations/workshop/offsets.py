"""Whole reads and writes at an offset: one call of the system moves 2 GiB at most."""

import os


def write_at(descriptor: int, data: bytes, offset: int) -> None:
    """Write all of it.

    Raises:
        OSError: the disk is full or broken; some of it may be written.
    """
    rest = memoryview(data)
    while rest:
        written = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[written:], offset + written


def read_at(descriptor: int, size: int, offset: int) -> bytes:
    """So many bytes, or fewer where the file ends.

    Raises:
        OSError: the disk is broken.
    """
    content = os.pread(descriptor, size, offset)
    if len(content) == size:
        return content
    pieces, read = [content], len(content)
    while pieces[-1] and read < size:
        pieces.append(os.pread(descriptor, size - read, offset + read))
        read += len(pieces[-1])
    return b"".join(pieces)
