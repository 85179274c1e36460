"""Sets of chunk indices as bits: bit n of byte n // 8, lowest first; within, as one integer."""

from collections.abc import Iterable, Iterator


def bitmap(indices: Iterable[int], count: int) -> bytes:
    """The indices below `count` as bits."""
    bits = 0
    for index in indices:
        bits |= 1 << index
    return to_bytes(bits & full(count), count)


def indices_in(bitmap: bytes, count: int) -> frozenset[int]:
    """The indices set in a bitmap; bits from `count` on are ignored, absent ones are unset."""
    return frozenset(ones(from_bytes(bitmap, count)))


def full(count: int) -> int:
    """All indices below `count`."""
    return (1 << count) - 1


def to_bytes(bits: int, count: int) -> bytes:
    """The bitmap of an integer's bits."""
    return bits.to_bytes(-(-count // 8), "little")


def from_bytes(bitmap: bytes, count: int) -> int:
    """The bits of a bitmap below `count`, as an integer."""
    return int.from_bytes(bitmap[: -(-count // 8)], "little") & full(count)


def ones(bits: int) -> Iterator[int]:
    """The indices of the bits that are set, in order."""
    while bits:
        lowest = bits & -bits
        yield lowest.bit_length() - 1
        bits ^= lowest
