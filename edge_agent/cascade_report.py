"""What a cascade did and what it took, counted."""

from collections import deque
from statistics import median

import msgspec

RECENT = 512
"""So many of the newest times are kept to say what is usual."""


class CascadeReport(msgspec.Struct, frozen=True, kw_only=True):
    """A cascade's account.

    Of `windows`, `cached` were known, `asked` went up (`explored` of them although the device was
    sure) and `unanswered` came to nothing. `agreed` is how many of the hub's answers were the
    device's own. Times are in seconds, over the newest exchanges: `local_s` for what the
    device does itself of a call, `hub_s` for a question and its answer, `slowest_s` for the
    slowest of these. `threshold` is the confidence from which on the device does not ask now.
    """

    windows: int
    cached: int
    asked: int
    explored: int
    unanswered: int
    heard: int
    agreed: int
    questions: int
    up_bytes: int
    down_bytes: int
    local_s: float
    hub_s: float
    slowest_s: float
    threshold: float

    @property
    def asked_share(self) -> float:
        """The share of all windows that went up."""
        return self.asked / max(1, self.windows)

    @property
    def agreement(self) -> float:
        """The share of the hub's answers that were the device's own."""
        return self.agreed / max(1, self.heard)

    def told(self) -> str:
        """The account in words, on one line."""
        return (
            f"{self.windows} windows, {self.asked} asked ({100 * self.asked_share:.1f} %), "
            f"{self.unanswered} unanswered, {self.cached} from the cache; the hub agreed on "
            f"{self.agreed} of {self.heard}; {self.up_bytes} bytes up, {self.down_bytes} down; "
            f"{1000 * self.local_s:.1f} ms here, {1000 * self.hub_s:.1f} ms with the hub; "
            f"sure from {self.threshold:.3f}"
        )


class Tally:
    """Counts; gives a `CascadeReport`."""

    def __init__(self) -> None:
        self._counts = dict.fromkeys(
            (
                *("windows", "cached", "asked", "explored", "unanswered"),
                *("heard", "agreed", "questions", "up_bytes", "down_bytes"),
            ),
            0,
        )
        self._local: deque[float] = deque(maxlen=RECENT)
        self._hub: deque[float] = deque(maxlen=RECENT)

    def count(self, windows: int, *, cached: int) -> None:
        """Windows came, of which some were known."""
        self._add(windows=windows, cached=cached)

    def took(self, seconds: float) -> None:
        """The device's own part of a call took this long."""
        self._local.append(seconds)

    def send(self, *, is_explored: bool) -> None:
        """A window goes up."""
        self._add(asked=1, explored=int(is_explored))

    def hear(self, *, agreed: bool) -> None:
        """The hub has answered about a window."""
        self._add(heard=1, agreed=int(agreed))

    def advised(self, seconds: float, up_bytes: int, down_bytes: int) -> None:
        """A question was answered."""
        self._add(questions=1, up_bytes=up_bytes, down_bytes=down_bytes)
        self._hub.append(seconds)

    def unadvised(self, seconds: float, up_bytes: int, windows: int) -> None:
        """A question was not answered in time."""
        self._add(questions=1, up_bytes=up_bytes, unanswered=windows)
        self._hub.append(seconds)

    def report(self, threshold: float) -> CascadeReport:
        """The account so far."""
        return CascadeReport(
            **self._counts,
            local_s=median(self._local) if self._local else 0.0,
            hub_s=median(self._hub) if self._hub else 0.0,
            slowest_s=max(self._hub, default=0.0),
            threshold=threshold,
        )

    def _add(self, **counts: int) -> None:
        for name, count in counts.items():
            self._counts[name] += count
