"""Who may wait: a bound in tokens, since what a queue costs is time and not places.

The queue holds at most what the engine does in `target_wait_s` at the rate it was measured to
have. Beyond that a request is refused at once, while it costs nothing; who was accepted is served
soon. A client that already has something waiting is told that it asks too much when it would hold
more than an equal share of the bound, where one share is always left for who comes next.
"""

import math
from dataclasses import dataclass

from moe_serving.fairness import FairQueue
from moe_serving.requests import RefusedError, Ticket, steps_of


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


class Pace:
    """How fast a model works: tokens a second while there is enough to do, and seconds a step.

    It begins with what the calibration at loading gave; the rate is a mean over about the last
    `memory_s` seconds of work under pressure, the time of a step over about the last ten.
    """

    def __init__(self, tokens_per_s: float, step_s: float = 0.0, memory_s: float = 5.0) -> None:
        self.step_s = step_s
        self._memory_s = memory_s
        self._seconds = 0.2 * memory_s
        self._tokens = tokens_per_s * self._seconds

    @property
    def tokens_per_s(self) -> float:
        """The rate; never 0."""
        return max(1e-6, self._tokens / self._seconds)

    def observe(self, tokens: int, seconds: float, *, is_pressed: bool) -> None:
        """A step took this long; `is_pressed`: more waits. An idle engine is no slow one."""
        self.step_s += 0.1 * (seconds - self.step_s)
        if is_pressed:
            fade = math.exp(-seconds / self._memory_s)
            self._tokens = self._tokens * fade + tokens
            self._seconds = self._seconds * fade + seconds


class Admission:
    """Refuses tickets for which there is no room, or no time."""

    def __init__(self, limits: Limits, pace: Pace) -> None:
        self.limits = limits
        self.pace = pace
        self._turned_away_until = 0.0
        self._has_turned_away = False

    def is_pressed(self, queue: FairQueue) -> bool:
        """Whether more is asked than done: something waits, or was sent away since last asked."""
        is_so, self._has_turned_away = bool(queue) or self._has_turned_away, False
        return is_so

    def admit(self, ticket: Ticket, queue: FairQueue, now: float, running: int = 0) -> None:
        """Let a ticket wait; `running` is the tokens left to do of those that run.

        Raises:
            RefusedError: `over-share`, `busy`, or `expired` if the deadline has passed already.
        """
        if ticket.deadline <= now:
            raise RefusedError("expired", "the deadline passed before the request was accepted")
        rate = self.pace.tokens_per_s
        bound = self.limits.target_wait_s * rate
        mine, waiting = queue.tokens_of(ticket.client), queue.tokens
        share = bound / (queue.clients + (1 if mine else 2))
        if mine and mine + ticket.cost > share:
            raise RefusedError(
                "over-share",
                f"{mine} tokens of this client are waiting; its share is {share:.0f} now: "
                "ask again when they are answered",
                retry_after_s=float(max(1, math.ceil((mine + ticket.cost - share) / rate))),
            )
        # An empty queue takes anything: what no bound would ever let in could never be served.
        is_full = waiting + ticket.cost > bound or len(queue) >= self.limits.max_waiting
        if waiting and is_full:
            raise self._busy(ticket, f"{waiting} tokens are waiting, of at most {bound:.0f}", now)
        # Those that run share the model: all that is ahead is done by the time this one is.
        ahead = waiting + running
        likely_s = max((ahead + ticket.cost) / rate, steps_of(ticket.work) * self.pace.step_s)
        if ahead and now + likely_s > ticket.deadline:
            left_s = ticket.deadline - now
            reason = f"an answer would take {likely_s:.1f} s, and its deadline is in {left_s:.1f} s"
            raise self._busy(ticket, reason, now)

    def _busy(self, ticket: Ticket, reason: str, now: float) -> RefusedError:
        """Who is sent away is told to come one after the other, as if they stood in a line."""
        self._has_turned_away = True
        rate = self.pace.tokens_per_s
        soonest, latest = now + 1.0, now + self.limits.deadline_s
        at = max(self._turned_away_until, soonest) + ticket.cost / rate
        self._turned_away_until = min(at, latest)
        pause_s = float(math.ceil(self._turned_away_until - now))
        return RefusedError("busy", f"{reason}: ask again later", retry_after_s=pause_s)
