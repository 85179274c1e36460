"""What a simulated device is like."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from edge_agent.agent import AgentSettings
from edge_agent.peering import Peering
from federation.learning.data import LocalData
from federation.protocol import messages as m
from simulations.bus import PERFECT, LinkQuality

_USUAL = AgentSettings()


class Body(Protocol):
    """The physical side of one device."""

    def training_s(self, plan: m.LocalPlan, steps: int, samples: int) -> float:
        """How long it trains for so many steps."""
        ...

    def training_j(self, plan: m.LocalPlan, steps: int, samples: int) -> float:
        """The energy that takes."""
        ...

    def transfer_j(self, up_bytes: int, down_bytes: int) -> float:
        """The energy to send and receive so many bytes."""
        ...

    def spend(self, joules: float, now: float) -> bool:
        """Take energy from its battery; False: that is empty now."""
        ...

    def back_at(self, now: float) -> float:
        """When an empty battery has charged enough."""
        ...

    def fits(self, plan: m.LocalPlan) -> bool:
        """Whether its memory is enough to train this."""
        ...

    def shows(self, now: float) -> float:
        """What its own clock shows."""
        ...


@lru_cache(maxsize=64)
def capability(level: int) -> m.Capability:
    """What a simulated device says of itself."""
    return m.Capability(agent="simulated", level=level)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceModel:
    """What a device is like: how fast it trains, how it is linked, when it is first there.

    A training that was cut short goes on from a checkpoint taken every `checkpoint_s`. `level`
    is how much of a model with levels it can train (0: all of it). With `peering` it is a peer,
    always or while the hub is away; each model that it mixes takes it as long as a step. A
    `body` says what time, energy and memory its trainings take, in place of `seconds_per_step`.
    """

    seconds_per_step: float = 0.0
    checkpoint_s: float = 10.0
    joins_at_s: float = 0.0
    level: int = 0
    quality: LinkQuality = PERFECT
    settings: AgentSettings = _USUAL
    peering: Peering | None = None
    body: Body | None = None


@dataclass(frozen=True, slots=True)
class Member:
    """A device of the fleet to be: its name, its data, and what it is like."""

    name: str
    data: LocalData
    model: DeviceModel = DeviceModel()
