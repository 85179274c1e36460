"""Whatever fails in a simulated world, a patient run ends with the same bits."""

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cloud.coordination.facts import (
    AttemptChanged,
    DeviceBorn,
    PresenceChanged,
    RoundClosed,
    RoundOpened,
    UpdateAccepted,
)
from simulations import hub as hubs
from simulations import tables
from simulations.bus import LinkQuality
from simulations.device_model import DeviceModel
from simulations.traps import Trap
from tests.simulated import SETTINGS, Simulation, on_disk, patient_plan, shards, undisturbed

FLEET = 3
NAMES = st.sampled_from([f"d{n:02d}" for n in range(FLEET)])
TIMES = st.floats(0.0, 40.0)
AWAY = st.floats(0.0, 30.0)

FAULTS = st.one_of(
    st.tuples(st.just("kill"), TIMES, NAMES, AWAY),
    st.tuples(st.just("cut"), TIMES, NAMES, AWAY),
    st.tuples(st.just("silent"), TIMES, NAMES, AWAY),
    st.tuples(st.just("trap"), st.sampled_from(tables.PHASES), NAMES, AWAY),
    st.tuples(st.just("hub-cut"), TIMES, st.none(), AWAY),
    st.tuples(st.just("broker"), TIMES, st.booleans(), st.floats(0.0, 5.0)),
)
QUALITY = st.builds(
    LinkQuality,
    delay_s=st.tuples(st.floats(0.0, 0.5), st.floats(0.5, 3.0)),
    loss=st.sampled_from([0.0, 0.1, 0.4]),
    duplicates=st.sampled_from([0.0, 0.2, 0.6]),
    up_bps=st.sampled_from([0.0, 100_000.0]),
    down_bps=st.sampled_from([0.0, 100_000.0]),
)


def arrange(world, faults):
    for kind, when, who, away_s in faults:
        match kind:
            case "kill":
                world.clock.call_at(when, world.devices[who].kill, away_s)
            case "cut":
                world.clock.call_at(when, world.devices[who].cut, away_s)
            case "silent":
                world.clock.call_at(when, silently, world.devices[who], away_s)
            case "trap":
                world.devices[who].traps.append(Trap(when, 0, away_s))
            case "hub-cut":
                world.clock.call_at(when, world.hub.cut, away_s)
            case "hub-kill":
                world.clock.call_at(when, world.hub.kill, away_s)
            case "broker":
                world.clock.call_at(when, restart, world, away_s, who)


def silently(device, away_s):
    device.cut(away_s, is_silent=True)


def restart(world, away_s, forgets):
    world.restart_broker(away_s, forgets=forgets)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(FAULTS, max_size=8), QUALITY, st.integers(0, 99))
def test_no_fault_changes_the_weights_of_a_patient_run(faults, quality, seed):
    """Kills, cuts, delays, losses and duplicates: same bits, and each update counts once."""
    disturbed = Simulation(patient_plan(FLEET), FLEET, quality=quality, seed=seed)
    arrange(disturbed.world, faults)

    model = disturbed.finish()

    assert model == undisturbed(FLEET)
    assert disturbed.counted() == {
        f"run_{number}_d{n:02d}": 1 for number in (1, 2, 3) for n in range(FLEET)
    }


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.tuples(st.just("hub-kill"), TIMES, st.none(), AWAY), min_size=1, max_size=3),
    st.lists(FAULTS, max_size=4),
    QUALITY,
)
@example([("hub-kill", 0.0, None, 1.0)], [], LinkQuality())
def test_a_hub_killed_at_any_moment_goes_on_from_its_record(hub_kills, faults, quality):
    """The hub's process dies at random, its database stays: same bits, each update once."""
    plan = patient_plan(FLEET)
    with on_disk(plan) as record:
        disturbed = Simulation(plan, FLEET, quality=quality, record=record)
        arrange(disturbed.world, [*hub_kills, *faults])

        model = disturbed.finish()

    assert model == undisturbed(FLEET)
    assert set(disturbed.counted().values()) == {1}
    assert len(disturbed.of(UpdateAccepted)) == 3 * FLEET


@pytest.mark.parametrize("phase", hubs.PHASES)
def test_a_hub_killed_at_a_phase_of_a_round_goes_on_with_it(phase):
    """Round open, mid-gathering, before its acknowledgement, mid-aggregation: same bits."""
    plan = patient_plan(FLEET)
    with on_disk(plan) as record:
        disturbed = Simulation(plan, FLEET, record=record)
        disturbed.world.hub.traps.append(Trap(phase, 2, 3.0))

        model = disturbed.finish()

    assert disturbed.world.hub.traps == []
    assert model == undisturbed(FLEET)
    assert set(disturbed.counted().values()) == {1}
    assert [fact.round for fact in disturbed.of(RoundClosed)] == [1, 2, 3]


@pytest.mark.parametrize("phase", tables.PHASES)
def test_a_device_killed_at_a_phase_of_an_attempt_goes_on_with_it(phase):
    """Before, in and after download, training and upload: same bits, and no second training."""
    disturbed = Simulation(patient_plan(FLEET), FLEET)
    disturbed.world.devices["d01"].traps.append(Trap(phase, 2, 3.0))

    model = disturbed.finish()

    assert disturbed.world.devices["d01"].traps == []
    assert model == undisturbed(FLEET)
    assert set(disturbed.counted().values()) == {1}
    assert [fact.device for fact in disturbed.of(DeviceBorn)].count("d01") == 2


def test_the_same_seed_gives_the_same_history_and_another_one_another():
    """A seed decides every fact and its time; weights do not depend on it."""
    quality = LinkQuality(delay_s=(0.0, 2.0), loss=0.2, duplicates=0.3)
    first, again, other = (
        Simulation(patient_plan(FLEET), FLEET, quality=quality, seed=seed) for seed in (1, 1, 2)
    )

    weights = {simulation.finish() for simulation in (first, again, other)}

    assert first.facts == again.facts
    assert first.facts != other.facts
    assert len(weights) == 1


def test_a_broker_that_forgets_everything_costs_time_and_nothing_else():
    """Sessions and retained letters gone: births rebuild presence, the round completes."""
    disturbed = Simulation(patient_plan(FLEET), FLEET)
    for at in (2.0, 6.0, 11.0):
        disturbed.world.clock.call_at(at, restart, disturbed.world, 1.0, True)

    assert disturbed.finish() == undisturbed(FLEET)


def test_a_device_that_never_comes_back_is_not_waited_for_beyond_its_grace():
    """With a quorum the round closes without it, says who was lost, and asks only the others."""
    plan = patient_plan(FLEET, quorum=2, lost_grace_s=10.0, gather_s=5.0)
    disturbed = Simulation(plan, FLEET)
    disturbed.world.devices["d02"].traps.append(Trap("mid-training", 1, None))

    disturbed.finish()

    first, *later = disturbed.of(RoundClosed)
    assert first.devices == ("d00", "d01")
    assert first.at < 20.0
    assert all(fact.devices == ("d00", "d01") for fact in later)
    lost = [f for f in disturbed.of(AttemptChanged) if f.status == "lost"]
    assert [(f.device, f.reason) for f in lost] == [("d02", "its link was lost")]
    assert "its link was lost" in disturbed.of(RoundOpened)[-1].excluded["d02"]


def test_late_updates_are_dropped_or_kept_as_the_policy_says():
    """A straggler's update misses its round: dropped by default, counted later if kept."""
    counted = {}
    for late, method in (("drop", "fedavg"), ("keep", "fedprox")):
        plan = patient_plan(
            4, rounds=8, method=method, quorum=1, devices_per_round=1, over_selection=2.0, late=late
        )
        slow = {"d01": DeviceModel(seconds_per_step=1.6)}
        simulation = Simulation(plan, 4, models=slow)
        simulation.finish()
        counted[late] = [(f.round, f.counts_in) for f in simulation.of(UpdateAccepted)]

    assert all(made == counts for made, counts in counted["drop"])
    assert any(made < counts for made, counts in counted["keep"])


def test_a_silent_cut_is_noticed_by_the_hub_when_the_keepalive_runs_out():
    """A half-open link: presence turns to lost after 1.5 keepalives, not before and not never."""
    disturbed = Simulation(patient_plan(FLEET), FLEET)
    disturbed.world.clock.call_at(1.0, silently, disturbed.world.devices["d00"], 60.0)

    disturbed.finish()

    lost = [f for f in disturbed.of(PresenceChanged) if f.state == "lost"]
    assert [f.device for f in lost] == ["d00"]
    assert lost[0].at == pytest.approx(1.0 + 1.5 * SETTINGS.keepalive_s)


def test_training_that_was_cut_short_goes_on_from_its_checkpoint():
    """A kill late in a long training costs at most one checkpoint interval, and no bits."""
    model = DeviceModel(seconds_per_step=100.0, checkpoint_s=10.0, settings=SETTINGS)
    plan = patient_plan(FLEET, rounds=1)
    models = {f"d{n:02d}": model for n in range(FLEET)}
    quiet, disturbed = (Simulation(plan, FLEET, models=models) for _ in range(2))
    disturbed.world.clock.call_at(295.0, disturbed.world.devices["d00"].kill, 1.0)

    assert disturbed.finish() == quiet.finish()
    assert 300.0 <= quiet.world.clock.now < 302.0
    assert quiet.world.clock.now + 1.0 <= disturbed.world.clock.now < 320.0


def test_devices_that_are_not_asked_hear_nothing_of_a_round():
    """A round's letters go to those who take part: more rounds are no more work for the others."""
    fleet, heard = 20, {}
    idle = set(shards(fleet))
    for rounds in (2, 6):
        plan = patient_plan(fleet, rounds=rounds, hidden=8, devices_per_round=2, quorum=2)
        models = dict.fromkeys(shards(fleet), DeviceModel())
        simulation = Simulation(plan, fleet, models=models)
        simulation.finish()
        heard[rounds] = {name: simulation.world.bus.traffic(name) for name in shards(fleet)}
        for fact in simulation.of(RoundOpened):
            idle -= {entry.device for entry in fact.attempts}

    assert len(idle) >= 5
    assert all(heard[2][name] == heard[6][name] for name in idle)
