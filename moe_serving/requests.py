"""A request on its way: what is asked, by whom, until when, and its one ending.

Everything that is accepted is a `Ticket`. It ends once, with an `Outcome`; whoever waits hears of
it through `deliver`, from the engine's thread.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from federation.errors import HeadwaterError

Outcome: TypeAlias = Literal[
    "ok", "busy", "over-share", "loading", "draining", "expired", "invalid", "too-large",
    "unknown", "cancelled", "failed",
]  # fmt: skip

HTTP_STATUS: MappingProxyType[Outcome, int] = MappingProxyType(
    {
        "ok": 200,
        "unknown": 404,
        "too-large": 413,
        "invalid": 422,
        "over-share": 429,
        "cancelled": 499,
        "failed": 500,
        "busy": 503,
        "loading": 503,
        "draining": 503,
        "expired": 504,
    }
)
"""What each ending is over HTTP; nobody reads a 499, whose client has gone."""


class RefusedError(HeadwaterError):
    """A request that is not answered, and why; after `retry_after_s`, if above 0, it may be.

    `pointer` is the place in the request that is wrong, where one is.
    """

    def __init__(
        self, outcome: Outcome, reason: str, *, retry_after_s: float = 0.0, pointer: str = ""
    ) -> None:
        super().__init__(reason)
        self.outcome = outcome
        self.reason = reason
        self.retry_after_s = retry_after_s
        self.pointer = pointer


@dataclass(frozen=True, slots=True, kw_only=True)
class Generate:
    """Go on after these tokens, or translate them.

    With a `temperature` of 0 the likeliest token is taken each time; `seed` makes drawn ones
    repeatable, whoever else is served meanwhile. `stop` are runs of tokens that end the answer and
    are not part of it. `top_logprobs` of 0 gives each token's log-probability, above 0 that many
    rivals' too, below 0 none. With `echo` the prompt comes first in the answer.
    """

    tokens: tuple[int, ...]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[tuple[int, ...], ...] = ()
    top_logprobs: int = -1
    echo: bool = False
    streams: bool = False


@dataclass(frozen=True, slots=True)
class Classify:
    """Name the classes of windows [windows, steps, channels], float32."""

    x_BLC: npt.NDArray[np.float32]


Work: TypeAlias = Generate | Classify


class Scored(NamedTuple):
    """A token of an answer, its log-probability if asked for, and the likeliest with theirs."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Generated:
    """Some tokens of an answer; `finish` is empty while more may come."""

    tokens: tuple[Scored, ...]
    finish: Literal["", "stop", "length"] = ""


@dataclass(frozen=True, slots=True)
class Classified:
    """The logits [windows, classes] of what was asked."""

    logits_BK: npt.NDArray[np.float32]


Result: TypeAlias = Generated | Classified


@dataclass(frozen=True, slots=True)
class Ending:
    """How a request ended. Of a streamed answer `result` holds what was not told before."""

    outcome: Outcome
    result: Result | None = None
    reason: str = ""
    retry_after_s: float = 0.0


Deliver: TypeAlias = Callable[[Generated | Ending], None]
"""Hears parts of a streamed answer and then the ending; it is called from the engine's thread,
must only enqueue, and may not fail."""


class Ticket:
    """One accepted request, from its acceptance to its ending.

    Attributes:
        cost: what it takes at most, in tokens (windows, for a classifier).
        accepted_at: when it was accepted, `deadline` when nobody wants the answer any more; both
            in seconds of the engine's clock.
        first_at: when its first token was there; 0 before.
        made: how many tokens were made for it.
    """

    def __init__(
        self, client: str, work: Work, *, accepted_at: float, deadline: float, deliver: Deliver
    ) -> None:
        self.client = client
        self.work = work
        self.cost = cost_of(work)
        self.accepted_at = accepted_at
        self.deadline = deadline
        self.first_at = 0.0
        self.made = 0
        self.is_cancelled = False
        self._deliver = deliver
        self._lock = threading.Lock()
        self._ending: Ending | None = None

    @property
    def ending(self) -> Ending | None:
        """How it ended; None while it has not."""
        return self._ending

    def tell(self, part: Generated) -> None:
        """Hand over a part of the answer."""
        self._deliver(part)

    def settle(self, ending: Ending) -> bool:
        """End it. Only the first ending counts: False says that there was one before."""
        with self._lock:
            if self._ending is not None:
                return False
            self._ending = ending
        self._deliver(ending)
        return True


def cost_of(work: Work) -> int:
    """What a request takes at most: tokens read and tokens made, or windows."""
    match work:
        case Generate():
            return max(1, len(work.tokens) + work.max_tokens)
        case Classify():
            return len(work.x_BLC)


def steps_of(work: Work) -> int:
    """How many steps of the model an answer takes at least, once it runs."""
    return work.max_tokens + 1 if isinstance(work, Generate) else 1
