"""Devices in their ways of life, as real processes, and what memory each of them holds."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.claims import ROOT, Options
from benchmarks.environments import Environment
from benchmarks.fleet import (
    Fleet,
    agent_settings,
    all_ready,
    check_alive,
    hub_settings,
    running,
    serving,
)
from benchmarks.flower.deployment import Flower, flower_deployment
from benchmarks.processes import Memory, cpu_s, memory, wait_until
from cloud.config import HubConfig, ModelChoice, ReleasePlan, RunPlan
from cloud.coordination.rounds import RoundPolicy
from federation.datasets.cached import load
from federation.errors import HeadwaterError
from federation.learning.plans import TrainingPlan
from simulations.processes import Process, agent_process

_INFER = """
import sys, time
import numpy as np
from edge_agent.inference import Predictor
predictor = Predictor(sys.argv[1])
for _ in range(100):
    predictor.predict(np.zeros((1, 64), np.float32))
print("infers", "with torch" if "torch" in sys.modules else "without torch", flush=True)
time.sleep(600)
"""


@dataclass(frozen=True, slots=True)
class Resident:
    """What one device holds in memory, and the share of a core it keeps busy (0: not measured)."""

    memory: Memory
    cpu_share: float = 0.0


def measure_residents(
    options: Options, *, idle: Environment, inferring: Environment, flower: Environment | None
) -> dict[str, Resident]:
    """An idle, an inferring and a training device, and under `flower` an idle SuperNode."""
    config = hub_settings(options.folder, options.broker)
    data = _write_digits(options.folder / "data")
    found: dict[str, Resident] = {}
    with serving(config, options.folder) as (hub, store):
        fleet = Fleet(hub, {}, store)
        with _flower(options, flower) as node, _idle_agent(options, config, idle, fleet, data) as a:
            found |= _watch_idle(options, a, node)
        with _training_agent(options, config, fleet, data) as agent:
            release = _released(options, fleet, agent, data)
            found["training"] = _watch_training(options, fleet, agent)
    found["inferring"] = _watch_inferring(options, inferring, release)
    return found


@contextmanager
def _flower(options: Options, environment: Environment | None) -> Iterator[Flower | None]:
    with ExitStack() as stack:
        flower = None
        if environment is not None:
            options.tell("Flower's SuperLink and a SuperNode start")
            flower = stack.enter_context(
                flower_deployment(environment, options.folder / "flower", nodes=1)
            )
        yield flower


@contextmanager
def _idle_agent(
    options: Options, config: HubConfig, environment: Environment, fleet: Fleet, data: Path
) -> Iterator[Process]:
    home = options.folder / "idle"
    agent = agent_process(agent_settings(home, config.broker.port, data), home)
    agent = _in_environment(agent, environment)
    with _ready(fleet, home.name, agent):
        yield agent


@contextmanager
def _training_agent(
    options: Options, config: HubConfig, fleet: Fleet, data: Path
) -> Iterator[Process]:
    home = options.folder / "training"
    agent = agent_process(agent_settings(home, config.broker.port, data), home)
    with _ready(fleet, home.name, agent):
        yield agent


@contextmanager
def _ready(fleet: Fleet, name: str, agent: Process) -> Iterator[None]:
    fleet = Fleet(fleet.hub, {name: agent}, fleet.store)
    with running([agent]):
        wait_until(lambda: all_ready(fleet), f"start of the {name} agent", patience_s=60.0)
        yield


def _watch_idle(options: Options, agent: Process, flower: Flower | None) -> dict[str, Resident]:
    """Look at both in turn, over the same time, once they have settled."""
    settle_s, watch_s = (5.0, 10.0) if options.is_quick else (20.0, 60.0)
    options.tell(f"idle for {settle_s + watch_s:g} s")
    watched = {"idle": agent.pid}
    if flower is not None:
        watched["flower"] = flower.nodes[0].pid
    time.sleep(settle_s)
    began = time.monotonic()
    spent = {name: cpu_s([pid]) for name, pid in watched.items()}
    seen: dict[str, list[Memory]] = {name: [] for name in watched}
    while time.monotonic() < began + watch_s:
        for name, pid in watched.items():
            seen[name].append(memory([pid]))
        time.sleep(1.0)
    elapsed_s = time.monotonic() - began
    return {
        name: Resident(_most(seen[name]), (cpu_s([pid]) - spent[name]) / elapsed_s)
        for name, pid in watched.items()
    }


def _released(options: Options, fleet: Fleet, agent: Process, data: Path) -> Path:
    """Train one round, and wait until the device has fetched what was released of it."""
    options.tell("a round of training, and its release")
    fleet.run(_plan("release", epochs=1, evaluation=data), patience_s=120.0)
    models = options.folder / "training" / "journal" / "models"

    def has_fetched() -> bool:
        check_alive([fleet.hub, agent])
        return bool(list(models.glob("*.onnx")))

    wait_until(has_fetched, "the release", patience_s=120.0)
    return next(models.glob("*.onnx"))


def _watch_training(options: Options, fleet: Fleet, agent: Process) -> Resident:
    options.tell("a device trains")
    plan = _plan("long", epochs=100_000, evaluation=None)
    fleet.store.request_run(plan)

    def trains() -> bool:
        check_alive([fleet.hub, agent])
        (row,) = (row for row in fleet.store.devices() if row.device == "training")
        return row.task_status == "training"

    wait_until(trains, "the training", patience_s=60.0)
    seen = []
    for _ in range(5 if options.is_quick else 15):
        time.sleep(1.0)
        seen.append(memory([agent.pid]))
    if not trains():
        raise HeadwaterError("the training was over before it was looked at; make it longer")
    fleet.store.request_stop(plan.name)
    return Resident(_most(seen))


def _watch_inferring(options: Options, environment: Environment, model: Path) -> Resident:
    options.tell("a device infers")
    command = [str(environment.python), "-c", _INFER, str(model)]
    process = _in_environment(Process(command, options.folder / "infer.log"), environment)

    def infers() -> bool:
        check_alive([process])
        return "infers" in process.last_words()

    with running([process]):
        wait_until(infers, "the inference", patience_s=60.0)
        if "without torch" not in process.last_words():
            raise HeadwaterError("inference has imported torch; it must do without")
        return Resident(memory([process.pid]))


def _in_environment(process: Process, environment: Environment) -> Process:
    """The same command, run by the environment's interpreter on this working tree's code."""
    process.command[0] = str(environment.python)
    # Byte code is kept, as on a device: compiling at each start would leave memory behind.
    process.environment = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": ""}
    return process


def _plan(name: str, *, epochs: int, evaluation: Path | None) -> RunPlan:
    return RunPlan(
        name=name,
        rounds=1,
        model=ModelChoice(name="mlp", sizes={"inputs": 64, "hidden": 64, "classes": 10}),
        policy=RoundPolicy(devices_per_round=1),
        training=TrainingPlan(epochs=epochs),
        release=ReleasePlan(every=1),
        evaluation=evaluation,
    )


def _write_digits(folder: Path) -> Path:
    digits = load("digits", cache=folder)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "data.npz", x=digits.x.reshape(-1, 64), y=digits.y)
    return folder


def _most(seen: list[Memory]) -> Memory:
    return max(seen, key=lambda each: each.rss_mb)
