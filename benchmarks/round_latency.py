"""How long a round takes in which nobody computes, beside Flower's deployment on loopback."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from statistics import median, quantiles

from benchmarks.claims import Claim, Options, claim, main
from benchmarks.fleet import Fleet, echo_plan, running_fleet, seconds_per_round
from benchmarks.flower.deployment import Flower, flower_deployment, flower_environment
from benchmarks.processes import cpu_s
from federation.errors import HeadwaterError

NOOP_BYTES = 2_600
LARGE_BYTES = 1_000_000

GOALS = {
    (2, NOOP_BYTES): 0.1,
    (2, LARGE_BYTES): 0.25,
    (50, NOOP_BYTES): 2.0,
    (50, LARGE_BYTES): 2.0,
}
"""Seconds a round, by number of agents and bytes of the model."""

NAMES = {NOOP_BYTES: "no-op", LARGE_BYTES: "1 MB model"}


@dataclass(slots=True)
class Sample:
    """What was measured of one driver at one task: wall seconds by round, CPU seconds a round."""

    name: str = ""
    seconds: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)


def measure(options: Options) -> list[Claim]:
    """Seconds a round of real processes on loopback, where devices send the model back as it came.

    Two agents and two SuperNodes are both up all the time, and their runs take turns; a fleet
    of 50 agents follows, in a full run only.
    """
    with _flower(options) as flower:
        claims = _with_two(options, flower)
    return claims if options.is_quick else claims + _with_many(options, 50)


def _with_two(options: Options, flower: Flower | None) -> list[Claim]:
    blocks, rounds = (1, 15) if options.is_quick else (3, 40)
    ours = {size: Sample() for size in NAMES}
    peer = "Flower: left out" if flower is None else f"{flower.name}, 2 SuperNodes"
    theirs = {size: Sample(peer) for size in NAMES}
    with running_fleet(options.folder / "two", devices=2, broker=options.broker) as fleet:
        _warm_up(fleet)
        for block in range(blocks):
            for size, task in NAMES.items():
                options.tell(f"2 agents, {task}, block {block + 1} of {blocks}")
                _run(fleet, ours[size], size, rounds, f"{size}-{block}")
                if flower is not None and (size == NOOP_BYTES or not options.is_quick):
                    _run_flower(options, flower, theirs[size], size)
    return [each for size in NAMES for each in _claims(2, size, ours[size], theirs[size])]


def _with_many(options: Options, devices: int) -> list[Claim]:
    rounds = 30
    claims: list[Claim] = []
    options.tell(f"{devices} agents start")
    with running_fleet(options.folder / "many", devices=devices, broker=options.broker) as fleet:
        _warm_up(fleet)
        for size, task in NAMES.items():
            options.tell(f"{devices} agents, {task}")
            ours = Sample()
            _run(fleet, ours, size, rounds, str(size))
            claims += _claims(devices, size, ours, Sample())
    return claims


def _warm_up(fleet: Fleet) -> None:
    """One short run: every agent starts its trainer, whose imports are not what is timed."""
    _run(fleet, Sample(), NOOP_BYTES, 2, "warm-up")


def _run(fleet: Fleet, sample: Sample, size: int, rounds: int, name: str) -> None:
    plan = echo_plan(f"run-{name}", model_bytes=size, devices=len(fleet.agents), rounds=rounds)
    before = cpu_s(fleet.pids)
    rows = fleet.run(plan, patience_s=300.0)
    sample.cpu_s.append((cpu_s(fleet.pids) - before) / rounds)
    sample.seconds += seconds_per_round(rows)


def _run_flower(options: Options, flower: Flower, sample: Sample, size: int) -> None:
    rounds, patience_s = (2, 30.0) if options.is_quick else (4, 240.0)
    options.tell(f"{flower.name}, {NAMES[size]}")
    try:
        timing = flower.run(rounds=rounds, parameters=size // 4, patience_s=patience_s)
    except HeadwaterError as error:
        options.tell(f"{flower.name} gave no figure: {error}")
        sample.name += f": no figure within {patience_s:g} s"
        return
    sample.seconds += timing.seconds
    sample.cpu_s.append(timing.cpu_s_per_round)


def _claims(devices: int, size: int, ours: Sample, theirs: Sample) -> Iterator[Claim]:
    task = f"{devices} agents, {NAMES[size]}"
    yield claim(
        f"{task}: median round",
        median(ours.seconds),
        "s",
        peer=theirs.name,
        peer_value=median(theirs.seconds) if theirs.seconds else None,
        goal=GOALS.get((devices, size)),
    )
    yield claim(f"{task}: 95th percentile", quantiles(ours.seconds, n=20)[-1], "s")
    yield claim(
        f"{task}: CPU of all processes a round",
        median(ours.cpu_s),
        "CPU s",
        peer=theirs.name,
        peer_value=median(theirs.cpu_s) if theirs.cpu_s else None,
    )


@contextmanager
def _flower(options: Options) -> Iterator[Flower | None]:
    environment = flower_environment(options)
    with ExitStack() as stack:
        flower = None
        if environment is not None:
            options.tell("Flower's SuperLink and 2 SuperNodes start")
            deployment = flower_deployment(environment, options.folder / "flower", nodes=2)
            flower = stack.enter_context(deployment)
        yield flower


if __name__ == "__main__":
    main("round_latency", measure)
