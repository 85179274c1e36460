"""The bytes that ways of sending less need until a fleet is as accurate as with plain FedAvg."""

import math
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import torch

from benchmarks.claims import Claim, Options, claim, main
from federation.datasets.cached import cache_folder
from simulations.comparison.figures import MARGIN
from simulations.comparison.trial import plan_trials
from simulations.fleet import FleetData, fleet_data
from simulations.presence.kinds import presence_of
from simulations.report import LAST_ROUNDS, Ledger
from simulations.scenario import Scenario, find_scenario, read_scenario
from simulations.simulation import build_world, workshop_for

STUDIES = {"watch": "uplink_watch", "Fashion-MNIST": "uplink_fashion"}
"""The shipped scenarios; the first variant of each is plain FedAvg, of weights in float32."""

PEER = "plain FedAvg, float32"
SEEDS = 3
GOAL = 0.1
"""At most this share of FedAvg's bytes, for the best of the variants."""

CAP = 3
"""The others have so many times FedAvg's rounds to reach the target."""

WINDOW = 3
"""A target is reached when the mean of so many rounds is there: one lucky round is not enough."""

QUICK_ROUNDS, QUICK_STEPS, QUICK_SAMPLES = 8, 8, 1000
"""With --quick: FedAvg's rounds, a device's steps in each, and how many are held out at most."""


@dataclass(frozen=True, slots=True)
class Step:
    """The new model after a round, and all bytes that the devices had sent by then."""

    round: int
    accuracy: float
    up_bytes: int


@dataclass(frozen=True, slots=True)
class Race:
    """One variant with one seed. `end` is where it reached the target; None: it did not."""

    target: float
    end: Step | None
    steps: Sequence[Step]


def measure(options: Options) -> list[Claim]:
    """Simulated fleets learn watch and Fashion-MNIST; the peer is plain FedAvg, paired by seed.

    The target of a seed is FedAvg's mean accuracy in its last ten rounds, less one point. Bytes
    are topics and payloads of all that devices send, so letters count beside updates.
    """
    # As `headwater-sim compare` does: the same bits on every machine, however many its cores.
    torch.set_num_threads(1)
    claims: list[Claim] = []
    for study, shipped in STUDIES.items():
        scenario = read_scenario(find_scenario(shipped))
        if options.is_quick:
            scenario = _shortened(scenario)
        claims += compare_bytes(options, study, scenario)
    return claims


def compare_bytes(options: Options, study: str, scenario: Scenario) -> list[Claim]:
    """What each variant of a scenario needs to reach the first's target, beside the first.

    Raises:
        DataError: a data set that was never fetched.
    """
    return _claims(study, _races(options, study, scenario))


def first_at(steps: Sequence[Step], target: float) -> Step | None:
    """The first round that ends a window whose mean accuracy is at the target or above."""
    for end in range(WINDOW, len(steps) + 1):
        if statistics.fmean(step.accuracy for step in steps[end - WINDOW : end]) >= target:
            return steps[end - 1]
    return None


def _shortened(scenario: Scenario) -> Scenario:
    """Few rounds of few steps, and of the variants FedAvg and the last."""
    replace = msgspec.structs.replace
    training = replace(scenario.run.training, max_steps=QUICK_STEPS)
    run = replace(scenario.run, rounds=QUICK_ROUNDS, training=training)
    return replace(scenario, run=run, variants=(scenario.variants[0], scenario.variants[-1]))


def _races(options: Options, study: str, scenario: Scenario) -> dict[str, list[Race]]:
    """Every variant's races, seed by seed; FedAvg's come first."""
    races: dict[str, list[Race]] = {variant.name: [] for variant in scenario.variants}
    rounds, target = scenario.run.rounds, 0.0
    for trial in plan_trials(scenario, scenario.variants, 1 if options.is_quick else SEEDS):
        name = trial.variant.name
        if name == scenario.variants[0].name:
            # All variants of a seed have the same data.
            data = _data(trial.scenario, options)
            steps = list(_steps(trial.scenario, data))
            target = _own_target(steps)
        else:
            run = msgspec.structs.replace(trial.scenario.run, rounds=CAP * rounds)
            steps = []
            for step in _steps(msgspec.structs.replace(trial.scenario, run=run), data):
                steps.append(step)
                if first_at(steps[-WINDOW:], target):
                    break
        race = Race(target, first_at(steps, target), steps)
        races[name].append(race)
        options.tell(f"{study}, {name}, seed {trial.seed}: {_outcome(race)}")
    return races


def _own_target(steps: Sequence[Step]) -> float:
    last = steps[-min(LAST_ROUNDS, len(steps) // 2) :]
    return statistics.fmean(step.accuracy for step in last) - MARGIN


def _data(scenario: Scenario, options: Options) -> FleetData:
    data = fleet_data(scenario, cache=cache_folder(os.environ))
    if not options.is_quick:
        return data
    # Evenly over the people or the classes, in whichever order they come.
    every = max(1, data.held_out.samples // QUICK_SAMPLES)
    some = np.arange(0, data.held_out.samples, every)
    return FleetData(data.devices, data.held_out.take(some))


def _steps(scenario: Scenario, data: FleetData) -> Iterator[Step]:
    """Simulates a scenario: each new model as its round closes."""
    presence = presence_of(scenario.availability, len(data.devices), scenario.seed)
    workshop = workshop_for(scenario, data)
    world = build_world(scenario, data, presence, workshop=workshop)
    ledger = Ledger(scenario.run, data.held_out)
    world.watch(ledger.observe)
    seen = 0
    while world.ended is None:
        world.clock.step()
        for row in ledger.rounds[seen:]:
            seen += 1
            if row.accuracy is not None:
                up_bytes, _ = world.devices.traffic()
                yield Step(row.round, row.accuracy, up_bytes)


def _outcome(race: Race) -> str:
    last = race.end or race.steps[-1]
    found = "reached" if race.end else "NOT reached"
    return (
        f"target {race.target:.1%} {found} in {last.round} rounds, {last.up_bytes / 1e6:.3g} MB up"
    )


def _claims(study: str, races: dict[str, list[Race]]) -> list[Claim]:
    first, *others = races
    plain = _means(races[first])
    error = 100 * (1 - statistics.fmean(race.target for race in races[first]))
    claims = [claim(f"{study}: the target, as an error", error, "%")]
    shares = {}
    for name in others:
        found = _means(races[name])
        missed = sum(race.end is None for race in races[name])
        peer = f"{PEER}: {missed} of {len(races[name])} missed the target" if missed else PEER
        claims += [
            claim(
                f"{study}, {name}: {what} to the target",
                value,
                unit,
                peer=peer,
                peer_value=None if missed else peer_value,
            )
            for what, unit, value, peer_value in zip(
                ("bytes up", "rounds"), ("MB", ""), found, plain, strict=True
            )
        ]
        if not missed:
            shares[name] = found[0] / plain[0]
    best = min(shares, key=lambda name: shares[name], default="none")
    share = shares.get(best, math.inf)
    title = f"{study}, the best ({best}): share of FedAvg's bytes"
    return [*claims, claim(title, share, "x", peer=PEER, peer_value=1.0, goal=GOAL)]


def _means(races: Sequence[Race]) -> tuple[float, float]:
    """Megabytes and rounds to the target, means over seeds; of those that missed it, all spent."""
    ends = [race.end or race.steps[-1] for race in races]
    return (
        statistics.fmean(end.up_bytes for end in ends) / 1e6,
        statistics.fmean(end.round for end in ends),
    )


if __name__ == "__main__":
    main("uplink", measure)
