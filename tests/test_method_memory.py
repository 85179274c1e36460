import itertools

import msgspec
import numpy as np
import pytest

from cloud.config import UplinkPlan
from cloud.coordination.facts import RoundClosed
from cloud.coordination.rounds import RoundPolicy
from cloud.initial import initial_model
from federation.learning.methods import METHODS
from federation.learning.methods.record import Asked, Part
from federation.learning.models import initial_weights
from federation.protocol.codec import decode
from federation.protocol.messages import ModelSpec
from simulations.bus import LinkQuality
from simulations.device_model import DeviceModel
from simulations.hub import PHASES as HUB_PHASES
from simulations.tables import PHASES as DEVICE_PHASES
from simulations.traps import Trap
from tests.simulated import Simulation, on_disk, patient_plan, shards

DEVICES = 3
ROUNDS = 4
DEEP = initial_weights(ModelSpec(name="deep_mlp"), 1)
RESIDUAL = UplinkPlan(delta=True, top_k=0.2, encoding="int8", residual=True)


def plan_of(method: str, uplink: UplinkPlan):
    plan = patient_plan(DEVICES, rounds=ROUNDS, hidden=40, method=method)
    return msgspec.structs.replace(plan, uplink=uplink)


@pytest.mark.parametrize(
    ("method", "uplink"),
    [
        ("scaffold", UplinkPlan()),
        ("feddyn", UplinkPlan()),
        ("fedadam", UplinkPlan()),
        ("rebafl", UplinkPlan()),
        ("moon", UplinkPlan()),
        ("fedlp", RESIDUAL),
    ],
)
def test_what_methods_remember_survives_every_kill(method, uplink):
    """A hub killed at each phase of a round, and a device at each of an attempt, change no bit."""
    plan = plan_of(method, uplink)
    quiet = Simulation(plan, DEVICES, quality=LinkQuality()).finish()

    with on_disk(plan) as record:
        rough = Simulation(plan, DEVICES, record=record)
        for number, phase in enumerate(HUB_PHASES):
            rough.world.hub.traps.append(Trap(phase, 1 + number % ROUNDS, 3.0))
        for number, phase in enumerate(DEVICE_PHASES):
            device = rough.world.devices[f"d{number % DEVICES:02d}"]
            device.traps.append(Trap(phase, 1 + number % ROUNDS, 5.0))
        assert rough.finish() == quiet
        assert not rough.world.hub.traps


def test_a_layer_that_is_held_back_is_no_change_now():
    """With a residual, who sends a layer moves it by its own share and not by the absent's."""
    plain = plan_of("fedlp", UplinkPlan(delta=True))
    plain = msgspec.structs.replace(plain, rounds=1)
    held = msgspec.structs.replace(plain, uplink=UplinkPlan(delta=True, residual=True))
    base = decode(initial_model(plain))

    gone = decode(Simulation(plain, DEVICES).finish())
    deferred = decode(Simulation(held, DEVICES).finish())

    samples = np.array([data.samples for data in shards(DEVICES).values()])
    sums = {sum(some) for n in (1, 2) for some in itertools.combinations(samples.tolist(), n)}
    for name, tensor in base.items():
        moved = np.linalg.norm(deferred[name] - tensor) / np.linalg.norm(gone[name] - tensor)
        assert min(abs(moved - part / samples.sum()) for part in sums) < 1e-3


def test_a_run_begins_with_no_memory_of_another():
    """What a device kept of one run is not looked at in the next."""
    plan = plan_of("scaffold", UplinkPlan())
    first = Simulation(plan, DEVICES)
    first.finish()
    kept = {name: device.held.memory for name, device in first.world.devices.items()}
    assert all(memory is not None and memory.run == plan.name for memory in kept.values())

    other = msgspec.structs.replace(plan, name="other")
    second = Simulation(other, DEVICES)
    for name, device in second.world.devices.items():
        device.held.memory = kept[name]

    assert second.finish() == Simulation(other, DEVICES).finish()


def test_what_an_update_that_does_not_count_left_is_not_remembered():
    """A device that is too late, round after round, begins each time as if for the first."""
    plan = msgspec.structs.replace(
        plan_of("scaffold", UplinkPlan()),
        policy=RoundPolicy(devices_per_round=DEVICES, quorum=1, deadline_s=30.0, gather_s=5.0),
    )
    slow = DeviceModel(seconds_per_step=20.0)
    simulated = Simulation(plan, DEVICES, models={"d01": slow})

    simulated.finish()

    assert simulated.world.devices["d01"].held.memory is None
    assert simulated.world.devices["d00"].held.memory is not None
    assert all("d01" not in fact.devices for fact in simulated.of(RoundClosed))


@pytest.mark.parametrize("name", METHODS)
def test_a_plan_rule_is_a_function_of_the_round(name):
    """A hub that asks again, after a restart, gets the same part for every device."""
    method = METHODS[name]
    asked = Asked(
        seed=7,
        round=3,
        model="deep_mlp",
        sizes={},
        devices=("a", "b", "c"),
        levels={"a": 1, "b": 2, "c": 0},
        weights=DEEP,
        memory={},
        params=method.settings({}),
    )

    parts = method.parts(asked)

    assert parts == method.parts(asked)
    assert tuple(parts) == asked.devices
    assert all(isinstance(part, Part) for part in parts.values())
