"""Devices come and go as their model says, and what is said of one agrees with the whole."""

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulations.presence.kinds import presence_of
from simulations.presence.markov import Markov
from simulations.presence.model import Always
from simulations.presence.regions import Regional
from simulations.tables import AvailabilityPlan, OutagePlan

HOUR_S, DAY_S, WEEK_S = 3600.0, 86_400.0, 604_800.0

KINDS = {
    "always": AvailabilityPlan(),
    "bernoulli": AvailabilityPlan(kind="bernoulli", q=0.4, every_rounds=2),
    "blocks": AvailabilityPlan(kind="blocks", q=(0.2, 0.9), block_s=100.0),
    "markov": AvailabilityPlan(kind="markov", on_s=300.0, off_s=(200.0,) * 24, starts_hour=7.5),
    "regional": AvailabilityPlan(
        kind="markov", on_s=300.0, off_s=200.0,
        outages=OutagePlan(regions=3, every_s=400.0, lasts_s=(50.0, 90.0)),
    ),
    "bernoulli-regional": AvailabilityPlan(
        kind="bernoulli", q=0.7,
        outages=OutagePlan(regions=2, every_s=400.0, lasts_s=(50.0, 90.0)),
    ),
}  # fmt: skip
BY_TIME = ("always", "blocks", "markov", "regional")


def reference(seed, block, chances):
    """Bernoulli availability one device after the other, as it was first written."""
    rng = random.Random(f"{seed}/availability/{block}")
    while True:
        on = [rng.random() < q for q in chances]
        if any(on):
            return on


@pytest.mark.parametrize("q", [0.3, 0.002, (0.0, 0.5, 1.0)])
def test_rounds_draw_the_bits_they_always_drew(q):
    """The array's draws are those of one generator asked device by device, redrawn if empty."""
    plan = AvailabilityPlan(kind="bernoulli", q=q, every_rounds=3)
    presence = presence_of(plan, 20, seed=5)

    for number in range(1, 40):
        expected = reference(5, (number - 1) // 3, plan.chances(20))
        assert presence.on(number, 0.0).tolist() == expected


@pytest.mark.parametrize("plan", KINDS.values(), ids=KINDS)
def test_one_device_and_all_agree(plan):
    """What is said of a device alone is what the fleet's array says, at every time."""
    presence, alone = presence_of(plan, 12, seed=1), presence_of(plan, 12, seed=1)

    for number, now in enumerate(np.linspace(0.0, 3000.0, 60), start=1):
        on = presence.on(number, now)
        assert on.tolist() == [alone.is_on(place, number, now) for place in range(12)]
        assert on.tolist() == [presence.is_on(place, number, now) for place in range(12)]


@pytest.mark.parametrize("name", BY_TIME)
def test_devices_leave_and_return_when_they_said(name):
    """On until it leaves and not at that moment; off until it returns, and then on."""
    presence = presence_of(KINDS[name], 12, seed=2)

    for now in np.linspace(0.0, 2000.0, 23):
        for place, is_on in enumerate(presence.on(1, now).tolist()):
            there = presence.returns_at(place, 1, now)
            assert (there == now) == is_on
            change = presence.leaves_at(place, 1, now) if is_on else there
            if math.isfinite(change):
                between = np.linspace(now, change, 9)[:-1]
                assert {presence.is_on(place, 1, at) for at in between} == {is_on}
                assert presence.is_on(place, 1, change) != is_on
            else:
                assert name == "always"


@pytest.mark.parametrize("plan", KINDS.values(), ids=KINDS)
def test_what_was_asked_before_changes_nothing(plan):
    """Asked at other times, in another order or twice, it says the same; a seed is a world."""
    asked, fresh = presence_of(plan, 30, seed=3), presence_of(plan, 30, seed=3)
    for now in (5000.0, 12.0, 900.0):
        asked.on(4, now)
        asked.leaves_at(3, 4, now)

    seen = [asked.on(n, t).tolist() for n, t in ((1, 0.0), (2, 700.0), (3, 4000.0))]

    assert seen == [fresh.on(n, t).tolist() for n, t in ((1, 0.0), (2, 700.0), (3, 4000.0))]
    other = presence_of(plan, 30, seed=4)
    if plan.kind != "always":
        assert seen != [other.on(n, t).tolist() for n, t in ((1, 0.0), (2, 700.0), (3, 4000.0))]


def test_blocks_are_out_as_often_as_asked_for():
    """Each device has its own probability, every block is drawn anew, and holds to its end."""
    presence = presence_of(AvailabilityPlan(kind="blocks", q=(0.25, 1.0), block_s=60.0), 2000, 0)

    on = np.array([presence.on(1, 60.0 * block + 1).copy() for block in range(50)])

    assert on[:, ::2].mean() == pytest.approx(0.25, abs=0.01)
    assert on[:, 1::2].all()
    assert abs(np.corrcoef(on[0, ::2], on[1, ::2])[0, 1]) < 0.15
    assert presence.leaves_at(1, 1, 30.0) == math.inf


def test_a_chain_is_on_and_off_for_its_mean_times():
    """Of 600 s on and 200 s off: three quarters are on, for 600 s on average."""
    chain = Markov(4000, [600.0], [200.0], seed=0)

    shares = [chain.on(1, now).mean() for now in np.arange(0.0, 4000.0, 400.0)]
    stays = [chain.leaves_at(p, 1, 4000.0) - 4000.0 for p in np.flatnonzero(chain.on(1, 4000.0))]

    assert np.mean(shares) == pytest.approx(0.75, abs=0.02)
    assert shares[0] == pytest.approx(0.75, abs=0.03)
    assert np.mean(stays) == pytest.approx(600.0, rel=0.06)  # memoryless: what is left, too


def test_the_hour_of_the_week_decides():
    """By night devices stay on and by day off; Monday's noon is 36 hours before Tuesday's end."""
    night = [hour < 6 or hour >= 22 for hour in range(24)]
    on_s = [8 * HOUR_S if is_night else 0.25 * HOUR_S for is_night in night]
    off_s = [0.25 * HOUR_S if is_night else 8 * HOUR_S for is_night in night]
    chain = Markov(3000, on_s, off_s, seed=0, starts_hour=12.0)

    shares = {hour: chain.on(1, hour * HOUR_S).mean() for hour in (0, 6, 14, 24, 38)}

    assert shares[14] > 0.9 > 0.2 > shares[0]
    assert shares[6] < 0.2
    assert shares[24] == pytest.approx(shares[0], abs=0.03)
    assert shares[38] == pytest.approx(shares[14], abs=0.03)


@settings(deadline=None, max_examples=8)
@given(
    st.lists(st.floats(3600.0, 1e6), min_size=24, max_size=24),
    st.lists(st.floats(3600.0, 1e6), min_size=24, max_size=24),
    st.floats(0.0, 167.9),
)
def test_a_fleet_begins_as_it_goes_on(on_s, off_s, starts_hour):
    """The share on at the start is that of the same hour a week later, whatever the rates."""
    chain = Markov(3000, on_s, off_s, seed=1, starts_hour=starts_hour)

    begins, later = chain.on(1, 0.0).mean(), chain.on(1, WEEK_S).mean()

    assert begins == pytest.approx(later, abs=0.065)


def test_a_region_goes_off_together():
    """All devices of a region are out at once; the mean times are those that were asked for."""
    plan = OutagePlan(regions=4, every_s=1000.0, lasts_s=(200.0, 400.0))
    presence = presence_of(AvailabilityPlan(outages=plan), 400, seed=0)
    assert isinstance(presence, Regional)

    times = np.arange(0.0, 200_000.0, 50.0)
    on = np.array([presence.on(1, now) for now in times])

    for region in range(4):
        own = on[:, presence.region == region]
        assert (own == own[:, :1]).all()
    assert on.mean() == pytest.approx(1000 / 1300, abs=0.03)
    assert np.bincount(presence.region).min() > 60
    out = np.flatnonzero(~on[:, 0])[0]
    back = presence.returns_at(0, 1, times[out])
    assert times[out] < back <= times[out] + 400.0


def test_a_million_devices_cost_milliseconds_and_bytes():
    """A chain's array of a million is there at once, in thirteen bytes a device."""
    chain = Markov(1_000_000, [7200.0], [3600.0], seed=0)

    kept = sum(array.nbytes for array in (chain._is_on, chain._until, chain._flips))

    assert kept == 13_000_000
    assert len(chain.on(1, 60.0)) == 1_000_000
    assert Always(1_000_000).on(1, 0.0).all()
