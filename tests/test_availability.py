"""Devices are there or not by the seed and the round alone, and the hub is told so."""

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest

from federation.errors import ConfigError
from federation.protocol.messages import Capability
from optimizer.baselines import select_uniformly
from optimizer.selection import Candidates
from simulations.availability import select_available
from simulations.fleet import fleet_data
from simulations.populating import population_of
from simulations.presence.kinds import presence_of
from simulations.scenario import Scenario
from simulations.simulation import simulate
from simulations.tables import AvailabilityPlan

FLEET = [f"d{n:02d}" for n in range(20)]


def available(plan, devices, seed, number):
    """Who is there in a round, by name."""
    on = presence_of(plan, len(devices), seed).on(number, 0.0)
    return frozenset(name for name, is_on in zip(devices, on, strict=True) if is_on)


PLAN = {
    "run": {
        "name": "small",
        "rounds": 8,
        "model": {"name": "linear"},
        "policy": {"devices_per_round": 5},
        "training": {"max_steps": 1},
    },
    "fleet": {"devices": 5, "samples": 20},
}


def scenario(**tables):
    fleet = {**PLAN["fleet"], **tables.pop("fleet", {})}
    return msgspec.convert({**PLAN, "fleet": fleet, **tables}, Scenario)


def test_devices_are_on_as_often_as_they_should_be():
    """With q = 0.3 each is on in three rounds of ten, independently of the others."""
    plan = AvailabilityPlan(kind="bernoulli", q=0.3)

    on = np.array(
        [
            [name in there for name in FLEET]
            for there in (available(plan, FLEET, 1, n) for n in range(1, 2001))
        ]
    )

    assert abs(on.mean() - 0.3) < 4 * (0.21 / on.size) ** 0.5 + 0.3 * 0.7**20
    assert abs(on.mean(0) - 0.3).max() < 5 * (0.21 / 2000) ** 0.5
    pairs = np.corrcoef(on.T) - np.eye(20)
    assert abs(pairs).max() < 5 / 2000**0.5


def test_devices_stay_on_or_off_for_a_block_of_rounds():
    """Redrawn every three rounds: rounds 1 to 3 are alike, and round 4 is drawn anew."""
    plan = AvailabilityPlan(kind="bernoulli", q=0.5, every_rounds=3)

    there = [available(plan, FLEET, 2, number) for number in range(1, 13)]

    assert [there[n] for n in (0, 3, 6, 9)] == [there[n] for n in (2, 5, 8, 11)]
    assert len(set(there)) == 4
    assert there == [available(plan, FLEET, 2, number) for number in range(1, 13)]
    assert there != [available(plan, FLEET, 3, number) for number in range(1, 13)]


def test_somebody_is_always_on():
    """However seldom devices are on, a round has one; and each has its own probability."""
    rare = AvailabilityPlan(kind="bernoulli", q=0.01)
    unequal = AvailabilityPlan(kind="bernoulli", q=(0.0, 1.0, 0.5))

    assert all(available(rare, FLEET[:2], 0, number) for number in range(1, 100))
    for number in range(1, 50):
        there = available(unequal, FLEET[:4], 0, number)
        assert "d01" in there
        assert not there & {"d00", "d03"}


def test_who_is_away_is_not_asked_and_the_reason_is_told():
    """The selector chooses among those that are on, and excludes the rest by name."""
    plan = AvailabilityPlan(kind="bernoulli", q=0.5)
    select = select_available(select_uniformly, presence_of(plan, len(FLEET), 7), FLEET)
    candidates = Candidates(FLEET, lambda _: Capability(agent="test"))

    chosen = select(candidates, 4, 1, np.random.default_rng(0))

    there = available(plan, FLEET, 7, 1)
    assert set(chosen.chosen) <= there
    assert len(chosen.chosen) == 4
    away = {n for n, why in chosen.excluded.items() if why == "not available in this round"}
    assert away == set(FLEET) - there
    others = len(there) - 4
    assert chosen.reasons(len(FLEET)) == {
        "not available in this round": len(away),
        f"not drawn: the round asks 4 of the {len(there)} that are there": others,
    }


def test_a_run_asks_just_the_devices_that_are_on(tmp_path):
    """In a simulated run each round's devices are those drawn for it, and the rest are listed."""
    plan = AvailabilityPlan(kind="bernoulli", q=0.4, every_rounds=2)
    result = simulate(scenario(availability=plan, seed=5), tmp_path, cache=Path())

    for row in result.rounds:
        there = available(plan, FLEET[:5], 5, row.round)
        assert set(row.devices) == there
        away = {"not available in this round": 5 - len(there)} if len(there) < 5 else {}
        assert row.not_asked == away
    assert len({row.devices for row in result.rounds}) > 1


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"kind": "bernoulli", "q": 0.0}, "availability.q is 0.0"),
        ({"kind": "bernoulli", "q": [0.5, 1.5]}, "availability.q"),
        ({"kind": "bernoulli", "q": [0, 0, 0, 0, 0, 1]}, "for some device"),
        ({"every_rounds": 0}, "availability.every_rounds is 0"),
    ],
)
def test_an_availability_that_cannot_be_is_refused(table, said):
    """Probabilities out of range, or a fleet of which nobody would ever be on."""
    with pytest.raises((ConfigError, msgspec.ValidationError), match=said):
        scenario(availability=table)


def test_levels_repeat_over_devices_or_are_drawn(tmp_path):
    """Each simulated device says its level; shares are kept over many devices."""
    repeated = scenario(fleet={"levels": [1, 2, 4]})
    drawn = scenario(fleet={"level_shares": [0.1, 0.6, 0.3], "devices": 1000, "samples": 0})

    def levels(given):
        data = fleet_data(given, cache=tmp_path)
        return [population_of(given, data).level(place) for place in range(given.fleet.devices)]

    assert levels(repeated) == [1, 2, 4, 1, 2]
    counts = np.bincount(levels(drawn), minlength=4)
    assert abs(counts[1:] / 1000 - [0.1, 0.6, 0.3]).max() < 0.06
    assert levels(drawn) == levels(drawn)
    with pytest.raises((ConfigError, msgspec.ValidationError), match="sum to 1"):
        scenario(fleet={"level_shares": [0.5, 0.6]})


def test_the_partition_is_written_down(tmp_path):
    """partition.json holds the seed, each device's level and its samples of each class."""
    given = scenario(fleet={"levels": [1, 2], "partition": "groups", "groups": 2, "seed": 9})

    simulate(given, tmp_path, cache=Path())

    held = json.loads((tmp_path / "partition.json").read_text(encoding="utf-8"))
    data = fleet_data(given, cache=Path())
    assert (held["seed"], held["partition"], held["classes"]) == (9, "groups", 10)
    assert held["levels"] == {"d00": 1, "d01": 2, "d02": 1, "d03": 2, "d04": 1}
    for name, own in data.devices.items():
        assert held["devices"][name] == np.bincount(own.y, minlength=10).tolist()
    assert sum(held["held_out"]) == data.held_out.samples
