"""Which devices the hub knows, and which of them could be asked now.

What a round needs of it (who could be asked, who is at work) is kept up to date with each
change, so opening a round costs nothing that grows with the devices it does not ask.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sortedcontainers import SortedSet

from cloud.coordination.facts import DeviceMemory
from federation.protocol.messages import Birth, Capability, Presence
from optimizer.selection import Candidates

AWAY = "away"
"""Known from the record, not heard of since this hub started."""


@dataclass(slots=True)
class Device:
    """One device as the hub sees it; `task` is the attempt in hand, `progress` how far it is."""

    epoch: int
    state: str
    capability: Capability
    task: str | None = None
    progress: float = 0.0

    @property
    def can_be_asked(self) -> bool:
        """Whether it is there, trains, and has nothing in hand."""
        return self.state == "ready" and self.task is None and self.capability.trains


class Fleet:
    """The devices by name. What an older epoch says of its presence is void."""

    def __init__(self, memory: Mapping[str, DeviceMemory]) -> None:
        self._devices = {
            name: Device(kept.epoch, AWAY, kept.capability) for name, kept in memory.items()
        }
        self._free = SortedSet()
        self._others: dict[str, None] = dict.fromkeys(self._devices)
        self._busy: dict[str, None] = {}

    def __contains__(self, device: str) -> bool:
        """Whether this device is known."""
        return device in self._devices

    def __len__(self) -> int:
        """How many devices are known."""
        return len(self._devices)

    def is_there(self, device: str) -> bool:
        """Whether this device is known and its link is up."""
        entry = self._devices.get(device)
        return entry is not None and entry.state == "ready"

    def level(self, device: str) -> int:
        """How much of a model this device can train; 0 is all of it."""
        return self._devices[device].capability.level

    def mirrors(self, device: str) -> bool:
        """Whether its owner lets the hub keep a copy of its data."""
        return self._devices[device].capability.mirrors

    @property
    def candidates(self) -> Candidates:
        """Who could be asked now; a view, true until the next change."""
        return Candidates(self._free, lambda name: self._devices[name].capability)

    @property
    def busy(self) -> list[tuple[str, str]]:
        """Who is at work, and on which attempt."""
        return [(name, task) for name in self._busy if (task := self._devices[name].task)]

    @property
    def others(self) -> Iterable[str]:
        """Who could not be asked now; `why_not` says why."""
        return self._others

    def born(self, device: str, epoch: int, birth: Birth) -> None:
        """A birth; it is believed whatever its epoch.

        A device that lost its storage may begin to count anew, and only a device that is there
        says its birth. What it works on is its task only where the hub still waits for that.
        """
        self._devices[device] = Device(epoch, "ready", birth.capability)
        self._sort(device)

    def register_all(self, devices: Iterable[tuple[str, int, Capability]]) -> None:
        """These devices (name, epoch, capability) are there, and have nothing in hand."""
        new = {name: Device(epoch, "ready", able) for name, epoch, able in devices}
        self._devices.update(new)
        self._free.update(name for name, entry in new.items() if entry.can_be_asked)
        for name, entry in new.items():
            if not entry.can_be_asked:
                self._others[name] = None
            elif self._others:
                self._others.pop(name, None)

    def present(self, device: str, epoch: int, presence: Presence) -> bool:
        """A change of presence; False where it is void or changes nothing."""
        entry = self._devices.get(device)
        if entry is None or epoch < entry.epoch:
            return False
        if epoch == entry.epoch and presence.state == entry.state:
            return False
        entry.epoch, entry.state = epoch, presence.state
        self._sort(device)
        return True

    def employ(self, device: str, attempt: str) -> None:
        """This device has an attempt in hand."""
        self._devices[device].task = attempt
        self._sort(device)

    def free(self, device: str, attempt: str) -> None:
        """This attempt is over for its device: it may be asked again."""
        entry = self._devices.get(device)
        if entry is not None and entry.task == attempt:
            entry.task, entry.progress = None, 0.0
            self._sort(device)

    def advance(self, device: str, progress: float) -> None:
        """This device said how far its task is, 0 to 1."""
        self._devices[device].progress = progress

    def progress(self, device: str) -> float:
        """How far the device said that its task is, 0 to 1."""
        entry = self._devices.get(device)
        return entry.progress if entry is not None else 0.0

    def why_not(self, device: str) -> str:
        """Why this device cannot be asked now; empty where it can."""
        entry = self._devices[device]
        reasons = {
            "lost": "its link was lost",
            "disconnected": "it said goodbye",
            AWAY: "not heard of since the hub started",
        }
        if entry.state != "ready":
            return reasons.get(entry.state, f"it is {entry.state}")
        if not entry.capability.trains:
            return "it does not train, it only infers"
        return f"it still works on {entry.task}" if entry.task is not None else ""

    def _sort(self, device: str) -> None:
        entry = self._devices[device]
        if entry.can_be_asked:
            self._free.add(device)
            self._others.pop(device, None)
        else:
            self._free.discard(device)
            self._others[device] = None
        if entry.task is not None:
            self._busy[device] = None
        else:
            self._busy.pop(device, None)
