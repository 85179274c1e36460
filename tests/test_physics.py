"""A device takes the seconds and joules that its class, its pace and its battery say."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from federation.learning.costs import count_macs, count_parameters
from federation.protocol.messages import LocalPlan, ModelSpec
from simulations.bodies import Bodies
from simulations.tables import DeviceClass, DevicePlan, FleetPlan, LinkPlan
from twin.device_classes import CLASSES
from twin.physics import (
    Physics,
    charge_after,
    charged_at,
    joules_per_mb,
    out_of_range,
    training_j,
    training_s,
    transfer_j,
    transfer_s,
)

DAY_S, HOUR_S = 86_400.0, 3600.0
LINEAR = LocalPlan(model=ModelSpec(name="linear"), batch_size=10)


def bodies(*classes, devices=1, link=None, seed=0, starts_hour=0.0, **plan):
    return Bodies(
        FleetPlan(devices=devices),
        link or LinkPlan(),
        DevicePlan(classes=classes, **plan),
        seed=seed,
        starts_hour=starts_hour,
    )


def stepped(physics, charge_j, since_s, until_s, each_s=1.0):
    """A battery second by second: what the closed form must come to."""
    begin, end = physics.charging_hours
    for at_s in np.arange(since_s, until_s, each_s):
        hour = (at_s + each_s / 2) / HOUR_S % 24
        inside = begin <= hour < end if begin <= end else hour >= begin or hour < end
        net_w = physics.charge_w * inside - physics.idle_w
        charge_j = min(max(charge_j + net_w * each_s, 0.0), physics.battery_j)
    return charge_j


def test_training_costs_steps_and_three_passes_over_what_is_seen():
    """Seconds are steps at a fixed cost and samples at three times their forward MACs."""
    physics = Physics(macs_per_s=1e6, step_s=0.5, sample_s=0.01, training_w=2.0, step_j=3.0)

    lasts_s = training_s(physics, steps=4, samples=100, macs=2e4, pace=1.5)

    assert lasts_s == pytest.approx(1.5 * (4 * 0.5 + 100 * (0.01 + 3 * 2e4 / 1e6)))
    joules = training_j(physics, steps=4, samples=100, macs=2e4, pace=1.5)
    assert joules == pytest.approx(2.0 * lasts_s + 4 * 3.0)


def test_transfers_cost_by_direction():
    """Bytes up and down have their own rates and energies; without a rate they take no time."""
    physics = Physics(up_bps=1e6, down_bps=4e6, up_j_per_mb=2.0, down_j_per_mb=0.5)

    assert transfer_s(physics, 500_000, 500_000) == pytest.approx(4.0 + 1.0)
    assert transfer_j(physics, 500_000, 500_000) == pytest.approx(1.0 + 0.25)
    assert transfer_s(Physics(), 10**9, 10**9) == 0.0
    assert joules_per_mb(2.0, 8e6) == 2.0


@settings(deadline=None, max_examples=30)
@given(
    st.tuples(st.floats(0, 24), st.floats(0, 24)),
    st.floats(0, 1),
    st.floats(0, 2),
    st.floats(0, 20_000),
    st.floats(0, 2 * DAY_S),
    st.integers(60, 36_000),
)
def test_a_battery_is_what_its_minutes_add_up_to(hours, idle_w, charge_w, start_j, since, lasts_s):
    """The charge after a while is that of a walk in small steps, however hours fall."""
    physics = Physics(battery_j=20_000.0, idle_w=idle_w, charge_w=charge_w, charging_hours=hours)

    closed = charge_after(physics, start_j, since, since + lasts_s)

    # The walk's last step and those over an edge of the hours are off by half a step each.
    walked = stepped(physics, start_j, since, since + lasts_s, each_s=60.0)
    assert closed == pytest.approx(walked, abs=6 * 60.0 * (idle_w + charge_w) + 1e-6)


def test_many_days_cost_no_more_than_a_few():
    """After a year the charge is that of the same hour of a day long before."""
    physics = CLASSES["phone"]

    year = charge_after(physics, 100.0, 0.0, 365 * DAY_S + 18 * HOUR_S)

    assert year == pytest.approx(charge_after(physics, 100.0, 0.0, 3 * DAY_S + 18 * HOUR_S))
    drained = Physics(battery_j=1e4, idle_w=1e-3)
    assert charge_after(drained, 1e4, 0.0, 10 * DAY_S) == pytest.approx(1e4 - 864.0)
    assert charge_after(drained, 1e4, 0.0, 10_000 * DAY_S) == 0.0


@given(
    st.tuples(st.floats(0, 24), st.floats(0, 24)),
    st.floats(0.01, 5),
    st.floats(0, 3 * DAY_S),
    st.floats(1, 19_000),
)
@settings(deadline=None)
def test_an_empty_battery_is_charged_when_the_charger_has_given_enough(hours, watts, since, target):
    """At that moment, and not before, an idle battery without a drain holds the target."""
    physics = Physics(battery_j=20_000.0, charge_w=watts, charging_hours=hours)

    at_s = charged_at(physics, 0.0, since, target)

    if math.isfinite(at_s):
        assert charge_after(physics, 0.0, since, at_s) == pytest.approx(target, rel=1e-3, abs=1.0)
        assert charge_after(physics, 0.0, since, max(since, at_s - 60.0)) <= target
    else:
        assert hours[0] == pytest.approx(hours[1], abs=1e-6) or hours == (24.0, 0.0)
    assert charged_at(Physics(battery_j=1.0), 0.0, 0.0, 1.0) == math.inf


def test_figures_out_of_range_are_found_by_name():
    """What no device can have is named, with its value; all that ship are sound."""
    assert all(out_of_range(physics) is None for physics in CLASSES.values())
    assert out_of_range(Physics(battery_j=-3.0)) == ("battery_j", -3.0, "0 or more, and finite")
    assert out_of_range(Physics(macs_per_s=0.0))[0] == "macs_per_s"
    assert out_of_range(Physics(charging_hours=(22.0, 25.0)))[0] == "charging_hours"
    assert out_of_range(Physics(idle_w=math.nan))[0] == "idle_w"


def test_named_classes_are_in_their_order():
    """A board is slower than a computer, which is slower than a phone, and needs less power."""
    plan = LocalPlan(model=ModelSpec(name="mlp"), batch_size=32)
    fleet = bodies(*(DeviceClass(like=name, share=1 / 3) for name in CLASSES), devices=3)
    place = {like: int(np.flatnonzero(fleet.class_of == n)[0]) for n, like in enumerate(CLASSES)}

    seconds = {like: fleet.training_s(place[like], plan, 100) for like in CLASSES}

    assert seconds["microcontroller"] > seconds["raspberry_pi_4"] > seconds["phone"] > 0.0
    assert fleet.quality(place["phone"]).up_bps == 6e6
    assert fleet.memory_bytes(place["microcontroller"]) == 8_000_000


def test_a_models_macs_and_a_partial_batch_count():
    """25 samples in batches of 10 for 4 steps are 35 seen, each of three times the MACs."""
    fleet = bodies(DeviceClass(macs_per_s=1e6, training_w=2.0))
    macs = count_macs(LINEAR.model)

    assert fleet.training_s(0, LINEAR, 4, samples=25) == pytest.approx(35 * 3 * macs / 1e6)
    assert fleet.training_s(0, LINEAR, 4) == pytest.approx(40 * 3 * macs / 1e6)
    assert fleet.training_j(0, LINEAR, 4, samples=25) == pytest.approx(2 * 35 * 3 * macs / 1e6)
    assert fleet.training_s(0, LINEAR, 0, samples=0) == 0.0


def test_without_classes_a_step_takes_what_the_scenario_says():
    """`seconds_per_step` and `spread` alone: each device's own pace, within 1 + spread."""
    fleet = bodies(devices=2000, seconds_per_step=0.5, spread=1.0)

    lasts = np.array([fleet.training_s(place, LINEAR, 2) for place in range(2000)])

    assert lasts.min() >= 0.5
    assert lasts.max() <= 2.0
    assert np.median(lasts) == pytest.approx(1.0, abs=0.1)
    assert fleet.training_s(7, LINEAR, 2) == pytest.approx(2 * fleet.step_s(7))
    assert fleet.training_j(7, LINEAR, 2) == 0.0
    assert [bodies(devices=9, spread=1.0, seed=s).pace(4) for s in (1, 1)] == [
        bodies(devices=9, spread=1.0, seed=1).pace(4)
    ] * 2


def test_classes_have_their_shares_and_the_lower_rate_holds():
    """Exactly as many devices of each class as its share says, in an order that is drawn."""
    slow, fast = DeviceClass(share=0.25, up_bps=1e5, level=2), DeviceClass(share=0.75, up_bps=1e7)
    fleet = bodies(slow, fast, devices=100, link=LinkPlan(up_bps=1e6, loss=0.1))

    counts = np.bincount(fleet.class_of)

    assert counts.tolist() == [25, 75]
    assert 0 < np.flatnonzero(fleet.class_of == 0).max() < 100
    assert {fleet.quality(place).up_bps for place in range(100)} == {1e5, 1e6}
    assert {fleet.level(place) for place in np.flatnonzero(fleet.class_of == 0)} == {2}
    assert {fleet.level(place) for place in np.flatnonzero(fleet.class_of == 1)} == {0}
    assert fleet.quality(0).loss == 0.1


def test_a_model_must_fit_in_memory():
    """Weights, gradients and momentum in float32 have to be within the class's memory."""
    parameters = count_parameters(LINEAR.model)
    tight = bodies(DeviceClass(memory_bytes=12 * parameters))
    heavy = LocalPlan(model=LINEAR.model, momentum=0.9)

    assert tight.fits(0, LINEAR)
    assert not tight.fits(0, heavy)
    assert bodies(DeviceClass(memory_bytes=0)).fits(0, heavy)


def test_an_empty_battery_turns_a_device_off_until_it_has_charged():
    """It cannot spend what it has not; it is back at its share; on mains nothing ever ends."""
    kind = DeviceClass(battery_j=100.0, charge_w=1.0, charging_hours=(6.0, 8.0), restart_share=0.5)
    fleet = bodies(kind, initial_charge=(1.0, 1.0), starts_hour=5.0)

    assert fleet.spend(0, 60.0, now=10.0)
    assert fleet.charge_of(0, 10.0) == pytest.approx(0.4)
    assert not fleet.spend(0, 60.0, now=20.0)
    assert fleet.powered(20.0).tolist() == [False]
    # The charger comes on at six, an hour after the start, and gives 50 J in 50 s.
    assert fleet.back_at(0, 20.0) == pytest.approx(HOUR_S + 50.0)
    assert not fleet.spend(0, 1.0, now=HOUR_S)
    assert fleet.powered(HOUR_S + 51.0).tolist() == [True]
    assert fleet.charge_of(0, HOUR_S + 60.0) == pytest.approx(0.6)
    assert fleet.spend(0, 1.0, now=HOUR_S + 60.0)
    assert fleet.back_at(0, HOUR_S + 70.0) == HOUR_S + 70.0
    mains = bodies()
    assert mains.spend(0, 1e9, 0.0)
    assert (mains.charge_of(0, 0.0), mains.back_at(0, 7.0)) == (1.0, 7.0)
    assert mains.powered(0.0).all()


def test_clocks_are_off_within_their_bounds():
    """Each device has its own offset and drift, within what the scenario allows; or none."""
    fleet = bodies(devices=500, clock_offset_s=30.0, clock_drift_ppm=100.0)

    clocks = np.array([fleet.clock_of(place) for place in range(500)])

    assert np.abs(clocks).max(0) == pytest.approx([30.0, 1e-4], rel=0.05)
    assert np.abs(clocks[:, 0]).max() <= 30.0
    assert np.abs(np.corrcoef(clocks.T)[0, 1]) < 0.2
    assert bodies().clock_of(0) == (0.0, 0.0)


def test_a_large_fleet_takes_bytes_a_device():
    """Every array together is under 40 bytes a device with all that is lifelike switched on."""
    tracemalloc = pytest.importorskip("tracemalloc")
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()

    fleet = bodies(
        DeviceClass(like="phone", share=0.5), DeviceClass(like="microcontroller", share=0.5),
        devices=100_000, spread=1.0, clock_offset_s=5.0, clock_drift_ppm=50.0,
    )  # fmt: skip
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert fleet.devices == 100_000
    assert (after - before) / 100_000 < 60
