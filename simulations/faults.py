"""What goes wrong in a scenario, done to a world: at set times, at phases, or at random."""

import random
from collections.abc import Callable, Collection

from federation.errors import ConfigError
from simulations.failures import Failures
from simulations.scenario import (
    BrokerRestart,
    Churn,
    Cut,
    Fault,
    HubKill,
    Kill,
    LateJoin,
    Leave,
    Scenario,
)
from simulations.trapping import Trapper
from simulations.traps import Trap
from simulations.world import World, draws_of


def arrange_faults(scenario: Scenario, world: World, seed: int) -> None:
    """Let everything in the scenario go wrong, each at its time."""
    for fault in scenario.faults:
        _arrange(fault, world)
    churn, rng = scenario.churn, draws_of(seed, "churn")
    victims = sorted(world.devices) if churn.kill_every_s or churn.cut_every_s else []
    _at_random(
        world, churn.kill_every_s, rng, lambda away_s: _kill_any(world, victims, rng, away_s), churn
    )
    _at_random(
        world, churn.cut_every_s, rng, lambda away_s: _cut_any(world, victims, rng, away_s), churn
    )
    _at_random(world, churn.hub_kill_every_s, rng, world.hub.kill, churn)
    _at_random(
        world,
        churn.broker_restart_every_s,
        rng,
        lambda away_s: world.restart_broker(away_s, forgets=rng.random() < 0.5),
        churn,
    )
    kills = [fault for fault in scenario.faults if isinstance(fault, Kill) and fault.at_s is None]
    if kills or scenario.failures.chance > 0:
        Trapper(world, kills, Failures(scenario.failures, seed))


def _arrange(fault: Fault, world: World) -> None:
    at = world.clock.call_at
    match fault:
        case Kill(at_s=float() as at_s):
            at(at_s, lambda: world.devices[fault.device].kill(fault.away_s))
        case Cut():
            at(fault.at_s, _cut, world, fault)
        case HubKill(at_s=None, phase=str() as phase):
            world.hub.traps.append(Trap(phase, fault.round, fault.away_s))
        case HubKill(at_s=float() as at_s):
            at(at_s, world.hub.kill, fault.away_s)
        case BrokerRestart():
            at(fault.at_s, lambda: world.restart_broker(fault.away_s, forgets=fault.forgets))
        case Leave():
            at(fault.at_s, _leave, world, fault.device)
        case _:
            pass  # A late join is how the device was made.


def _cut(world: World, fault: Cut) -> None:
    for name in fault.devices:
        if name == "hub":
            world.hub.cut(fault.for_s)
        else:
            world.devices[name].cut(fault.for_s, is_silent=fault.silent)


def _leave(world: World, device: str) -> None:
    world.devices[device].leave()


def check_names(scenario: Scenario, devices: Collection[str]) -> None:
    """Refuse faults that befall nobody.

    Raises:
        ConfigError: one names a device that the fleet does not have.
    """
    for fault in scenario.faults:
        match fault:
            case Kill() | LateJoin() | Leave():
                named: tuple[str, ...] = (fault.device,)
            case Cut():
                named = tuple(name for name in fault.devices if name != "hub")
            case _:
                named = ()
        for name in named:
            if name not in devices:
                known = sorted(devices)
                raise ConfigError(
                    f"a fault names device {name!r}; the fleet has {known[0]} to {known[-1]}: "
                    "correct the scenario"
                )


def _at_random(
    world: World,
    every_s: float,
    rng: random.Random,
    strike: Callable[[float], None],
    churn: Churn,
) -> None:
    """Strike again and again, at times of a Poisson process."""
    if every_s <= 0:
        return

    def again() -> None:
        strike(rng.uniform(*churn.away_s))
        world.clock.call_at(world.clock.now + rng.expovariate(1 / every_s), again)

    world.clock.call_at(rng.expovariate(1 / every_s), again)


def _kill_any(world: World, victims: list[str], rng: random.Random, away_s: float) -> None:
    world.devices[rng.choice(victims)].kill(away_s)


def _cut_any(world: World, victims: list[str], rng: random.Random, away_s: float) -> None:
    world.devices[rng.choice(victims)].cut(away_s, is_silent=rng.random() < 0.5)
