"""Virtual time: a heap of what is to happen, and a clock that jumps to the next of it."""

import heapq
from collections.abc import Callable
from typing import Any

_NEVER = float("inf")


class Clock:
    """Time in seconds, from 0. What is due at the same time happens in the order of asking."""

    __slots__ = ("_asked", "_due", "now")

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._asked = 0

    def call_at(self, at: float, action: Callable[..., object], *arguments: Any) -> None:
        """Do this at that time; at once, after what is due already, if that time is past."""
        self._asked += 1
        heapq.heappush(self._due, (max(at, self.now), self._asked, action, arguments))

    def step(self) -> bool:
        """Jump to what is due next and do it; False if nothing is."""
        if not self._due:
            return False
        self.now, _, action, arguments = heapq.heappop(self._due)
        action(*arguments)
        return True

    @property
    def next_at(self) -> float:
        """When the next thing is due; infinity if nothing is."""
        return self._due[0][0] if self._due else _NEVER


def _do_nothing() -> None:
    pass


class Alarm:
    """A time to wake at; setting it replaces the time before, as `WakeAt` does.

    Setting it to a later time costs nothing: the look at the earlier time finds out.
    """

    __slots__ = ("_action", "_at", "_clock", "_looks_at")

    def __init__(self, clock: Clock, action: Callable[[], object]) -> None:
        self._clock = clock
        self._action = action
        self._at = self._looks_at = _NEVER

    def set(self, at: float) -> None:
        """Act at this time and at no earlier one."""
        self._at = at
        if at < self._looks_at:
            self._looks_at = at
            self._clock.call_at(at, self._look, at)

    def cancel(self) -> None:
        """Do not act."""
        self._at = _NEVER

    def retire(self) -> None:
        """Never act again, and let go of whoever would."""
        self._at = _NEVER
        self._action = _do_nothing

    def _look(self, planned_at: float) -> None:
        if planned_at != self._looks_at:
            return
        self._looks_at = _NEVER
        if self._at > self._clock.now:
            self.set(self._at)
            return
        self._at = _NEVER
        self._action()
