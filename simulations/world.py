"""The world: a fleet, a hub and a broker on one virtual clock.

Agents and coordinator are the real ones, and so are codec, topics and training. What the
world adds is time, links and failures, and none of these decides a weight: where the same
devices take part, a simulated run gives the bits of the real one.
"""

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from cloud.config import RunPlan
from cloud.coordination.facts import HubFact, RoundClosed, RunEnded
from federation.learning.data import LocalData
from optimizer.baselines import select_uniformly
from optimizer.problem import Selector
from simulations.bus import PERFECT, Bus, LinkQuality
from simulations.clock import Clock
from simulations.device import Device, DeviceModel, Surroundings, Trainer
from simulations.hub import UNRECORDED, Hub, HubRecord

LONGEST_S = 10 * 365 * 86_400.0
"""No simulated run takes longer than ten years: rounds have deadlines, so it would be a bug."""


@dataclass(frozen=True, slots=True)
class Member:
    """A device of the fleet to be: its name, its data, and what it is like."""

    name: str
    data: LocalData
    model: DeviceModel = DeviceModel()  # noqa: RUF009 - frozen


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What a world is like beside its devices. `seed` decides links, births and back-offs."""

    seed: int = 0
    namespace: str = "fleet"
    hub_quality: LinkQuality = PERFECT
    select: Selector = select_uniformly


def draws_of(seed: int, what: str) -> random.Random:
    """A generator of its own for each part of a world, so that no part disturbs another."""
    return random.Random(f"{seed}/{what}")  # noqa: S311 - nothing secret is drawn


class World:
    """Runs one plan with one fleet; `model` are the encoded initial weights.

    `observe` is told every fact that the hub has recorded. What comes to pass beside that
    (kills, cuts) is for the caller to ask for, on `clock`, before or during the run.
    """

    def __init__(
        self,
        plan: RunPlan,
        model: bytes,
        members: Iterable[Member],
        *,
        train: Trainer,
        conditions: Conditions = Conditions(),
        record: HubRecord = UNRECORDED,
        observe: Callable[[HubFact], None] | None = None,
    ) -> None:
        self.clock = Clock()
        self.bus = Bus(self.clock, draws_of(conditions.seed, "bus"))
        self.model = model
        self.ended: RunEnded | None = None
        self._observers: list[Callable[[HubFact], None]] = [self._follow]
        if observe is not None:
            self.watch(observe)
        around = Surroundings(self.clock, self.bus, conditions.namespace, train)
        self.hub = Hub(
            plan,
            model,
            world=around,
            record=record,
            observe=self._tell,
            select=conditions.select,
            quality=conditions.hub_quality,
        )
        self.clock.call_at(0.0, self.hub.power_on)
        self.devices: Mapping[str, Device] = {
            member.name: self._place(member, around, conditions.seed) for member in members
        }

    def watch(self, observe: Callable[[HubFact], None]) -> None:
        """Tell this one, too, every fact that the hub has recorded."""
        self._observers.append(observe)

    def run(self, limit_s: float = LONGEST_S) -> RunEnded | None:
        """Let time pass until the run has ended: how it ended; None at the limit."""
        while self.ended is None and self.clock.next_at <= limit_s:
            self.clock.step()
        return self.ended

    def restart_broker(self, away_s: float, *, forgets: bool) -> None:
        """The broker dies and comes back; it forgets sessions and retained letters, or not."""
        self.bus.stop(forgets=forgets)
        self.clock.call_at(self.clock.now + away_s, self.bus.start)

    def _place(self, member: Member, around: Surroundings, seed: int) -> Device:
        rng = draws_of(seed, member.name)
        device = Device(member.name, member.data, member.model, around, rng)
        self.clock.call_at(member.model.joins_at_s, device.power_on)
        return device

    def _tell(self, fact: HubFact) -> None:
        for observe in self._observers:
            observe(fact)

    def _follow(self, fact: HubFact) -> None:
        match fact:
            case RoundClosed():
                self.model = fact.model
            case RunEnded():
                self.ended = fact
            case _:
                pass
