"""The C library's allocator, set up for training."""

import ctypes
from functools import cache

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3

_KEPT_BYTES = 1 << 28
_MAPPED_BYTES = 1 << 30


@cache
def keep_freed_memory() -> bool:
    """Let the process keep up to 256 MB that it freed, for what it allocates next.

    A step of training frees its tensors, and the next asks for as many. glibc gives pieces of
    megabytes back to the system at once and gets them back zeroed, page by page: of a small CNN
    that was 8 % of a step. It is done once a process, and only where the C library is glibc.

    Returns:
        Whether it was done.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    numbers = (
        (_M_MMAP_THRESHOLD, _MAPPED_BYTES),
        (_M_TRIM_THRESHOLD, _KEPT_BYTES),
        (_M_TOP_PAD, _KEPT_BYTES >> 4),
    )
    done = [mallopt(name, size) == 1 for name, size in numbers]
    return all(done)
