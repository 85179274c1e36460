"""The devices of a world. Those with nothing to do may sleep, and cost a few bytes each.

For the hub a device that sleeps is there: it was introduced once, and would answer. It is
awakened by a letter for it, or by whoever looks at it, as the agent that it would be by now:
linked, introduced, without work. What it keeps over a sleep is what its journal would keep.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from cloud.coordination.coordinator import Coordinator
from edge_agent.facts import Held
from federation.protocol.messages import Assignment, Capability
from simulations.device import Device
from simulations.device_model import Member, capability
from simulations.meter import Spent
from simulations.surroundings import Surroundings


@dataclass(frozen=True, slots=True)
class Population:
    """All devices of a world, by place.

    `member` makes the one at a place, `level` gives its level alone, which the hub is told of
    all of them. Where they sleep, `late` says who is first there when; others are from the start.
    """

    names: Sequence[str]
    member: Callable[[int], Member]
    level: Callable[[int], int]
    sleeps: bool = False
    late: Mapping[str, float] = field(default_factory=dict)


def awake(members: Iterable[Member]) -> Population:
    """These members, none of whom ever sleeps."""
    listed = list(members)
    return Population(
        [member.name for member in listed],
        listed.__getitem__,
        lambda place: listed[place].model.level,
    )


class Herd(Mapping[str, Device]):
    """The devices by name; looking at one that sleeps awakens it."""

    def __init__(
        self, population: Population, around: Surroundings, draws: Callable[[str], random.Random]
    ) -> None:
        self.bytes_up = self.bytes_down = 0
        self._population, self._around, self._draws = population, around, draws
        self._places = {name: place for place, name in enumerate(population.names)}
        self._awake: dict[str, Device] = {}
        self._spent: dict[str, Spent] = {}
        self._held: dict[str, Held] = {}
        self._epochs = np.ones(len(population.names), np.int32)
        self._shared_rng = draws("sleepers")
        if population.sleeps:
            around.bus.awaken = self._answer
            for name, at_s in population.late.items():
                self._place(name)
                around.clock.call_at(at_s, self._awake[name].power_on)
            return
        for name in population.names:
            device = self._place(name)
            around.clock.call_at(device.model.joins_at_s, device.power_on)

    def __getitem__(self, name: str) -> Device:
        device = self._awake.get(name)
        if device is None:
            if name not in self._places:
                raise KeyError(name)
            device = self._place(name)
            device.rouse(self._around.hub_epoch())
        return device

    def __iter__(self) -> Iterator[str]:
        return iter(self._population.names)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    @property
    def awake(self) -> int:
        """How many devices do not sleep now."""
        return len(self._awake)

    def if_awake(self, name: str) -> Device | None:
        """A device, if it does not sleep."""
        return self._awake.get(name)

    def place_of(self, name: str) -> int:
        """The index of a device in the fleet's order."""
        return self._places[name]

    def introduce(self, coordinator: Coordinator) -> None:
        """Tell a hub that has just begun of those who sleep: the others say their own birth."""
        if not self._population.sleeps:
            return
        # Whoever has a part in the open round must be heard of again: it says a birth of its own.
        opened = coordinator.run.round if coordinator.run is not None else None
        for entry in opened.attempts.values() if opened is not None else ():
            if entry.device not in self._awake:
                self._place(entry.device).rouse(self._around.hub_epoch() - 1)
        level = self._population.level

        def sleepers() -> Iterator[tuple[str, int, Capability]]:
            for place, name in enumerate(self._population.names):
                if name not in self._awake:
                    yield name, int(self._epochs[place]), capability(level(place))

        coordinator.fleet.register_all(sleepers())

    def expect(self, name: str, assignment: Assignment) -> None:
        """An assignment is on its way to this device."""
        if name in self._places:
            self[name].expect(assignment)

    def doze(self, device: Device) -> None:
        """Let a device sleep that has nothing to do."""
        name, place = device.name, device.place
        del self._awake[name]
        self._epochs[place] = device.epoch
        self._spent.setdefault(name, Spent()).add(device.meter.spent)
        up, down = self._around.bus.leave_quietly(name)
        self.bytes_up += up
        self.bytes_down += down
        held = device.held
        # The base that it fetched is forgotten: fetched again, it costs traffic and no bit.
        if held.memory is not None or held.release is not None:
            held.parts = {}
            self._held[name] = held

    def traffic(self) -> tuple[int, int]:
        """All bytes that devices have sent and received so far."""
        now = [self._around.bus.traffic(name) for name in self._awake]
        return (
            self.bytes_up + sum(up for up, _ in now),
            self.bytes_down + sum(down for _, down in now),
        )

    def take_spent(self, name: str) -> Spent:
        """What a device has spent since this was last asked."""
        spent = self._spent.pop(name, None) or Spent()
        device = self._awake.get(name)
        if device is not None:
            device.settle()
            spent.add(device.meter.take())
        return spent

    def _answer(self, client: str) -> None:
        if client in self._places:
            self[client]

    def _place(self, name: str) -> Device:
        place = self._places[name]
        sleeps = self._population.sleeps
        device = Device(
            self._population.member(place),
            self._around,
            self._shared_rng if sleeps else self._draws(name),
            place=place,
            held=self._held.pop(name, None),
            epoch=int(self._epochs[place]) if sleeps else 0,
            on_idle=self.doze if sleeps else None,
        )
        self._awake[name] = device
        return device
