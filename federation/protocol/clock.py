"""One clock for a process: it names moments as wall time does, and never jumps."""

import time
from collections.abc import Callable


def steady_clock() -> Callable[[], float]:
    """A clock in seconds since 1970 that only goes forward, at the rate of true seconds.

    It reads the wall clock once and counts on from there, so that setting the clock back by an
    hour moves no deadline. Two processes may differ; what they tell each other are remaining
    seconds.
    """
    offset = time.time() - time.monotonic()  # noqa: TID251 -- the one place that reads it
    return lambda: offset + time.monotonic()
