"""Whose turn it is: deficit round robin over clients, earliest deadline first inside each.

Deficit round robin (Shreedhar and Varghese, SIGCOMM 1995): clients stand in a ring. One whose turn
comes gains a quantum of tokens and is served while its gains last, so over time each gets the
same share of tokens, however long its requests are and however many it sends.
"""

import bisect
import itertools
from collections import deque
from dataclasses import dataclass, field

from moe_serving.requests import Ticket

QUANTUM = 512
"""Tokens that a turn adds: about one request, so that turns are neither empty nor long."""


@dataclass(slots=True)
class _Line:
    """What one client has waiting, by deadline, and what it may still spend in its turn."""

    waiting: list[tuple[float, int, Ticket]] = field(default_factory=list)
    tokens: int = 0
    deficit: int = 0
    has_turn: bool = False


class FairQueue:
    """Tickets that wait. Not thread-safe: the engine holds its lock around each call."""

    def __init__(self) -> None:
        self._lines: dict[str, _Line] = {}
        self._ring: deque[str] = deque()
        self._serials = itertools.count()
        self._places: dict[Ticket, tuple[float, int]] = {}
        self.tokens = 0

    def __len__(self) -> int:
        return len(self._places)

    @property
    def clients(self) -> int:
        """How many clients have something waiting."""
        return len(self._lines)

    def tokens_of(self, client: str) -> int:
        """What this client has waiting, in tokens."""
        line = self._lines.get(client)
        return line.tokens if line is not None else 0

    def oldest(self) -> Ticket | None:
        """The ticket that has waited longest."""
        return next(iter(self._places), None)

    def earliest_deadline(self) -> float:
        """The next deadline that passes; infinity if nothing waits."""
        return min((line.waiting[0][0] for line in self._lines.values()), default=float("inf"))

    def put(self, ticket: Ticket) -> None:
        """Let a ticket wait for its turn."""
        line = self._lines.get(ticket.client)
        if line is None:
            line = self._lines[ticket.client] = _Line()
            self._ring.append(ticket.client)
        place = (ticket.deadline, next(self._serials))
        self._places[ticket] = place
        bisect.insort(line.waiting, (*place, ticket), key=_place)
        line.tokens += ticket.cost
        self.tokens += ticket.cost

    def peek(self) -> Ticket | None:
        """The ticket whose turn it is; it still waits."""
        while self._ring:
            line = self._lines[self._ring[0]]
            if not line.has_turn:
                line.has_turn = True
                line.deficit += QUANTUM
            _, _, ticket = line.waiting[0]
            if ticket.cost <= line.deficit:
                return ticket
            line.has_turn = False
            self._ring.rotate(-1)
        return None

    def pop(self) -> Ticket | None:
        """The ticket whose turn it is; it waits no longer, and its client has spent its cost."""
        ticket = self.peek()
        if ticket is not None:
            self._lines[ticket.client].deficit -= ticket.cost
            self.remove(ticket)
        return ticket

    def remove(self, ticket: Ticket) -> bool:
        """Let a ticket wait no longer; False: it did not wait."""
        place = self._places.pop(ticket, None)
        if place is None:
            return False
        line = self._lines[ticket.client]
        del line.waiting[bisect.bisect_left(line.waiting, place, key=_place)]
        line.tokens -= ticket.cost
        self.tokens -= ticket.cost
        if not line.waiting:
            # What a client saved up goes with it: nobody gains by waiting without work.
            del self._lines[ticket.client]
            self._ring.remove(ticket.client)
        return True

    def expire(self, now: float) -> list[Ticket]:
        """Take out all whose deadline has passed."""
        late = [
            ticket
            for line in self._lines.values()
            for deadline, _, ticket in itertools.takewhile(
                lambda each: each[0] <= now, line.waiting
            )
        ]
        for ticket in late:
            self.remove(ticket)
        return late

    def clear(self) -> list[Ticket]:
        """Take out all."""
        everyone = list(self._places)
        for ticket in everyone:
            self.remove(ticket)
        return everyone


def _place(entry: tuple[float, int, Ticket]) -> tuple[float, int]:
    return entry[:2]
