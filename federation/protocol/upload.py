"""Pushing content: what to send now, how much at once, and how fast."""

from itertools import islice
from math import exp

from federation.errors import TransferError
from federation.protocol.bitmap import from_bytes, full, ones
from federation.protocol.messages import Content
from federation.protocol.transfer import Patience, check_content, cut, other_length

MAX_WINDOW = 32
"""More chunks in flight gain nothing and fill the broker's memory when the hub stalls."""

RATE_MEMORY_S = 10.0


class Upload:
    """Push within a window, with selective acknowledgement.

    What was acknowledged is not sent again, however old the acknowledgements that follow;
    except where all of it was, no verdict came, and the receiver, asked again, still lacks
    chunks: it found the whole damaged and takes back what it said. Drop the object when the
    verdict is final; until then `wake_at` asks on.

    The window follows the acknowledgement time as TCP Vegas does (Brakmo and Peterson, 1994):
    it grows while fewer than 2 chunks wait in queues on the way (at first by one with each
    acknowledgement), shrinks above 4, and halves when an acknowledgement fails to come.

    With a pace, no more bytes a second are sent over the whole transfer, however wide the window:
    chunks whose time has not come wait for `on_pace` at `wake_at`.
    """

    def __init__(
        self,
        content: Content,
        data: bytes,
        *,
        window: int = 4,
        timeout_s: float = 10.0,
        pace_bytes_per_s: float = 0.0,
    ):
        if len(data) != check_content(content).size:
            raise TransferError(other_length(content, len(data)))
        self.content = content
        self._data = data
        self._unacked = full(content.chunks)
        self._in_flight: dict[int, float] = {}
        self._window = float(window)
        self._patience = Patience(timeout_s)
        self._quickest_s = float("inf")
        self._is_probing = True
        self._since: float | None = None
        self._is_in_doubt = False
        self._sent_bits = self._spent_s = 0.0
        self._pace = pace_bytes_per_s
        self._next_at = float("-inf")
        self._is_held = False

    @property
    def is_acknowledged(self) -> bool:
        """Whether the receiver has every chunk."""
        return not self._unacked

    @property
    def rate_bps(self) -> float:
        """Bits a second acknowledged of late, idle times left out; 0 while unknown."""
        return self._sent_bits / self._spent_s if self._spent_s > 0 else 0.0

    @property
    def wake_at(self) -> float | None:
        """When a held chunk may go, or silence has lasted long enough; None before `open`."""
        if self._since is None:
            return None
        silent_at = self._since + self._patience.limit_s
        return min(silent_at, self._next_at) if self._is_held else silent_at

    def open(self, now: float) -> None:
        """Begin, or begin again on a new connection: say UpdateOpen and await its answer.

        What is in flight is void, and nothing is sent before the receiver has said what it has.
        """
        self._patience.on_link_up()
        self._quickest_s = float("inf")
        self._in_flight.clear()
        self._is_in_doubt = self._is_held = False
        self._since = now

    def on_ack(self, received: bytes, now: float) -> list[int]:
        """The chunks to send now (see `chunk`), given a bitmap of those received."""
        lacking = full(self.content.chunks) & ~from_bytes(received, self.content.chunks)
        fresh = self._unacked & ~lacking
        self._unacked = lacking if self._is_in_doubt else self._unacked & lacking
        self._is_in_doubt = False
        if self._since is None:
            return []
        delays_s = [now - self._in_flight.pop(i) for i in ones(fresh) if i in self._in_flight]
        if delays_s:
            self._measure(len(delays_s), now)
        for delay_s in delays_s:
            self._patience.on_answer(delay_s)
            self._adapt(delay_s)
        self._since = now
        self._expire(now)
        return self._fill(now)

    def on_timeout(self, now: float) -> bool:
        """At `wake_at`: True if UpdateOpen is to be said again, for there was silence too long."""
        if self._since is None or now < self._since + self._patience.limit_s:
            return False
        if self._in_flight:
            self._window = max(1.0, self._window / 2)
        self._patience.on_silence()
        self._in_flight.clear()
        self._is_in_doubt, self._is_held = self.is_acknowledged, False
        self._since = now
        return True

    def on_pace(self, now: float) -> list[int]:
        """The chunks that were held back and may go now."""
        return self._fill(now) if self._is_held and now >= self._next_at else []

    def chunk(self, index: int) -> tuple[int, bytes]:
        """The CRC-32 of a chunk, and the chunk."""
        return cut(self._data, self.content, index)

    def _measure(self, chunks: int, now: float) -> None:
        elapsed_s = now - (self._since if self._since is not None else now)
        kept = exp(-max(elapsed_s, 0.0) / RATE_MEMORY_S)
        self._sent_bits = self._sent_bits * kept + 8.0 * chunks * self.content.chunk_bytes
        self._spent_s = self._spent_s * kept + elapsed_s

    def _adapt(self, delay_s: float) -> None:
        self._quickest_s = min(self._quickest_s, delay_s)
        queued = self._window * (1 - self._quickest_s / delay_s) if delay_s > 0 else 0.0
        self._is_probing = self._is_probing and queued < 2
        if queued < 2:
            growth = 1.0 if self._is_probing else 1 / self._window
            self._window = min(self._window + growth, MAX_WINDOW)
        elif queued > 4:
            self._window = max(self._window - 1 / self._window, 2.0)

    def _expire(self, now: float) -> None:
        limit_s = self._patience.limit_s
        lost = [i for i, sent_at in self._in_flight.items() if now >= sent_at + limit_s]
        for index in lost:
            del self._in_flight[index]
        if lost:
            self._window = max(1.0, self._window / 2)

    def _fill(self, now: float) -> list[int]:
        free = max(int(self._window) - len(self._in_flight), 0)
        waiting = (i for i in ones(self._unacked) if i not in self._in_flight)
        sending = list(islice(waiting, free))
        if self._pace > 0:
            sending = self._paced(sending, now)
        self._in_flight.update(dict.fromkeys(sending, now))
        return sending

    def _paced(self, ready: list[int], now: float) -> list[int]:
        """One of these, if its time has come; the others are held back."""
        due = [] if now < self._next_at else ready[:1]
        if due:
            self._next_at = max(now, self._next_at) + self.content.chunk_bytes / self._pace
            self._since = now  # What is sent now cannot have been answered before.
        self._is_held = len(ready) > len(due)
        return due
