"""Collects the effects of one step of the hub, in the order in which they must happen."""

from cloud.coordination.facts import HubFact, LetterRefused
from federation.protocol.effects import Effect, Record, Send, WakeAt
from federation.protocol.messages import AnyLetter

REFUSALS_A_MINUTE = 20

MAX_SENDERS = 10_000


class Outbox:
    """What is to be recorded and said next."""

    def __init__(self) -> None:
        self._effects: list[Effect[HubFact]] = []
        self._refused: dict[str, tuple[float, int]] = {}

    def say(self, letter: AnyLetter, device: str = "") -> None:
        """Send a letter to a device, or to all."""
        self._effects.append(Send(letter, device))

    def note(self, fact: HubFact) -> None:
        """Record a fact before anything that follows."""
        self._effects.append(Record(fact))

    def refuse(self, sender: str, reason: str, now: float) -> None:
        """Record that a letter was not acted upon, for each sender a bounded number a minute.

        A hostile sender shall not fill the record.
        """
        since, count = self._refused.get(sender, (now, 0))
        if now - since >= 60.0:
            since, count = now, 0
        if len(self._refused) > MAX_SENDERS:
            self._refused.clear()
        self._refused[sender] = (since, count + 1)
        if count < REFUSALS_A_MINUTE:
            self.note(LetterRefused(sender=sender, reason=reason, at=now))

    def take(self, wake_at: float) -> list[Effect[HubFact]]:
        """Hand everything over, with the time of the next look where there is one."""
        effects, self._effects = self._effects, []
        if wake_at < float("inf"):
            effects.append(WakeAt(wake_at))
        return effects
