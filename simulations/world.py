"""The world: a fleet, a hub and a broker on one virtual clock.

Agents and coordinator are the real ones, and so are codec, topics and training. What the
world adds is time, links and failures, and none of these decides a weight: where the same
devices take part, a simulated run gives the bits of the real one.
"""

import gc
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

from cloud.config import RunPlan
from cloud.coordination.facts import HubFact, RoundClosed, RunEnded
from simulations.bus import Bus
from simulations.clock import Clock
from simulations.conditions import USUAL, Conditions
from simulations.device_model import Member
from simulations.herd import Herd, Population, awake
from simulations.hub import UNRECORDED, Hub, HubRecord
from simulations.surroundings import Surroundings
from simulations.workshop.job import Workshop

LONGEST_S = 10 * 365 * 86_400.0
"""No simulated run takes longer than ten years: rounds have deadlines, so it would be a bug."""


def draws_of(seed: int, what: str) -> random.Random:
    """A generator of its own for each part of a world, so that no part disturbs another."""
    return random.Random(f"{seed}/{what}")  # noqa: S311 - nothing secret is drawn


@contextmanager
def _seldom_collecting() -> Iterator[None]:
    """Look for cyclic garbage a hundred times less often: little of it comes to be here.

    Letters and facts are made and dropped by the thousand, and each look goes through all that
    torch has ever imported: it took half the time of a round in which nobody trains.
    """
    usual = gc.get_threshold()
    gc.set_threshold(100_000, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*usual)


class World:
    """Runs one plan with one fleet; `model` are the encoded initial weights.

    `members` are devices that are always awake, or a population that may sleep. They train in
    the `workshop`, which is the caller's to close. `observe` is told every fact that the hub
    has recorded. What comes to pass beside that (kills, cuts) is for the caller to ask for, on
    `clock`, before or during the run.
    """

    def __init__(
        self,
        plan: RunPlan,
        model: bytes,
        members: Iterable[Member] | Population,
        *,
        workshop: Workshop,
        conditions: Conditions = USUAL,
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
        around = Surroundings(
            self.clock,
            self.bus,
            conditions.namespace,
            workshop,
            hub_epoch=lambda: self.hub.epoch,
        )
        self.hub = Hub(
            plan,
            model,
            world=around,
            record=record,
            observe=self._tell,
            conditions=conditions,
        )
        self.clock.call_at(0.0, self.hub.power_on)
        population = members if isinstance(members, Population) else awake(members)
        self.devices = Herd(population, around, partial(draws_of, conditions.seed))
        self.hub.introduce = self.devices.introduce
        self.hub.announce = self.devices.expect

    def watch(self, observe: Callable[[HubFact], None]) -> None:
        """Tell this one, too, every fact that the hub has recorded."""
        self._observers.append(observe)

    def run(self, limit_s: float = LONGEST_S) -> RunEnded | None:
        """Let time pass until the run has ended: how it ended; None at the limit."""
        with _seldom_collecting():
            while self.ended is None and self.clock.next_at <= limit_s:
                self.clock.step()
        return self.ended

    def restart_broker(self, away_s: float, *, forgets: bool) -> None:
        """The broker dies and comes back; it forgets sessions and retained letters, or not."""
        self.bus.stop(forgets=forgets)
        self.clock.call_at(self.clock.now + away_s, self.bus.start)

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
