"""Simulates a real run again: its fleet with fitted physics, and what befell it, at its times.

Times are taken from the opening of the round they fell into, so that a round which is predicted
too short or too long does not move everything after it into other rounds.
"""

from collections.abc import Callable, Mapping
from functools import partial

from cloud.config import RunPlan
from cloud.coordination.facts import HubFact, RoundOpened
from edge_agent.agent import AgentSettings
from federation.learning.data import LocalData
from federation.learning.training import total_steps
from federation.protocol.messages import LocalPlan
from simulations.bus import LinkQuality
from simulations.device import DeviceModel
from simulations.observing import Observed
from simulations.world import Member, World
from twin.fitting import DeviceFit, Figure

_NEVER_S = 1e12


def fitted_model(
    fit: DeviceFit,
    steps: int,
    *,
    settings: AgentSettings,
    checkpoint_s: float,
    level: int = 0,
) -> DeviceModel:
    """A device like the fitted one, for trainings of so many steps; it is switched on later.

    Each letter's delay is drawn from within the spread of those that were seen.
    """
    overhead_s = _value(fit.overhead_s) / max(steps, 1)
    low_s, high_s = delay_range_s(fit.delay_s)
    return DeviceModel(
        seconds_per_step=_value(fit.seconds_per_step) + overhead_s,
        checkpoint_s=checkpoint_s,
        joins_at_s=_NEVER_S,
        level=level,
        quality=LinkQuality(
            delay_s=(low_s, high_s), up_bps=_value(fit.up_bps), down_bps=_value(fit.down_bps)
        ),
        settings=settings,
    )


def members_of(
    observed: Observed,
    fits: Mapping[str, DeviceFit],
    data: Mapping[str, LocalData],
    plan: RunPlan,
    *,
    settings: AgentSettings,
    checkpoint_s: float,
) -> list[Member]:
    """The fleet that was observed, with these data; `fits` name each of its devices."""
    asked = LocalPlan(
        model=plan.model,
        epochs=plan.training.epochs,
        max_steps=plan.training.max_steps,
        batch_size=plan.training.batch_size,
    )
    return [
        Member(
            name,
            data[name],
            fitted_model(
                fits[name],
                total_steps(asked, data[name].samples),
                settings=settings,
                checkpoint_s=checkpoint_s,
                level=observed.levels.get(name, 0),
            ),
        )
        for name in sorted(observed.joined_s)
    ]


def befall_again(world: World, observed: Observed, *, takes_broker: bool) -> None:
    """Let devices come, go and come back as they were seen to, and the hub as well.

    A device whose process may have lived on has its link cut; with `takes_broker` the broker is
    gone while the hub is.
    """
    script = _Script(world, observed)
    for name, at_s in observed.joined_s.items():
        script.add(at_s, world.devices[name].power_on)
    for away in observed.absences:
        device = world.devices[away.device]
        if away.is_restart:
            script.add(away.from_s, partial(device.kill, None))
            script.add(away.until_s, device.power_on)
        elif away.from_s <= script.ends_s:
            script.add(away.from_s, partial(device.cut, min(away.until_s - away.from_s, _NEVER_S)))
    for away in observed.hub_absences:
        away_s = away.until_s - away.from_s
        if takes_broker:
            script.add(away.from_s, partial(world.restart_broker, away_s, forgets=False))
        script.add(away.from_s, partial(world.hub.kill, away_s))
    world.watch(script.on_fact)


class _Script:
    """What shall happen, by the round it fell into and the seconds since that opened."""

    def __init__(self, world: World, observed: Observed) -> None:
        self._clock = world.clock
        self._opened = [(row.opened_s, row.number) for row in observed.rounds]
        self._due: dict[int, list[tuple[float, Callable[[], object]]]] = {}
        self.ends_s = max((row.ended_s for row in observed.rounds), default=0.0)

    def add(self, at_s: float, action: Callable[[], object]) -> None:
        opened_s, number = max(
            (opened for opened in self._opened if opened[0] <= at_s), default=(0.0, 0)
        )
        if number:
            self._due.setdefault(number, []).append((at_s - opened_s, action))
        else:
            self._clock.call_at(max(at_s, 0.0), action)

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
