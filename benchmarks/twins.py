"""How well twins foretell real rounds: when a device is done, and whether it finishes at all.

    python -m benchmarks.twins [--quick] [--json]

A hub, a broker and agents as real processes, of three classes: trainers that are stopped for a
share of each tenth of a second, links that are slow and late, and links that are cut in the
middle of rounds. Every forecast was made from what earlier rounds had told; its peers are the
fleet's running median, and the share of parts that finished, known in hindsight.
"""

import os
import random
import signal
import statistics
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from benchmarks.claims import Claim, Options, claim, main
from benchmarks.processes import wait_until
from cloud.config import BrokerConfig, HubConfig, ModelChoice, ReleasePlan, RunPlan
from cloud.coordination.rounds import RoundPolicy
from cloud.record.store import Store
from cloud.twins.store import ForecastRow, TwinStore
from edge_agent.config import AgentConfig, DataConfig
from federation.datasets.cached import load
from federation.errors import HeadwaterError
from federation.learning.plans import TrainingPlan
from simulations.link import LinkProxy
from simulations.processes import Process, agent_process, free_port, hub_process

RUN = "twins"
GOAL = 0.15
"""The median relative error of a predicted finish time."""

PERIOD_S = 0.1
PATIENCE_S = 400.0
CUT_S = 6.0
DEADLINE_S, GRACE_S = 20.0, 1.0


@dataclass(frozen=True, slots=True)
class DeviceClass:
    """A class of devices: the share of time its trainer runs, its link, how often that is cut."""

    name: str
    share: float
    rate_bps: float
    latency_s: float
    cut_chance: float


# Shares of all ten come to less than two cores: devices of their own do not feel each other.
CLASSES = (
    DeviceClass("board", 0.3, 20e6, 0.005, 0.0),
    DeviceClass("phone", 0.15, 5e6, 0.03, 0.15),
    DeviceClass("sensor", 0.08, 1.5e6, 0.08, 0.5),
)


@dataclass
class Member:
    """One device: its class, its process and its link."""

    kind: DeviceClass
    agent: Process
    link: LinkProxy


@dataclass
class Stage:
    """All that runs."""

    hub_config: HubConfig
    hub: Process
    members: dict[str, Member]
    stopped: threading.Event = field(default_factory=threading.Event)
    throttles: list[threading.Thread] = field(default_factory=list)


def measure(options: Options) -> list[Claim]:
    """Predicted against observed finish times and outcomes of a real fleet's rounds."""
    rounds, devices = (6, 6) if options.is_quick else (20, 10)
    with _stage(options.folder, devices, options.broker) as stage:
        options.tell(f"{devices} devices of {len(CLASSES)} classes, {rounds} real rounds")
        rows = _run(stage, _plan(rounds, devices))
    return list(_claims(rows, stage, rounds, is_quick=options.is_quick))


def _plan(rounds: int, devices: int) -> RunPlan:
    return RunPlan(
        name=RUN,
        rounds=rounds,
        model=ModelChoice(name="mlp", sizes={"inputs": 64, "hidden": 400, "classes": 10}),
        policy=RoundPolicy(
            devices_per_round=devices, gather_s=10.0, deadline_s=DEADLINE_S, lost_grace_s=GRACE_S
        ),
        training=TrainingPlan(epochs=8, batch_size=8, learning_rate=0.02, momentum=0.9),
        release=ReleasePlan(every=0),
        seed=5,
    )


@contextmanager
def _stage(folder: Path, devices: int, kind: str) -> Iterator[Stage]:
    port = free_port()
    broker = msgspec.convert({"kind": kind, "port": port, "keepalive_s": 10}, BrokerConfig)
    hub_config = HubConfig(folder=folder / "hub", broker=broker)
    digits = load("digits", cache=Path())
    with ExitStack() as stack:
        members = {}
        for number in range(devices):
            device_class = CLASSES[number % len(CLASSES)]
            link = stack.enter_context(
                LinkProxy(port, rate_bps=device_class.rate_bps, latency_s=device_class.latency_s)
            )
            home = folder / f"d{number:02d}"
            (home / "data").mkdir(parents=True)
            share = slice(number, None, devices)
            np.savez(home / "data" / "data.npz", x=digits.x[share], y=digits.y[share])
            config = AgentConfig(
                device=home.name,
                broker=f"mqtt://127.0.0.1:{link.port}",
                folder=home / "journal",
                keepalive_s=10,
                infers=False,
                data=DataConfig(folder=home / "data"),
            )
            members[home.name] = Member(device_class, agent_process(config, home), link)
        stage = Stage(hub_config, hub_process(hub_config, folder), members)
        try:
            yield stage
        finally:
            stage.stopped.set()
            for throttle in stage.throttles:
                throttle.join()
            for process in (*(each.agent for each in members.values()), stage.hub):
                process.stop()


def _throttle(member: Member, stopped: threading.Event) -> None:
    """Let the device's trainer run for a share of each period, as a slower processor would."""
    share = member.kind.share
    while not stopped.is_set():
        trainers = _children(member.agent.pid)
        _signal(trainers, signal.SIGSTOP)
        time.sleep((1 - share) * PERIOD_S)
        _signal(trainers, signal.SIGCONT)
        stopped.wait(share * PERIOD_S)


def _children(pid: int) -> list[int]:
    """The processes below this one. Read from Linux itself: to ask for all processes costs more."""
    found: list[int] = []
    with suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            mine = [int(each) for each in (thread / "children").read_text().split()]
            found += mine + [below for child in mine for below in _children(child)]
    return found


def _signal(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _run(stage: Stage, plan: RunPlan) -> list[ForecastRow]:
    """Run the plan for real, with links that are cut; what was forecast and what came of it."""
    stage.hub.start()
    wait_until(
        lambda: "hub is serving" in stage.hub.last_words(), "the hub begins", patience_s=60.0
    )
    for member in stage.members.values():
        member.agent.start()
        throttle = threading.Thread(target=_throttle, args=(member, stage.stopped))
        throttle.start()
        stage.throttles.append(throttle)
    store, twins = Store(stage.hub_config.database_url), TwinStore(stage.hub_config.database_url)
    try:
        wait_until(
            lambda: len(store.devices()) == len(stage.members), "all are born", patience_s=150.0
        )
        store.request_run(plan)
        _cut_links(stage, store, random.Random(3))
        wait_until(lambda: _is_judged(twins, plan), "twins follow the log", patience_s=30.0)
        return twins.forecasts(run=RUN)
    finally:
        twins.close()
        store.close()


def _cut_links(stage: Stage, store: Store, rng: random.Random) -> None:
    """Cut links in the middle of rounds, each class by its chance, until the run is over."""
    seen, give_up_at = 1, time.monotonic() + PATIENCE_S
    while (status := store.run_status(RUN)).status in ("requested", "active"):
        if time.monotonic() > give_up_at:
            raise HeadwaterError(f"the run had not ended after {PATIENCE_S:g} s; see hub.log")
        if status.is_open and status.round > seen:
            seen = status.round
            time.sleep(rng.uniform(0.2, 0.6))
            for member in stage.members.values():
                if rng.random() < member.kind.cut_chance:
                    member.link.cut(for_s=CUT_S)
        time.sleep(0.05)
    if status.status != "finished":
        raise HeadwaterError(f"the run is {status.status}: {status.reason}")


def _is_judged(twins: TwinStore, plan: RunPlan) -> bool:
    rows = twins.forecasts(run=RUN)
    return bool(rows) and rows[-1].round == plan.rounds and all(row.outcome for row in rows)


def _claims(
    rows: Sequence[ForecastRow], stage: Stage, rounds: int, *, is_quick: bool
) -> Iterator[Claim]:
    later = [row for row in rows if row.round > rounds // 2]
    yield _time_claim("median error of the finish time, second half of the rounds", rows, later)
    yield _time_claim("median error of the finish time, all rounds", rows, rows, goal=None)
    for kind in CLASSES:
        mine = [row for row in later if stage.members[row.device].kind is kind]
        yield _time_claim(f"  of class {kind.name}", rows, mine, goal=None)
    said = [
        (row.forecast.finishes_before(row.trial.work.deadline_s), row.outcome == "received")
        for row in rows
        if row.forecast is not None and row.outcome != "spared"
    ]
    if not said:
        raise HeadwaterError("nothing was forecast; the run had too few rounds")
    base = statistics.fmean(came for _, came in said)
    brier = statistics.fmean((chance - came) ** 2 for chance, came in said)
    yield claim(
        f"Brier score of finishing, {len(said)} parts",
        brier,
        "",
        peer=f"the base rate, {base:.0%}, known in hindsight",
        peer_value=base * (1 - base),
        # A few rounds cannot teach how often a link is cut: that is a full run's claim.
        goal=None if is_quick else base * (1 - base),
    )


def _time_claim(
    name: str,
    rows: Sequence[ForecastRow],
    chosen: Sequence[ForecastRow],
    goal: float | None = GOAL,
) -> Claim:
    usual = _running_medians(rows)
    errors, naive = [], []
    for row in chosen:
        took_s = row.trial.took_s
        if row.forecast is None or not took_s or not row.trial.is_whole:
            continue
        errors.append(abs(row.forecast.finish_s.median - took_s) / took_s)
        naive.append(abs(usual[row.round] - took_s) / took_s)
    if not errors:
        return claim(f"{name}: nothing was forecast", float("nan"), "", goal=goal)
    return claim(
        f"{name}, {len(errors)} parts",
        statistics.median(errors),
        "of the real time",
        peer="the fleet's median until then",
        peer_value=statistics.median(naive),
        goal=goal,
    )


def _running_medians(rows: Sequence[ForecastRow]) -> Mapping[int, float]:
    """By round, the median time of all parts of the rounds before."""
    medians = {}
    for number in {row.round for row in rows}:
        before = [row.trial.took_s for row in rows if row.round < number and row.trial.took_s]
        medians[number] = statistics.median(before) if before else 0.0
    return medians


if __name__ == "__main__":
    main("twins", measure)
