"""What all devices of one world share."""

from collections.abc import Callable
from dataclasses import dataclass

from edge_agent.peering_trainer import carry_out
from federation.learning.data import LocalData
from federation.protocol.effects import Mix, Mixed
from simulations.bus import Bus
from simulations.clock import Clock
from simulations.workshop.job import Workshop

Mixer = Callable[[Mix, LocalData], Mixed]
"""Does what a `Mix` asks for: `edge_agent.peering_trainer.carry_out`."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What all devices of one world share."""

    clock: Clock
    bus: Bus
    namespace: str
    workshop: Workshop
    mix: Mixer = carry_out
    hub_epoch: Callable[[], int] = lambda: 0
