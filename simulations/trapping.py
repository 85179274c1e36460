"""Sets the traps of each round: failures at a phase strike devices that are asked, and no other."""

from collections.abc import Iterable

from cloud.coordination.facts import HubFact, RoundAbandoned, RoundClosed, RoundOpened
from simulations.failures import Failures
from simulations.scenario import Kill
from simulations.traps import Trap
from simulations.world import World


class Trapper:
    """Sets traps as a round opens, and takes those away that have not sprung as it ends.

    A kill of any round (0) is tried in each that asks its device, until it has sprung.
    """

    def __init__(self, world: World, kills: Iterable[Kill], failures: Failures) -> None:
        self._devices, self._failures = world.devices, failures
        self._kills = list(kills)
        self._set: list[tuple[str, Trap, Kill | None]] = []
        world.watch(self._observe)

    def _observe(self, fact: HubFact) -> None:
        match fact:
            case RoundOpened(attempts=attempts, round=number):
                self._take_away()
                for entry in attempts:
                    self._set_for(entry.device, number)
            case RoundClosed() | RoundAbandoned():
                self._take_away()
            case _:
                pass

    def _set_for(self, device: str, number: int) -> None:
        for kill in [k for k in self._kills if k.device == device and k.round in (0, number)]:
            self._kills.remove(kill)
            self._add(device, Trap(kill.phase or "", number, kill.away_s), kill)
        failure = self._failures.failure_of(self._devices.place_of(device), number)
        if failure is not None:
            self._add(device, Trap(failure.phase, number, failure.away_s), None)

    def _add(self, device: str, trap: Trap, kill: Kill | None) -> None:
        self._devices[device].traps.append(trap)
        self._set.append((device, trap, kill))

    def _take_away(self) -> None:
        for name, trap, kill in self._set:
            device = self._devices.if_awake(name)
            if device is None or trap not in device.traps:
                continue
            device.traps.remove(trap)
            if kill is not None and kill.round == 0:
                self._kills.append(kill)
            device.rest()
        self._set = []
