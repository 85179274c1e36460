"""A small simulated fleet for tests: real training on digits, quick enough to repeat."""

import functools
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from cloud.config import MethodChoice, ModelChoice, RunPlan
from cloud.coordination.facts import UpdateAccepted
from cloud.coordination.rounds import RoundPolicy
from cloud.initial import initial_model
from cloud.record.registry import Registry
from cloud.record.store import Store
from edge_agent.agent import AgentSettings
from edge_agent.trainer import fulfil
from federation.datasets.cached import load
from federation.learning.data import LocalData
from federation.learning.plans import TrainingPlan
from simulations.bus import LinkQuality
from simulations.conditions import Conditions
from simulations.device_model import DeviceModel, Member
from simulations.hub import HubRecord
from simulations.workshop.in_process import InProcess
from simulations.world import World

LONG_S = 1e5
"""Longer than any failure here lasts: with it as deadline, nobody is given up."""

SETTINGS = AgentSettings(heartbeat_s=20.0, keepalive_s=4.0, timeout_s=2.0)


@functools.cache
def shards(devices: int) -> dict[str, LocalData]:
    """A few digits each: enough for bits to depend on every one of them."""
    torch.set_num_threads(1)
    digits = load("digits", cache=Path())
    return {
        f"d{n:02d}": LocalData(digits.x[n:200:devices], digits.y[n:200:devices])
        for n in range(devices)
    }


def patient_plan(
    devices: int, *, rounds: int = 3, hidden: int = 300, method: str = "fedavg", **policy: object
) -> RunPlan:
    """A run that waits for everybody. With 300 hidden units, a model has two chunks."""
    rules: dict[str, object] = {
        "devices_per_round": devices,
        "quorum": devices,
        "gather_s": LONG_S,
        "deadline_s": LONG_S,
        "lost_grace_s": LONG_S,
    }
    return RunPlan(
        name="run",
        rounds=rounds,
        model=ModelChoice(name="mlp", sizes={"hidden": hidden}),
        policy=RoundPolicy(**(rules | policy)),  # type: ignore[arg-type]
        method=MethodChoice(name=method),
        training=TrainingPlan(max_steps=3, batch_size=16, learning_rate=0.1, momentum=0.9),
        seed=5,
    )


class Simulation:
    """One world, with the facts its hub recorded."""

    def __init__(
        self,
        plan: RunPlan,
        devices: int,
        *,
        quality: LinkQuality | None = None,
        seed: int = 0,
        record: HubRecord | None = None,
        models: Mapping[str, DeviceModel] | None = None,
    ) -> None:
        self.facts: list[object] = []
        self.plan = plan
        quality = quality or LinkQuality(delay_s=(0.01, 0.2))
        usual = DeviceModel(seconds_per_step=1.0, quality=quality, settings=SETTINGS)
        models = models or {}
        held = shards(devices)
        self.world = World(
            plan,
            initial_model(plan),
            [Member(name, data, models.get(name, usual)) for name, data in held.items()],
            workshop=InProcess(held, train=fulfil),
            conditions=Conditions(seed=seed),
            record=record or HubRecord(),
            observe=self.facts.append,
        )

    def finish(self, limit_s: float = 20 * LONG_S) -> bytes:
        """Run to the end: the final model."""
        ended = self.world.run(limit_s)
        assert ended is not None, "the run did not end"
        assert ended.status == "finished", ended.reason
        return self.world.model

    def of(self, kind: type[Any]) -> list[Any]:
        """The facts of one kind, in order."""
        return [fact for fact in self.facts if isinstance(fact, kind)]

    def counted(self) -> Counter[str]:
        """How often each attempt's update was accepted."""
        return Counter(fact.attempt for fact in self.of(UpdateAccepted))


@functools.cache
def undisturbed(devices: int, rounds: int = 3, hidden: int = 300) -> bytes:
    """The final model where nothing goes wrong."""
    quiet = Simulation(
        patient_plan(devices, rounds=rounds, hidden=hidden), devices, quality=LinkQuality()
    )
    return quiet.finish()


@contextmanager
def on_disk(plan: RunPlan) -> Iterator[HubRecord]:
    """The hub's real record, in a folder that goes away."""
    with tempfile.TemporaryDirectory() as folder:
        registry = Registry(Path(folder))
        store = Store(f"sqlite:///{folder}/hub.db")
        store.request_run(plan)
        try:
            yield HubRecord(
                record=lambda facts: store.record(facts, registry),
                restore=lambda: store.restore(registry),
                read_content=registry.read,
            )
        finally:
            store.close()
