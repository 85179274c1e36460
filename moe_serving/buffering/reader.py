"""A thread that reads ahead: what a visit needs, in its order, and then what is foreseen."""

import threading
import time
from collections import deque
from collections.abc import Sequence

from federation.errors import StoreError
from moe_serving.buffering.source import Buffer, Source


class Reader:
    """Fills free buffers with wanted experts, and hands them over.

    Demands are read in the order they will be taken. Foreseen experts are read when no demand is
    left to read, and hold at most `foreseen_most` buffers; so when the next demands come, one
    buffer at least is free for them, and they never wait for each other.

    Args:
        source: Where experts come from. The reader closes it.
        buffers: All that are free now; more than `foreseen_most`.
        foreseen_most: How many may hold experts that nobody has asked for yet.
    """

    def __init__(self, source: Source, buffers: Sequence[Buffer], foreseen_most: int):
        self.stall_s = 0.0
        self.bytes_read = 0
        self._source = source
        self._free = list(buffers)
        self._foreseen_most = foreseen_most
        self._demanded: deque[int] = deque()
        self._foreseen: deque[int] = deque()
        self._wanted: frozenset[int] = frozenset()
        self._early: frozenset[int] = frozenset()
        self._ready: dict[int, Buffer | StoreError] = {}
        self._reading: int | None = None
        self._is_closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="expert-reader", daemon=True)
        self._thread.start()

    def ask(self, demanded: Sequence[int], foreseen: Sequence[int]) -> int:
        """Replaces all that was asked for.

        Args:
            demanded: Keys that will be taken in this order.
            foreseen: Keys that may be demanded next, likeliest first.

        Returns:
            How many of the demanded are here, or on their way, since they were foreseen.
        """
        with self._changed:
            self._wanted = frozenset(demanded).union(foreseen)
            self._early = frozenset(foreseen).difference(demanded)
            for key, found in list(self._ready.items()):
                if key not in self._wanted or isinstance(found, StoreError):
                    self._discard(self._ready.pop(key))
            known = {*self._ready, self._reading}
            self._demanded = deque(key for key in demanded if key not in known)
            self._foreseen = deque(key for key in foreseen if key not in known)
            self._changed.notify_all()
            return len(demanded) - len(self._demanded)

    def take(self, key: int) -> Buffer:
        """Waits for a demanded expert and gives its buffer, to be given back.

        Raises:
            StoreError: It could not be read.
        """
        with self._changed:
            if key not in self._ready:
                began_s = time.perf_counter()
                self._changed.wait_for(lambda: key in self._ready or self._is_closed)
                self.stall_s += time.perf_counter() - began_s
            found = self._ready.pop(key, None)
        if found is None:
            raise StoreError("the store of experts was closed; load the model again")
        if isinstance(found, StoreError):
            raise found
        return found

    def give_back(self, buffer: Buffer) -> None:
        """Frees a buffer whose expert has run."""
        buffer.release()
        with self._changed:
            self._free.append(buffer)
            self._changed.notify_all()

    def close(self) -> None:
        """Ends the thread and closes the source; twice does no harm."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()
        self._source.close()

    def _work(self) -> None:
        while (job := self._next()) is not None:
            key, buffer = job
            try:
                self._source.read(key, buffer)
                result: Buffer | StoreError = buffer
            except StoreError as error:
                result = error
            except Exception as error:  # outermost: whoever waits must hear of it, and not wait
                result = StoreError(f"an expert cannot be read ({error!r}): report this")
            with self._changed:
                self._reading = None
                self.bytes_read += self._source.size_bytes
                if isinstance(result, StoreError):
                    self._free.append(buffer)
                if key in self._wanted:
                    self._ready[key] = result
                else:
                    self._discard(result)
                self._changed.notify_all()

    def _next(self) -> tuple[int, Buffer] | None:
        """Waits for something to read and a buffer to read it to; None when closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or (self._free and self._has_work()))
            if self._is_closed:
                return None
            queue = self._demanded or self._foreseen
            self._reading = queue.popleft()
            return self._reading, self._free.pop()

    def _has_work(self) -> bool:
        if self._demanded:
            return True
        held = sum(key in self._early for key in self._ready)
        return bool(self._foreseen) and held < self._foreseen_most

    def _discard(self, found: Buffer | StoreError) -> None:
        if isinstance(found, Buffer):
            self._free.append(found)
