"""One thread that owns one model, and the only way to it.

`submit` puts a ticket into a bounded queue, from any thread; the engine's thread takes tickets out
in fair order, steps the model, and settles each ticket once. Nothing else touches the model.
"""

import logging
import math
import threading
from collections.abc import Callable
from typing import Protocol

from moe_serving.admission import Admission, Limits, Pace
from moe_serving.batching import Batcher
from moe_serving.fairness import FairQueue
from moe_serving.requests import Ending, RefusedError, Ticket

_log = logging.getLogger("headwater.moe.engine")


class Observer(Protocol):
    """What an engine tells whoever counts."""

    def on_settled(self, ticket: Ticket, ending: Ending, now: float) -> None:
        """A ticket has ended."""
        ...

    def on_step(self, tokens: int, seconds: float, waiting_tokens: int, running: int) -> None:
        """A step of the model was done."""
        ...


class Engine:
    """Serves one model until `close`. `clock` gives seconds and never jumps."""

    def __init__(
        self,
        name: str,
        batcher: Batcher,
        limits: Limits,
        pace: Pace,
        *,
        observer: Observer,
        clock: Callable[[], float],
    ) -> None:
        self.limits = limits
        self.clock = clock
        self._batcher = batcher
        self._pace = pace
        self._admission = Admission(limits, pace)
        self._observer = observer
        self._queue = FairQueue()
        self._bell = threading.Condition()
        self._is_draining = False
        self._is_closed = False
        self._is_at_work = False
        self._left_tokens = 0
        self._thread = threading.Thread(target=self._run, name=f"engine {name}", daemon=True)

    @property
    def tokens_per_s(self) -> float:
        """The rate that admission goes by."""
        return self._pace.tokens_per_s

    @property
    def waiting_tokens(self) -> int:
        """Tokens in the queue."""
        return self._queue.tokens

    @property
    def unfinished(self) -> int:
        """How many requests wait or run."""
        with self._bell:
            return len(self._queue) + len(self._batcher.running)

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def submit(self, ticket: Ticket) -> None:
        """Accept a ticket; from any thread.

        Raises:
            RefusedError: The model cannot answer it, there is no room, or the engine is ending.
                The ticket was not accepted, and is not settled.
        """
        self._batcher.check(ticket.work)
        with self._bell:
            if self._is_draining:
                raise RefusedError("draining", "the model is being put away", retry_after_s=1.0)
            self._admission.admit(ticket, self._queue, self.clock(), self._left_tokens)
            self._queue.put(ticket)
            self._bell.notify_all()

    def cancel(self, ticket: Ticket) -> None:
        """Its client has gone: end it now if it waits, or at the next step; from any thread."""
        with self._bell:
            ticket.is_cancelled = True
            is_waiting = self._queue.remove(ticket)
        if is_waiting:
            self._settle(ticket, Ending("cancelled", reason="the client has gone"))

    def drain(self, grace_s: float) -> bool:
        """Accept no more, and wait until all has ended; False if some had not in time."""
        with self._bell:
            self._is_draining = True
            return self._bell.wait_for(self._is_idle, timeout=grace_s)

    def close(self) -> int:
        """End the thread, and what is left with `draining`; how many those were."""
        with self._bell:
            self._is_draining = self._is_closed = True
            self._bell.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        left = [*self._queue.clear(), *self._batcher.running]
        for ticket in left:
            self._batcher.leave(ticket)
            self._settle(ticket, Ending("draining", reason=_PUT_AWAY, retry_after_s=1.0))
        return len(left)

    def _is_idle(self) -> bool:
        return not self._queue and not self._is_at_work

    def _run(self) -> None:
        while self._wait():
            try:
                self._turn()
            except Exception as error:  # the outermost loop: what was running fails, the rest lives
                _log.exception("step failed")
                self._fail_running(error)
            with self._bell:
                self._is_at_work = bool(self._batcher.running)
                self._bell.notify_all()

    def _wait(self) -> bool:
        """Until there is something worth a step; False at the end."""
        with self._bell:
            while not self._is_closed and not self._batcher.running:
                pause_s = self._pause_s()
                if pause_s <= 0:
                    break
                self._bell.wait(None if math.isinf(pause_s) else pause_s)
            self._is_at_work = not self._is_closed
            return self._is_at_work

    def _pause_s(self) -> float:
        oldest = self._queue.oldest()
        if oldest is None:
            return math.inf
        now = self.clock()
        left_s = self._queue.earliest_deadline() - now
        return self._batcher.patience_s(self._queue.tokens, now - oldest.accepted_at, left_s)

    def _turn(self) -> None:
        """Take in who may join, let go who must, and do one step."""
        begun = self.clock()
        with self._bell:
            late = self._queue.expire(begun)
            self._take_in()
            is_pressed = self._admission.is_pressed(self._queue)
        for ticket in late:
            self._settle(ticket, Ending("expired", reason="the deadline passed in the queue"))
        self._let_go(begun)
        if not self._batcher.running:
            return
        tokens, ended = self._batcher.step(begun)
        self._left_tokens = self._batcher.left_tokens()
        now = self.clock()
        for ticket, ending in ended:
            self._settle(ticket, ending)
        self._pace.observe(tokens, now - begun, is_pressed=is_pressed)
        running = len(self._batcher.running)
        self._observer.on_step(tokens, now - begun, self._queue.tokens, running)

    def _take_in(self) -> None:
        while (ticket := self._queue.peek()) is not None and self._batcher.has_room(ticket):
            self._queue.pop()
            self._batcher.join(ticket)

    def _let_go(self, now: float) -> None:
        """Those whose client has gone, and those that another step would bring too late."""
        until = now + self._pace.step_s
        for ticket in self._batcher.running:
            if ticket.is_cancelled:
                self._batcher.leave(ticket)
                self._settle(ticket, Ending("cancelled", reason="the client has gone"))
            elif ticket.deadline <= until:
                self._batcher.leave(ticket)
                self._settle(ticket, Ending("expired", reason="the deadline passed midway"))

    def _fail_running(self, error: Exception) -> None:
        for ticket in self._batcher.running:
            self._batcher.leave(ticket)
            self._settle(ticket, Ending("failed", reason=f"the model failed: {error}"))

    def _settle(self, ticket: Ticket, ending: Ending) -> None:
        if ticket.settle(ending):
            self._observer.on_settled(ticket, ending, self.clock())


_PUT_AWAY = "the server stopped before the request was answered: ask again"
