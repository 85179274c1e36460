"""Which devices the hub knows, and which of them are there."""

from collections.abc import Mapping
from dataclasses import dataclass

from cloud.coordination.facts import DeviceMemory
from federation.protocol.messages import Birth, Capability, Presence

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


class Fleet:
    """The devices by name. What an older epoch says of its presence is void."""

    def __init__(self, memory: Mapping[str, DeviceMemory]) -> None:
        self.devices = {
            name: Device(kept.epoch, AWAY, kept.capability) for name, kept in memory.items()
        }

    def is_there(self, device: str) -> bool:
        """Whether this device is known and its link is up."""
        entry = self.devices.get(device)
        return entry is not None and entry.state == "ready"

    def born(self, device: str, epoch: int, birth: Birth) -> None:
        """A birth; it is believed whatever its epoch.

        A device that lost its storage may begin to count anew, and only a device that is there
        says its birth. What it works on is its task only where the hub still waits for that.
        """
        self.devices[device] = Device(epoch, "ready", birth.capability)

    def present(self, device: str, epoch: int, presence: Presence) -> bool:
        """A change of presence; False where it is void or changes nothing."""
        entry = self.devices.get(device)
        if entry is None or epoch < entry.epoch:
            return False
        if epoch == entry.epoch and presence.state == entry.state:
            return False
        entry.epoch, entry.state = epoch, presence.state
        return True

    def progress(self, device: str) -> float:
        """How far the device said that its task is, 0 to 1."""
        entry = self.devices.get(device)
        return entry.progress if entry is not None else 0.0

    def why_not(self, device: str) -> str:
        """Why this device cannot be asked now; empty where it can."""
        entry = self.devices[device]
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
