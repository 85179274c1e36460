"""Collects the effects of one step of the hub, in the order in which they must happen."""

from cloud.facts import HubFact
from federation.protocol.effects import Effect, Record, Send, WakeAt
from federation.protocol.messages import AnyLetter


class Outbox:
    """What is to be recorded and said next."""

    def __init__(self) -> None:
        self._effects: list[Effect[HubFact]] = []

    def say(self, letter: AnyLetter, device: str = "") -> None:
        """Send a letter to a device, or to all."""
        self._effects.append(Send(letter, device))

    def note(self, fact: HubFact) -> None:
        """Record a fact before anything that follows."""
        self._effects.append(Record(fact))

    def take(self, wake_at: float) -> list[Effect[HubFact]]:
        """Hand everything over, with the time of the next look where there is one."""
        effects, self._effects = self._effects, []
        if wake_at < float("inf"):
            effects.append(WakeAt(wake_at))
        return effects
