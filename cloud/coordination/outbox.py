"""Collects the effects of one step of the hub, in the order in which they must happen."""

from cloud.coordination.facts import (
    DeviceBorn,
    DeviceReported,
    HubFact,
    LetterRefused,
    PresenceChanged,
)
from federation.protocol.effects import Effect, Record, Send, Train, WakeAt
from federation.protocol.messages import AnyLetter

REFUSALS_A_MINUTE = 20

COMINGS_A_MINUTE = 60
"""How many births and changes of presence of one device are recorded in a minute."""

MAX_SENDERS = 10_000


class Ration:
    """A bounded number a minute for each sender."""

    def __init__(self, a_minute: int) -> None:
        self._a_minute = a_minute
        self._taken: dict[str, tuple[float, int]] = {}

    def take(self, sender: str, now: float) -> bool:
        """Take one; False where this sender has had its share of the minute."""
        since, count = self._taken.get(sender, (now, 0))
        if now - since >= 60.0:
            since, count = now, 0
        if len(self._taken) > MAX_SENDERS:
            self._taken.clear()
        self._taken[sender] = (since, count + 1)
        return count < self._a_minute


class Outbox:
    """What is to be recorded and said next."""

    def __init__(self) -> None:
        self._effects: list[Effect[HubFact]] = []
        self._refusals = Ration(REFUSALS_A_MINUTE)
        self._comings = Ration(COMINGS_A_MINUTE)

    def say(self, letter: AnyLetter, device: str = "") -> None:
        """Send a letter to a device, or to all."""
        self._effects.append(Send(letter, device))

    def train(self, task: Train) -> None:
        """Have a digital agent train."""
        self._effects.append(task)

    def note(self, fact: HubFact) -> None:
        """Record a fact before anything that follows."""
        self._effects.append(Record(fact))

    def note_of(
        self, device: str, fact: DeviceBorn | PresenceChanged | DeviceReported, now: float
    ) -> None:
        """Record that a device came, went or told of itself, if it does not do so all the time.

        What is left out costs nothing: after a restart the hub hears of every device anew.
        """
        if self._comings.take(device, now):
            self.note(fact)

    def refuse(self, sender: str, reason: str, now: float) -> None:
        """Record that a letter was not acted upon, for each sender a bounded number a minute.

        A hostile sender shall not fill the record.
        """
        if self._refusals.take(sender, now):
            self.note(LetterRefused(sender=sender, reason=reason, at=now))

    def take(self, wake_at: float) -> list[Effect[HubFact]]:
        """Hand everything over, with the time of the next look where there is one."""
        effects, self._effects = self._effects, []
        if wake_at < float("inf"):
            effects.append(WakeAt(wake_at))
        return effects
