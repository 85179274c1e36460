"""Who may wait: a bound in tokens, since what a queue costs is time and not places.

The queue holds at most what the engine does in `target_wait_s` at the rate it was measured to
have. Beyond that a request is refused at once, while it costs nothing; who was accepted is served
soon. A client that already has something waiting is told that it asks too much when it would hold
more than an equal share of the bound, where one share is always left for who comes next.
"""

import math
from dataclasses import dataclass

from moe_serving.fairness import FairQueue
from moe_serving.requests import RefusedError, Ticket


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much may wait, and how long.

    `target_wait_s` times the measured rate is the most that waits; `max_waiting` bounds it in
    requests, whatever they cost. `deadline_s` is a request's deadline if it names none, and the
    longest it may name.
    """

    target_wait_s: float = 5.0
    max_waiting: int = 2048
    deadline_s: float = 30.0


class Rate:
    """Tokens a second while there is enough to do: a mean over about the last `memory_s`.

    It begins with what the calibration at loading gave.
    """

    def __init__(self, tokens_per_s: float, memory_s: float = 5.0) -> None:
        self._memory_s = memory_s
        self._seconds = 0.2 * memory_s
        self._tokens = tokens_per_s * self._seconds

    @property
    def tokens_per_s(self) -> float:
        """The rate; never 0."""
        return max(1e-6, self._tokens / self._seconds)

    def observe(self, tokens: int, seconds: float) -> None:
        """A step took this long. Call it only if more waits: an idle engine is no slow one."""
        fade = math.exp(-seconds / self._memory_s)
        self._tokens = self._tokens * fade + tokens
        self._seconds = self._seconds * fade + seconds


def admit(ticket: Ticket, queue: FairQueue, limits: Limits, rate: Rate, now: float) -> None:
    """Refuse a ticket for which there is no room.

    Raises:
        RefusedError: `over-share`, `busy`, or `expired` if the deadline has passed already.
    """
    if ticket.deadline <= now:
        raise RefusedError("expired", "the deadline passed before the request was accepted")
    bound = limits.target_wait_s * rate.tokens_per_s
    mine, waiting = queue.tokens_of(ticket.client), queue.tokens
    share = bound / (queue.clients + (1 if mine else 2))
    if mine and mine + ticket.cost > share:
        raise RefusedError(
            "over-share",
            f"{mine} tokens of this client are waiting; its share is {share:.0f} now: "
            "ask again when they are answered",
            retry_after_s=_pause_s(mine + ticket.cost - share, rate),
        )
    # An empty queue takes anything: what no bound would ever let in could never be served.
    if waiting and (waiting + ticket.cost > bound or len(queue) >= limits.max_waiting):
        raise RefusedError(
            "busy",
            f"{waiting} tokens are waiting, of at most {bound:.0f}: ask again later",
            retry_after_s=_pause_s(waiting + ticket.cost - bound, rate),
        )


def _pause_s(tokens: float, rate: Rate) -> float:
    """When so much will have been done; at least a second, as Retry-After counts them."""
    return float(max(1, math.ceil(tokens / rate.tokens_per_s)))
