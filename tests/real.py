"""A real fleet for tests: hub, broker and agents as processes, in the test's folder."""

import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np

from cloud.config import BrokerConfig, HubConfig, ModelChoice, ReleasePlan, RunPlan
from cloud.coordination.rounds import RoundPolicy
from cloud.initial import initial_model
from cloud.record.queries import RunStatus
from cloud.record.registry import Registry
from cloud.record.store import Store
from edge_agent.config import AgentConfig, DataConfig, TrainingConfig, TwinConfig
from edge_agent.trainer import fulfil
from federation.datasets.cached import load
from federation.learning.data import LocalData
from federation.learning.plans import TrainingPlan
from simulations.device_model import DeviceModel, Member
from simulations.link import LinkProxy
from simulations.processes import Process, agent_process, free_port, hub_process
from simulations.workshop.in_process import InProcess
from simulations.world import World

NO_LEVELS: Mapping[str, int] = MappingProxyType({})
CRASHING = Path(__file__).with_name("crashing.py")


def digits_plan(
    devices: int, rounds: int, *, hidden: int = 64, epochs: int = 1, momentum: float = 0.9
) -> RunPlan:
    """A run on digits that waits for everybody, whatever befalls them."""
    return RunPlan(
        name="digits",
        rounds=rounds,
        model=ModelChoice(name="mlp", sizes={"inputs": 64, "hidden": hidden, "classes": 10}),
        policy=RoundPolicy(
            devices_per_round=devices,
            quorum=devices,
            gather_s=90.0,
            deadline_s=90.0,
            lost_grace_s=90.0,
        ),
        training=TrainingPlan(epochs=epochs, batch_size=16, learning_rate=0.05, momentum=momentum),
        release=ReleasePlan(every=0),
        seed=11,
    )


def digits_shards(devices: int) -> dict[str, LocalData]:
    """The digits dealt in turn: each device has its share of every class."""
    digits = load("digits", cache=Path())
    return {
        f"d{n:02d}": LocalData(digits.x[n::devices], digits.y[n::devices]) for n in range(devices)
    }


def simulate(
    plan: RunPlan, shards: Mapping[str, LocalData], levels: Mapping[str, int] = NO_LEVELS
) -> bytes:
    """The final model of the same run, undisturbed, in the world."""
    members = [
        Member(name, data, DeviceModel(level=levels.get(name, 0))) for name, data in shards.items()
    ]
    world = World(plan, initial_model(plan), members, workshop=InProcess(shards, train=fulfil))
    ended = world.run()
    assert ended is not None
    assert ended.status == "finished"
    return world.model


@dataclass
class RealFleet:
    """The processes, none of them started yet, and the hub's record."""

    plan: RunPlan
    hub_config: HubConfig
    hub: Process
    agents: dict[str, Process]
    links: dict[str, LinkProxy]
    store: Store | None = None

    def begin(self) -> None:
        """Start everything, and ask for the run."""
        self.start()
        assert self.store is not None
        self.store.request_run(self.plan)

    def start(self) -> None:
        """Start the hub and every agent; there is no run yet."""
        self.hub.start()
        wait_until(lambda: "hub is serving" in self.hub.last_words(), 90, self.account)
        self.store = Store(self.hub_config.database_url)
        for agent in self.agents.values():
            agent.start()

    def follow(self, plan: RunPlan) -> bytes:
        """Ask for this run and wait for its end: the final model."""
        assert self.store is not None
        self.plan = plan
        self.store.request_run(plan)
        return self.finish()

    def status(self) -> RunStatus:
        assert self.store is not None
        return self.store.run_status(self.plan.name)

    def finish(self, patience_s: float = 100.0) -> bytes:
        """Wait for the end of the run: the final model."""
        over = ("finished", "failed", "stopped")
        wait_until(lambda: self.status().status in over, patience_s, self.account)
        assert self.status().status == "finished", self.account()
        assert self.store is not None
        last = self.store.rounds(self.plan.name)[-1]
        assert last.model is not None
        return Registry(self.hub_config.folder).read(last.model)

    def account(self) -> str:
        """What everybody printed last, for a failing test."""
        everyone = {"hub": self.hub, **self.agents}
        return "\n".join(f"--- {name}\n{who.last_words()}" for name, who in everyone.items())


@contextmanager
def real_fleet(
    folder: Path,
    kind: str,
    plan: RunPlan,
    shards: Mapping[str, LocalData],
    *,
    latencies_s: Mapping[str, float] | None = None,
    infers: bool = False,
    levels: Mapping[str, int] = NO_LEVELS,
    mirrors: Collection[str] = (),
) -> Iterator[RealFleet]:
    """A fleet of processes over a broker of this kind; a link of its own for each latency."""
    port = free_port()
    broker = BrokerConfig(kind=kind, port=port, keepalive_s=10)  # type: ignore[arg-type]
    hub_config = HubConfig(folder=folder / "hub", broker=broker)
    with ExitStack() as stack:
        links = {
            name: stack.enter_context(LinkProxy(port, latency_s=latency_s))
            for name, latency_s in (latencies_s or {}).items()
        }
        agents = {}
        for name, data in shards.items():
            home = folder / name
            (home / "data").mkdir(parents=True)
            np.savez(home / "data" / "data.npz", x=data.x, y=data.y)
            config = AgentConfig(
                device=name,
                broker=f"mqtt://127.0.0.1:{links[name].port if name in links else port}",
                folder=home / "journal",
                keepalive_s=10,
                infers=infers,
                data=DataConfig(folder=home / "data"),
                training=TrainingConfig(checkpoint_s=0.05, level=levels.get(name, 0)),
                twin=TwinConfig(mirror=name in mirrors),
            )
            agents[name] = agent_process(config, home, verbose=True)
        hub = hub_process(hub_config, folder, verbose=True)
        fleet = RealFleet(plan, hub_config, hub, agents, links)
        try:
            yield fleet
        finally:
            for process in (*agents.values(), hub):
                process.stop()
            if fleet.store is not None:
                fleet.store.close()


def make_crash(process: Process, phase: str, mark: Path) -> None:
    """From its next start on, kill this process with SIGKILL at a phase, once (see `mark`)."""
    module, *rest = process.command[process.command.index("-m") + 1 :]
    process.command = [sys.executable, str(CRASHING), phase, str(mark), module, *rest]


def restart_after_crash(process: Process, mark: Path, account: Callable[[], str]) -> None:
    """Wait until the process has killed itself, see that it did so by SIGKILL, start it again."""
    wait_until(lambda: mark.exists() and not process.is_running, 60, account)
    assert process.stop() == -9, account()
    process.start()


def wait_until(holds: Callable[[], bool], patience_s: float, account: Callable[[], str]) -> None:
    """Look again and again until it holds; fail with an account when patience is over."""
    deadline = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < deadline, account()
        time.sleep(0.05)
