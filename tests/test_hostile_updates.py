"""No device can end the hub by what it says of itself or sends: its word is refused or bounded."""

import msgspec
import numpy as np
import pytest

from cloud.config import MethodChoice, ModelChoice, UplinkPlan
from cloud.coordination.facts import RoundClosed
from cloud.initial import initial_model
from federation.errors import ProtocolError
from federation.learning.methods import METHODS
from federation.learning.uplink import unpack_update
from federation.protocol import codec
from federation.protocol import messages as m
from tests.rooms import Room, encoded, run_plan

HUGE = float(np.finfo(np.float32).max)
MOST_SAMPLES = 2**40
STAGED = {"fedlp_hetero": 0, "fedlp_exits": 1, "depthfl": 1, "full_depth_only": 0}


@pytest.mark.parametrize("other_name", ["run_01_c", "run_\u0661_c"])
def test_an_attempt_has_one_name(other_name):
    """An update under another spelling of an attempt's number is no second update of its device."""
    plan = run_plan(2, rounds=3, method="fedprox", over_selection=1.5, late="keep")
    room = Room(plan)
    room.born("a", "b", "c")
    room.hear("c", m.TaskEvent(attempt="run_1_c", event="training"))
    room.send("a", encoded(1.0))
    room.send("b", encoded(1.0))

    room.send("c", encoded(2.0), number=1)
    room.send("c", encoded(3.0), attempt=other_name)
    room.send("a", encoded(1.0), number=2)
    room.send("b", encoded(1.0), number=2)

    assert len(room.of(RoundClosed)) == 2
    assert "stored" not in room.verdicts("c")[1:]


@pytest.mark.parametrize("level", [-1, 2**31, 2**63 + 5])
def test_a_level_that_cannot_be_is_refused_at_birth(level):
    """A level below zero, or beyond what the record holds, is no letter."""
    birth = m.Birth(capability=m.Capability(agent="a", level=level))

    with pytest.raises(ProtocolError, match="level"):
        m.unseal(m.seal("d01", 1, birth))


def _plan(method, uplink):
    sizes = {"exits": STAGED[method]} if method in STAGED else {}
    model = ModelChoice(name="deep_mlp" if sizes else "mlp", sizes=sizes)
    params = {"budget": 0.5} if method == "fedlp" else {}
    plan = run_plan(3, rounds=4, max_abandoned=9)
    return msgspec.structs.replace(
        plan, model=model, method=MethodChoice(name=method, params=params), uplink=uplink
    )


def _extreme(base, plan, value, *, narrower):
    """An update as the plan asks for it, all entries of which are this one value."""
    asked = {
        name: np.full_like(tensor, value)
        for name, tensor in base.items()
        if "/" in name or plan.layers is None or codec.layer_of(name) in plan.layers
    }
    data = codec.encode(asked)
    unpack_update(data, base, plan, narrower=narrower)
    return data


def _base(run, device):
    """What this device trains from in the open round."""
    attempts = run.round.attempts.values()
    attempt = next(entry for entry in attempts if entry.device == device)
    return codec.decode(run.work(attempt, 60.0)[1])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("delta", [False, True], ids=["weights", "differences"])
@pytest.mark.parametrize("method", METHODS)
def test_extreme_updates_end_no_round(method, delta):
    """With every method, devices that send the largest numbers there are close all rounds."""
    if METHODS[method].needs_delta and not delta:
        pytest.skip("its plan needs differences")
    plan = _plan(method, UplinkPlan(delta=delta))
    room = Room(plan, initial_model(plan))
    for level, device in enumerate(("a", "b", "c")):
        capability = m.Capability(agent="test", level=[2**31 - 1, 1, 0][level])
        room.hear(device, m.Birth(capability=capability))

    for number in range(1, 5):
        run = room.hub.run
        assert run.number == number
        for device, value, samples in (
            ("a", HUGE, MOST_SAMPLES),
            ("b", -HUGE if number % 2 else HUGE, MOST_SAMPLES),
            ("c", 1e-45, 1),
        ):
            local, base = run.local_plan(device), _base(run, device)
            data = _extreme(base, local, value, narrower=METHODS[method].narrower)
            room.send(device, data, number=number, samples=samples)

    assert len(room.of(RoundClosed)) == 4
    for tensor in room.model().values():
        assert np.isfinite(tensor).all()
    kept = room.of(RoundClosed)[-1].memory
    for tensor in codec.decode(kept).values() if kept else ():
        assert np.isfinite(tensor).all()
