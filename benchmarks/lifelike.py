"""How long the rounds of the demonstration take, and how long a simulation says they do.

    python -m benchmarks.lifelike [--record DIR] [--quick] [--json]

The demonstration runs for real: a hub, a broker and ten agents, some of them killed. Physics are
fitted on its event log, and the same fleet is simulated with them: the same plan, data and
losses. With --record the run is kept in a folder, or taken from it if it is there already.
"""

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from benchmarks.claims import ROOT, Claim, Options, claim, main
from cloud.config import RunPlan
from cloud.coordination.facts import ChunkStored, HubFact
from cloud.initial import initial_model
from cloud.record.events import event_of
from cloud.record.queries import EventRow
from edge_agent.agent import AgentSettings
from federation.datasets.cached import cache_folder, load
from federation.errors import HeadwaterError
from federation.learning.data import LocalData
from simulations.conditions import Conditions
from simulations.demo.wrist import wrist_fleet
from simulations.observing import Observed, RoundTimes, observe, read_hub
from simulations.replaying import befall_again, members_of
from simulations.scenario import Scenario
from simulations.simulation import stored
from simulations.tables import FleetPlan
from simulations.workshop.in_process import InProcess
from simulations.world import World
from twin.fitting import DeviceFit, completed, fit_device, fit_fleet

GOAL = 0.2
"""The median relative error of a round's time."""

ROUNDS, QUICK_ROUNDS = 20, 14

SETTINGS = AgentSettings(heartbeat_s=5.0, keepalive_s=10.0)
"""As the demonstration's agents are set up."""

CHECKPOINT_S = 0.2
PATIENCE_S = 600.0
LIMIT_S = 3600.0


@dataclass(frozen=True, slots=True)
class Recorded:
    """A real run: its plan, what its hub saw, and what its devices held."""

    plan: RunPlan
    seen: Observed
    data: dict[str, LocalData]


def measure(options: Options, record: Path | None = None) -> list[Claim]:
    """The demonstration's rounds for real, and as its twin in the simulation predicts them."""
    folder = record if record is not None else options.folder / "demo"
    if not (folder / "hub" / "hub.db").is_file():
        _run_demo(options, folder)
    plan, seen = read_hub(folder / "hub")
    real = Recorded(plan, seen, wrist_fleet(load("watch", cache=cache_folder(os.environ))).devices)
    options.tell("simulated with physics of all rounds")
    every = predict(real, options.folder / "all", lambda _: True)
    options.tell("simulated with physics of the odd rounds")
    held_out = predict(real, options.folder / "odd", lambda number: number % 2 == 1)
    return list(compare(seen.rounds, every, held_out))


def predict(real: Recorded, folder: Path, is_known: Callable[[int], bool]) -> Observed:
    """What the hub of a simulation sees whose physics are fitted on the rounds that are known.

    When devices and hub came and went is taken from the whole log: that is what befell them,
    and not how they are.

    Raises:
        HeadwaterError: the simulated run does not come to its end.
    """
    events: list[EventRow] = []

    def keep(fact: HubFact) -> None:
        if not isinstance(fact, ChunkStored):
            row = {"id": len(events) + 1, **event_of(fact)}
            events.append(msgspec.convert(row, EventRow))

    fleet = FleetPlan(devices=len(real.data), data="watch", partition="wrist")
    fits = fitted(real.seen, is_known)
    members = members_of(real.seen, fits, real.data, settings=SETTINGS, checkpoint_s=CHECKPOINT_S)
    with (
        stored(folder, Scenario(run=real.plan, fleet=fleet)) as record,
        InProcess(real.data) as workshop,
    ):
        world = World(
            real.plan,
            initial_model(real.plan),
            members,
            workshop=workshop,
            conditions=Conditions(seed=real.plan.seed),
            record=record,
            observe=keep,
        )
        befall_again(world, real.seen, takes_broker=True)
        if world.run(LIMIT_S) is None:
            raise HeadwaterError(
                f"the simulated run had not ended after {LIMIT_S:g} virtual seconds; "
                "look at what befell the real one"
            )
    return observe(events, real.plan.name)


def fitted(seen: Observed, is_known: Callable[[int], bool]) -> dict[str, DeviceFit]:
    """The physics of each device from these rounds, the fleet's where they tell nothing of it."""
    parts = [part for part in seen.parts if is_known(part.round)]
    fleet = fit_device("fleet", parts, seen.absences)
    own = fit_fleet(parts, seen.absences)
    return {name: completed(own.get(name, DeviceFit(device=name)), fleet) for name in seen.joined_s}


def compare(real: tuple[RoundTimes, ...], every: Observed, held_out: Observed) -> Iterator[Claim]:
    """Each round's predicted time beside its real one, and the median of their relative errors."""
    predicted = {row.number: row.lasted_s for row in every.rounds}
    unseen = {row.number: row.lasted_s for row in held_out.rounds if row.number % 2 == 0}
    yield _median_error("median error of a round's time", real, predicted, goal=GOAL)
    name = "median error of even rounds, fitted on odd ones"
    yield _median_error(name, real, unseen, goal=GOAL)
    for row in real:
        if row.number in predicted:
            yield claim(
                f"round {row.number}: predicted",
                predicted[row.number],
                "s",
                peer=f"real, {row.status}",
                peer_value=row.lasted_s,
            )
    yield claim(
        "all rounds together: predicted",
        sum(predicted.values()),
        "s",
        peer="real",
        peer_value=sum(row.lasted_s for row in real),
    )


def _median_error(
    name: str, real: tuple[RoundTimes, ...], predicted: dict[int, float], *, goal: float
) -> Claim:
    errors = [
        abs(predicted[row.number] - row.lasted_s) / row.lasted_s
        for row in real
        if row.number in predicted and row.lasted_s > 0
    ]
    if not errors:
        raise HeadwaterError("no round was both real and predicted; run the demonstration anew")
    return claim(name, statistics.median(errors), "of the real time", goal=goal)


def _run_demo(options: Options, folder: Path) -> None:
    rounds = QUICK_ROUNDS if options.is_quick else ROUNDS
    options.tell(f"the demonstration runs for real, {rounds} rounds; about a minute")
    command = [sys.executable, "-m", "simulations", "demo", "--out", str(folder)]
    command += ["--rounds", str(rounds), "--broker", options.broker]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise HeadwaterError(f"the demonstration failed: {' '.join(last)}")


def _record_option() -> Path | None:
    """Take --record from the command line; what is left is the same for all benchmarks."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--record", type=Path)
    known, sys.argv[1:] = parser.parse_known_args()
    record: Path | None = known.record
    return record.resolve() if record is not None else None


if __name__ == "__main__":
    kept = _record_option()

    def measure_kept(options: Options) -> list[Claim]:
        """Predict the demonstration's rounds; --record DIR keeps the real run, or reuses it."""
        return measure(options, kept)

    main("lifelike", measure_kept)
