"""How many updates a hub takes from a thousand agents that drop out, beside the broker alone."""

import sys
import time
from dataclasses import dataclass
from statistics import median

import msgspec
import psutil

from benchmarks.claims import ROOT, Claim, Options, claim, main
from benchmarks.fleet import check_alive, hub_settings, running, serving
from benchmarks.processes import MIB
from benchmarks.raw_swarm import Bare, exchange, process_cpu_s
from cloud.broker import start_broker
from cloud.record.store import Store
from federation.errors import HeadwaterError
from simulations.processes import Process, write_toml
from simulations.swarm.trial import SwarmResult

UPDATE_BYTES = 100_000

DROP = 0.1
"""The share of the agents that drops out of each round."""

SLOWDOWN = 2.0
"""The goal: a hub with all that it does takes at most so many times as long as the broker alone."""

PATIENCE_S = 1200.0


@dataclass(frozen=True, slots=True)
class Shape:
    """How many agents, and how many rounds of a run and of the bare exchange on either side."""

    agents: int
    rounds: int
    bare_rounds: int


@dataclass(frozen=True, slots=True)
class Cost:
    """CPU seconds from the first round's opening to the end, and the hub's largest memory."""

    hub_cpu_s: float
    broker_cpu_s: float
    hub_mb: float


def measure(options: Options) -> list[Claim]:
    """Updates a second, and what is lost of them or counted twice, of agents that drop out.

    All agents are in one process and take part in each round, and a tenth drops out of it: by a
    cut link or by SIGKILL's effect, at any phase. They fetch a model of 100 kB and send one back.
    The broker alone carries the same bytes for as many clients, before the run and after it.
    """
    shape = Shape(200, 4, 4) if options.is_quick else Shape(1000, 20, 4)
    bare = [_bare(options, shape, "before")]
    result, cost = _swarm(options, shape)
    bare.append(_bare(options, shape, "after"))
    return _claims(shape, result, cost, bare)


def _bare(options: Options, shape: Shape, when: str) -> Bare:
    options.tell(f"the broker alone, {shape.agents} clients, {when} the swarm")
    folder = options.folder / f"bare-{when}"
    with start_broker(options.broker, folder) as broker:
        return exchange(
            broker,
            folder,
            clients=shape.agents,
            rounds=shape.bare_rounds,
            update_bytes=UPDATE_BYTES,
        )


def _swarm(options: Options, shape: Shape) -> tuple[SwarmResult, Cost]:
    folder = options.folder / "swarm"
    settings = hub_settings(folder, options.broker)
    words = ["--agents", str(shape.agents), "--rounds", str(shape.rounds), "--drop", str(DROP)]
    plan = write_toml(folder / "swarm.toml", {"patience_s": PATIENCE_S})
    words += ["--hub", str(folder / "hub.toml"), "--config", str(plan), "--json"]
    command = [sys.executable, "-m", "simulations", "swarm", *words]
    swarm = Process(command, folder / "swarm.log", {"PYTHONPATH": str(ROOT)})
    with serving(settings, folder) as (hub, store), running([swarm]):
        options.tell(f"{shape.agents} agents, {shape.rounds} rounds")
        cost = _watch(hub, swarm, store)
        said = swarm.last_words(1)
    try:
        return msgspec.json.decode(said, type=SwarmResult), cost
    except msgspec.MsgspecError as error:
        raise HeadwaterError(f"the swarm gave no result; it said:\n{said}") from error


def _watch(hub: Process, swarm: Process, store: Store) -> Cost:
    """Wait for the swarm's end, and see what hub and broker spend from the first round on."""
    process = psutil.Process(hub.pid)
    (broker,) = process.children()
    began: tuple[float, float] | None = None
    largest, give_up_at = 0.0, time.monotonic() + PATIENCE_S
    while swarm.is_running:
        check_alive([hub])
        if time.monotonic() > give_up_at:
            raise HeadwaterError(f"the swarm was not done within {PATIENCE_S:g} s")
        if began is None and any(run.round for run in store.runs()):
            began = process_cpu_s(hub.pid), process_cpu_s(broker.pid)
        largest = max(largest, process.memory_info().rss / MIB)
        time.sleep(0.25)
    if began is None:
        raise HeadwaterError(f"no round was opened; the swarm said:\n{swarm.last_words()}")
    return Cost(process_cpu_s(hub.pid) - began[0], process_cpu_s(broker.pid) - began[1], largest)


def _claims(shape: Shape, result: SwarmResult, cost: Cost, bare: list[Bare]) -> list[Claim]:
    found = result.record
    if found is None or not found.counted:
        raise HeadwaterError(f"no update counted: the run {result.status} ({result.reason})")
    wanted, drops = shape.agents * shape.rounds, sum(result.drops.values())
    ceiling = sum(each.rate for each in bare) / len(bare)
    peer = f"broker alone ({', '.join(f'{each.rate:.0f}' for each in bare)} exchanges/s)"
    ms = 1000.0 / found.counted
    return [
        claim(f"{drops} times dropped out: updates lost", found.lost, "", goal=0),
        claim("updates counted twice", found.double, "", goal=0),
        claim(f"asked for and not counted, of {wanted}", wanted - found.counted, "", goal=0),
        claim("finished and never answered for", result.unanswered, "", goal=0),
        claim(
            f"time an update ({found.updates_per_s:.0f} updates/s)",
            1000.0 / found.updates_per_s,
            "ms",
            peer=peer,
            peer_value=1000.0 / ceiling,
            goal=float(f"{SLOWDOWN * 1000.0 / ceiling:.5g}"),
        ),
        claim(
            "CPU an update of hub, agents and broker",
            (cost.hub_cpu_s + cost.broker_cpu_s + result.cpu_s) * ms,
            "CPU ms",
            peer="broker alone and its two ends",
            peer_value=1000.0 * sum(each.broker_cpu_s + each.ends_cpu_s for each in bare) / 2,
        ),
        claim("hub CPU an update", cost.hub_cpu_s * ms, "CPU ms"),
        claim("agents' CPU an update", result.cpu_s * ms, "CPU ms"),
        claim(
            "broker CPU an update",
            cost.broker_cpu_s * ms,
            "CPU ms",
            peer="broker alone",
            peer_value=1000.0 * sum(each.broker_cpu_s for each in bare) / 2,
        ),
        claim("median round", median(found.round_s), "s"),
        claim("from task to answer, 95 %", result.delay_s[1], "s"),
        claim("hub's memory", cost.hub_mb, "MiB"),
    ]


if __name__ == "__main__":
    main("swarm", measure)
