"""Simulates a real run again: its fleet with fitted physics, and what befell it, at its times.

Times are taken from the opening of the round they fell into, so that a round which is predicted
too short or too long does not move everything after it into other rounds. Before the first round
they are taken from the first device's coming: how long a hub waited for a fleet to be switched
on tells nothing of the fleet.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from cloud.coordination.facts import HubFact, RoundOpened
from edge_agent.agent import AgentSettings
from federation.learning.data import LocalData
from federation.protocol.messages import LocalPlan
from simulations.bus import LinkQuality
from simulations.device_model import DeviceModel, Member
from simulations.observing import Observed
from simulations.world import World
from twin.fitting import DeviceFit, Figure

_NEVER_S = 1e12


@dataclass(slots=True)
class FittedBody:
    """A device that takes for each training what it was seen to take; energy is not counted.

    Its trainer starts with the first training, and with the first after `restart`.
    """

    seconds_per_step: float
    overhead_s: float
    start_s: float
    _has_started: bool = False

    def restart(self) -> None:
        """The process ends, and its trainer with it."""
        self._has_started = False

    def training_s(self, plan: LocalPlan, steps: int, samples: int) -> float:  # noqa: ARG002
        """How long it trains that begins to train now."""
        start_s = 0.0 if self._has_started else self.start_s
        self._has_started = True
        return start_s + self.overhead_s + steps * self.seconds_per_step

    def training_j(self, plan: LocalPlan, steps: int, samples: int) -> float:  # noqa: ARG002
        """Nothing: a hub's log does not tell."""
        return 0.0

    def transfer_j(self, up_bytes: int, down_bytes: int) -> float:  # noqa: ARG002
        """Nothing either."""
        return 0.0

    def spend(self, joules: float, now: float) -> bool:  # noqa: ARG002
        """It is on mains."""
        return True

    def back_at(self, now: float) -> float:
        """It never was off."""
        return now

    def fits(self, plan: LocalPlan) -> bool:  # noqa: ARG002
        """It has trained this before."""
        return True

    def shows(self, now: float) -> float:
        """Its clock goes right: only the hub's was seen."""
        return now


def fitted_model(
    fit: DeviceFit, *, settings: AgentSettings, checkpoint_s: float, level: int = 0
) -> DeviceModel:
    """A device like the fitted one; it is switched on when somebody does so.

    Each letter's delay is drawn from within the spread of those that were seen.
    """
    return DeviceModel(
        checkpoint_s=checkpoint_s,
        joins_at_s=_NEVER_S,
        level=level,
        quality=LinkQuality(
            delay_s=delay_range_s(fit.delay_s),
            up_bps=_value(fit.up_bps),
            down_bps=_value(fit.down_bps),
        ),
        settings=settings,
        body=FittedBody(_value(fit.seconds_per_step), _value(fit.overhead_s), _value(fit.start_s)),
    )


def members_of(
    observed: Observed,
    fits: Mapping[str, DeviceFit],
    data: Mapping[str, LocalData],
    *,
    settings: AgentSettings,
    checkpoint_s: float,
) -> list[Member]:
    """The fleet that was observed, with these data; `fits` name each of its devices."""
    return [
        Member(
            name,
            data[name],
            fitted_model(
                fits[name],
                settings=settings,
                checkpoint_s=checkpoint_s,
                level=observed.levels.get(name, 0),
            ),
        )
        for name in sorted(observed.joined_s)
    ]


def befall_again(world: World, observed: Observed, *, takes_broker: bool) -> None:
    """Let devices come, go and come back as they were seen to, and the hub as well.

    Whoever's process may have lived on goes on from its last checkpoint, and with its trainer.
    With `takes_broker` the broker is gone while the hub is.
    """
    script = _Script(world, observed)
    for name, at_s in observed.joined_s.items():
        script.add(at_s, partial(_switch_on, world, name))
    for away in observed.absences:
        if away.from_s <= script.ends_s:
            restarts = away.is_restart is not False
            script.add(away.from_s, partial(_switch_off, world, away.device, restarts))
            if away.until_s < math.inf:
                script.add(away.until_s, partial(_switch_on, world, away.device))
    for away in observed.hub_absences:
        away_s = away.until_s - away.from_s
        if takes_broker:
            script.add(away.from_s, partial(world.restart_broker, away_s, forgets=False))
        script.add(away.from_s, partial(world.hub.kill, away_s))
    world.watch(script.on_fact)


def _switch_on(world: World, name: str) -> None:
    world.devices[name].power_on()


def _switch_off(world: World, name: str, restarts: bool) -> None:
    device = world.devices[name]
    device.kill(None)
    if restarts and isinstance(device.model.body, FittedBody):
        device.model.body.restart()


class _Script:
    """What shall happen, by the round it fell into and the seconds since that opened."""

    def __init__(self, world: World, observed: Observed) -> None:
        self._clock = world.clock
        self._opened = [(row.opened_s, row.number) for row in observed.rounds]
        self._due: dict[int, list[tuple[float, Callable[[], object]]]] = {}
        self._first_s = max(min(observed.joined_s.values(), default=0.0), 0.0)
        self.ends_s = max((row.ended_s for row in observed.rounds), default=0.0)

    def add(self, at_s: float, action: Callable[[], object]) -> None:
        opened_s, number = max(
            (opened for opened in self._opened if opened[0] <= at_s), default=(0.0, 0)
        )
        if number:
            self._due.setdefault(number, []).append((at_s - opened_s, action))
        else:
            self._clock.call_at(max(at_s - self._first_s, 0.0), action)

    def on_fact(self, fact: HubFact) -> None:
        if isinstance(fact, RoundOpened):
            for after_s, action in self._due.pop(fact.round, ()):
                self._clock.call_at(self._clock.now + after_s, action)


def _value(figure: Figure | None) -> float:
    return figure.value if figure else 0.0


def delay_range_s(figure: Figure | None) -> tuple[float, float]:
    """The middle half of normal noise around a delay, cut alike on both sides at 0."""
    if figure is None:
        return 0.0, 0.0
    half_s = min(0.6745 * figure.spread, figure.value)
    return figure.value - half_s, figure.value + half_s
