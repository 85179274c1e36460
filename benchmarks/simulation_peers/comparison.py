"""What a round costs in Headwater, beside what the same round costs its peers."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from benchmarks.claims import Claim, Options, claim
from benchmarks.simulation_peers.bound import bound_cpu_s
from benchmarks.simulation_peers.harness import (
    Driver,
    Outcome,
    bare_loop,
    flower,
    headwater,
    import_torch,
    perform,
    pfl_research,
)
from benchmarks.simulation_peers.tasks import make_work
from benchmarks.simulation_peers.work import Task
from federation.errors import HeadwaterError

PATIENCE_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A work that all do, and what is asked of Headwater at it.

    `most_cpu_ms` is the most CPU a round may take. `times` says how many times less than a peer
    it may take: of CPU, or with `is_wall` of wall time. `slow_rounds` are Flower's.
    """

    task: Task
    clients: int
    per_round: int
    rounds: int
    slow_rounds: int
    processes: int = 1
    most_cpu_ms: float | None = None
    times: Mapping[str, float] = field(default_factory=dict)
    is_wall: bool = False

    @property
    def name(self) -> str:
        """What claims call it."""
        many = "" if self.processes == 1 else f", {self.processes} processes"
        return f"{self.task}, {self.per_round} of {self.clients}{many}"


NOOP = Case(
    task="noop",
    clients=100,
    per_round=10,
    rounds=200,
    slow_rounds=20,
    most_cpu_ms=3.0,
    times={"pfl": 7.0, "Flower": 70.0},
)

CROWD = Case(
    task="noop",
    clients=1000,
    per_round=100,
    rounds=60,
    slow_rounds=8,
    most_cpu_ms=20.0,
    times={"pfl": 4.5, "Flower": 120.0},
)

OVERHEAD = (NOOP, CROWD)
"""Nobody trains: what is left is the simulator."""

SMALL = (
    Case(
        task="mlp",
        clients=100,
        per_round=10,
        rounds=150,
        slow_rounds=20,
        times={"bare loop": 3.0},
    ),
    Case(task="mlp", clients=100, per_round=10, rounds=150, slow_rounds=20, processes=2),
    Case(
        task="cnn",
        clients=100,
        per_round=10,
        rounds=20,
        slow_rounds=12,
        times={"pfl": 1.25},
    ),
    Case(
        task="cnn",
        clients=100,
        per_round=10,
        rounds=20,
        slow_rounds=12,
        processes=2,
        times={"pfl": 1.25},
        is_wall=True,
    ),
)
"""Small models that are really trained."""

START_GOAL_S = 2.0
"""Start to the first round's end, beyond importing torch."""

Outcomes: TypeAlias = dict[tuple[str, str], Outcome]
"""By the names of the case and of the driver."""


def all_drivers(options: Options) -> list[Driver]:
    """Headwater, and the peers that are there or can be installed."""
    drivers = [headwater(), bare_loop(), pfl_research(options)]
    if options.is_quick:
        options.tell("Flower is left out: one start of it takes a quarter of what --quick may take")
    else:
        drivers.append(flower(options))
    return [driver for driver in drivers if driver is not None]


def compare(
    options: Options, drivers: Sequence[Driver], cases: Sequence[Case], *, blocks: int
) -> list[Claim]:
    """The claims of these cases about the first driver; the others are its peers.

    All take turns, block after block.
    """
    found: Outcomes = {}
    imports: dict[str, list[tuple[float, float]]] = {driver.name: [] for driver in drivers}
    for block in range(blocks):
        for driver in drivers if NOOP in cases else ():
            if not options.is_quick:
                import_torch(driver)  # Once more than is timed, for the disk's sake.
            imports[driver.name].append(import_torch(driver))
        for case in cases:
            for driver in drivers:
                options.tell(f"{case.name}: {driver.name}, block {block + 1} of {blocks}")
                _perform(options, case, driver, found)
    claims = [each for case in cases for each in _claims_of(case, drivers, found)]
    if NOOP in cases:
        claims += _start_claims(drivers, found, imports)
    return claims


def _perform(options: Options, case: Case, driver: Driver, found: Outcomes) -> None:
    rounds = case.slow_rounds if driver.is_slow else case.rounds
    work = make_work(
        options.folder,
        case.task,
        clients=case.clients,
        per_round=case.per_round,
        rounds=max(2, rounds // 4) if options.is_quick else rounds,
        processes=max(case.processes, driver.actors),
    )
    try:
        done = perform(driver, work, options.folder, patience_s=PATIENCE_S)
    except HeadwaterError as error:
        if driver.module == "headwater":
            raise
        options.tell(f"{driver.name} gave no figure: {error}")
        return
    found.setdefault((case.name, driver.name), Outcome()).add(*done)


def _claims_of(case: Case, drivers: Sequence[Driver], found: Outcomes) -> Iterator[Claim]:
    ours = found[case.name, drivers[0].name]
    peers = _peers(case, drivers, found)
    for name, peer in peers.items():
        times = None if case.is_wall else _times(case, name)
        goal = 1e3 * peer.median_cpu_s / times if times else None
        yield claim(
            f"{case.name}: CPU a round",
            1e3 * ours.median_cpu_s,
            "ms",
            peer=name,
            peer_value=1e3 * peer.median_cpu_s,
            goal=_least(goal, case.most_cpu_ms),
        )
    if case.task in ("mlp", "cnn") and case.processes == 1:
        yield claim(
            f"{case.name}: CPU a round",
            1e3 * ours.median_cpu_s,
            "ms",
            peer="bound: its sums at the rate of a matrix product here",
            peer_value=1e3 * bound_cpu_s(case.task, case.per_round),
        )
    for name, peer in peers.items():
        times = _times(case, name) if case.is_wall else None
        yield claim(
            f"{case.name}: wall time a round",
            1e3 * ours.median_s,
            "ms",
            peer=name,
            peer_value=1e3 * peer.median_s,
            goal=1e3 * peer.median_s / times if times else None,
        )
    yield from _memory_and_errors(case, ours, peers)


def _memory_and_errors(case: Case, ours: Outcome, peers: Mapping[str, Outcome]) -> Iterator[Claim]:
    for name, peer in peers.items():
        yield claim(
            f"{case.name}: most memory of all processes",
            max(ours.peak_mb),
            "MiB",
            peer=name,
            peer_value=max(peer.peak_mb),
        )
    if case.task == "noop":
        return
    for name, peer in peers.items():
        yield claim(
            f"{case.name}: errors on held-out data after {len(_ends(ours))} rounds",
            100 * _errors(ours),
            "%",
            peer=f"{name}, {len(_ends(peer))} rounds",
            peer_value=100 * _errors(peer),
        )


def _start_claims(
    drivers: Sequence[Driver],
    found: Outcomes,
    imports: Mapping[str, list[tuple[float, float]]],
) -> Iterator[Claim]:
    ours, name = found[NOOP.name, drivers[0].name], drivers[0].name
    for what, index in (("", 0), (", CPU", 1)):
        beyond = _beyond_torch(ours, imports[name], index)
        for peer, outcome in _peers(NOOP, drivers, found).items():
            yield claim(
                f"start to the end of the first round, beyond importing torch{what}",
                beyond,
                "CPU s" if index else "s",
                peer=peer,
                peer_value=_beyond_torch(outcome, imports[peer], index),
                goal=START_GOAL_S,
            )


def _beyond_torch(outcome: Outcome, imports: list[tuple[float, float]], index: int) -> float:
    taken = outcome.start_cpu_s if index else outcome.start_s
    torch_s = statistics.median(each[index] for each in imports)
    return max(0.0, statistics.median(taken) - torch_s)


def _peers(case: Case, drivers: Sequence[Driver], found: Outcomes) -> dict[str, Outcome]:
    names = [driver.name for driver in drivers[1:]]
    return {name: found[case.name, name] for name in names if (case.name, name) in found}


def _times(case: Case, peer: str) -> float | None:
    return next((times for name, times in case.times.items() if peer.startswith(name)), None)


def _least(*goals: float | None) -> float | None:
    return min((goal for goal in goals if goal is not None), default=None)


def _ends(outcome: Outcome) -> list[float]:
    return outcome.marks.ends if outcome.marks else []


def _errors(outcome: Outcome) -> float:
    return 1.0 - outcome.marks.accuracy if outcome.marks else 1.0
