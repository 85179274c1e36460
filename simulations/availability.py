"""The hub asks who is there; and who leaves in the middle of a round is gone."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from cloud.coordination.conductor import MAX_NAMED
from cloud.coordination.facts import HubFact, RoundOpened
from optimizer.selection import Candidates, Selection, Selector
from simulations.presence.model import Always, Presence
from simulations.world import World

AWAY = "not available in this round"


def select_available(
    select: Selector,
    presence: Presence,
    devices: Sequence[str],
    now: Callable[[], float] = lambda: 0.0,
) -> Selector:
    """Chooses as `select` does, among the devices that are on.

    `devices` is the whole fleet, in the order of places. Costs some ms for a million devices,
    and else what it costs to choose: who is on is an array, and is never made a list.
    """
    if isinstance(presence, Always):
        return select

    def choose(
        candidates: Candidates, count: int, number: int, rng: np.random.Generator
    ) -> Selection:
        on = presence.on(number, now())
        places = np.flatnonzero(on)
        while True:
            there = Candidates(_Chosen(devices, places), candidates.capability)
            selection = select(there, count, number, rng)
            # Few devices that are on cannot be asked: it is cheaper to see who that is of those
            # that were drawn, and to draw again without them.
            gone = [name for name in selection.chosen if name not in candidates.names]
            if not gone:
                break
            places = np.setdiff1d(places, [devices.index(name) for name in gone])
        if len(devices) > MAX_NAMED:
            return selection
        away = (name for name, is_on in zip(devices, on, strict=True) if not is_on)
        excluded = dict.fromkeys((n for n in away if n in candidates.names), AWAY)
        return replace(selection, excluded=selection.excluded | excluded)

    return choose


def let_leave(world: World, presence: Presence) -> None:
    """Switch devices off that are asked in a round and leave before its end, till they return."""
    devices, clock = world.devices, world.clock

    def leave(name: str, number: int) -> None:
        place = devices.place_of(name)
        if presence.is_on(place, number, clock.now):
            return
        away_s = presence.returns_at(place, number, clock.now) - clock.now
        devices[name].kill(away_s if away_s < float("inf") else None)

    def on_fact(fact: HubFact) -> None:
        if not isinstance(fact, RoundOpened):
            return
        for entry in fact.attempts:
            at = presence.leaves_at(devices.place_of(entry.device), fact.round, clock.now)
            if at <= fact.deadline:
                clock.call_at(at, leave, entry.device, fact.round)

    world.watch(on_fact)


class _Chosen(Sequence[str]):
    """The names at some places, in order, as a view."""

    def __init__(self, names: Sequence[str], places: npt.NDArray[np.int64]) -> None:
        self._names, self._places = names, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        chosen = self._places[index]
        if isinstance(index, slice):
            return [self._names[int(place)] for place in chosen]
        return self._names[int(chosen)]
