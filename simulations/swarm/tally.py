"""What a swarm's agents saw: who was asked, what was finished and answered, how long it took."""

from collections import Counter
from dataclasses import dataclass, field
from typing import get_args

from cloud.coordination.run import parse_attempt
from federation.protocol.messages import Verdict

COUNTED: frozenset[Verdict] = frozenset({"stored", "duplicate"})
"""The verdicts that promise a device that its update counts."""

FINAL = frozenset(get_args(Verdict)) - {"open"}


@dataclass(slots=True)
class Journey:
    """One attempt as its agent saw it; times in seconds of the loop's clock, None: not yet."""

    asked_at: float
    samples: int = 0
    finished_at: float | None = None
    answered_at: float | None = None
    verdict: Verdict | None = None


@dataclass(slots=True)
class Tally:
    """Counts over all agents of a swarm.

    `journeys` are the attempts by name; `drops` counts what befell agents, by what it was.
    """

    journeys: dict[str, Journey] = field(default_factory=dict)
    drops: Counter[str] = field(default_factory=Counter)
    connections: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    letters_up: int = 0
    letters_down: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    answers: int = 0
    newest_round: int = 0

    def asked(self, attempt: str, now: float) -> None:
        """An assignment arrived; the same one may arrive again."""
        if attempt not in self.journeys:
            self.journeys[attempt] = Journey(now)
            parsed = parse_attempt(attempt)
            self.newest_round = max(self.newest_round, parsed[1] if parsed is not None else 0)

    def finished(self, attempt: str, samples: int, now: float) -> None:
        """An update is kept, to be sent until it is answered for."""
        journey = self.journeys.setdefault(attempt, Journey(now))
        journey.finished_at, journey.samples = now, samples

    def answered(self, attempt: str, verdict: Verdict, now: float) -> None:
        """The hub's final word on an update; the first is the one that counts."""
        journey = self.journeys.get(attempt)
        if journey is not None and journey.verdict is None:
            journey.answered_at, journey.verdict = now, verdict
            self.answers += 1

    def forget_traffic(self) -> None:
        """Count letters, bytes and connections from now on."""
        self.letters_up = self.letters_down = self.bytes_up = self.bytes_down = 0
        self.connections = 0

    @property
    def verdicts(self) -> Counter[str]:
        """How many attempts were told what."""
        said = (journey.verdict for journey in self.journeys.values())
        return Counter(verdict for verdict in said if verdict is not None)

    @property
    def unanswered(self) -> int:
        """Updates that are finished and that nobody has answered for."""
        return sum(
            journey.finished_at is not None and journey.verdict is None
            for journey in self.journeys.values()
        )

    def promised(self, run: str) -> dict[tuple[int, str], int]:
        """The updates of a run that devices were told count: samples by round and device."""
        found = {}
        for attempt, journey in self.journeys.items():
            parsed = parse_attempt(attempt)
            if parsed is not None and parsed[0] == run and journey.verdict in COUNTED:
                found[parsed[1], parsed[2]] = journey.samples
        return found

    def delays_s(self) -> list[float]:
        """Seconds from each assignment to the answer to its update, in order of length."""
        return sorted(
            journey.answered_at - journey.asked_at
            for journey in self.journeys.values()
            if journey.answered_at is not None
        )
