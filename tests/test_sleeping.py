"""Devices with nothing to do sleep, and nobody can tell but by the cost."""

import csv
import gc
import json
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import pytest

from cloud.coordination.facts import RoundClosed, RoundOpened
from cloud.initial import initial_model
from edge_agent.trainer import fulfil
from federation.errors import ConfigError
from federation.learning.data import LocalData
from simulations.conditions import Conditions
from simulations.device import Device
from simulations.fleet import FleetData, fleet_data
from simulations.holdings import Names
from simulations.populating import population_of
from simulations.presence.model import Always
from simulations.scenario import Scenario
from simulations.simulation import build_world, simulate
from simulations.traps import Trap
from simulations.workshop import InProcess
from simulations.world import World

PLAN = {
    "run": {
        "name": "small",
        "rounds": 5,
        "model": {"name": "mlp", "sizes": {"hidden": 16}},
        "policy": {"devices_per_round": 4},
        "training": {"max_steps": 2, "batch_size": 8, "learning_rate": 0.1},
    },
    "fleet": {"devices": 12, "samples": 20},
}


def scenario(**tables):
    run = {**PLAN["run"], **tables.pop("run", {})}
    return msgspec.convert({**PLAN, "run": run, **tables}, Scenario)


def outcome(given, *, sleeps):
    """The final model, and who took part in which round."""
    data = fleet_data(given, cache=Path())
    population = population_of(given, data)
    rounds = []
    world = World(
        given.run,
        initial_model(given.run),
        population,
        workshop=InProcess(data.devices, train=fulfil),
        conditions=Conditions(shares_memory=given.shares_memory),
        observe=lambda fact: rounds.append(fact.devices) if isinstance(fact, RoundClosed) else None,
    )
    if not sleeps:
        world.clock.call_at(0.0, keep_awake, world)
    ended = world.run(1e6)
    assert ended is not None
    assert ended.status == "finished", ended.reason
    assert (world.devices.awake <= 4) == sleeps
    return world.model, rounds


def keep_awake(world):
    """Nobody sleeps who is to fail in a round that never comes."""
    for device in world.devices.values():
        device.traps.append(Trap("before-upload", 999, 1.0))


@pytest.mark.parametrize("method", ["fedavg", "scaffold", "rebafl"])
@pytest.mark.parametrize("chunks", [False, True])
def test_a_fleet_that_sleeps_gives_the_bits_of_one_that_is_awake(method, chunks):
    """Who takes part, what devices remember and the weights are the same, letters whole or cut."""
    model = {"name": "mlp", "sizes": {"hidden": 600}}  # Too large to ride along in a letter.
    run = {"method": {"name": method}, "model": model}

    asleep = outcome(scenario(run=run, link={"chunks": chunks}), sleeps=True)

    assert asleep == outcome(scenario(run=run, link={"chunks": True}), sleeps=False)
    assert len({device for devices in asleep[1] for device in devices}) > 4


def empty_fleet(devices):
    """So many devices that all hold the same few samples."""
    one = LocalData(np.zeros((4, 8), np.float32), np.zeros(4, np.int64))

    class Same(dict):
        def __missing__(self, _name):
            return one

        def __iter__(self):
            return iter(Names(devices))

        def __len__(self):
            return devices

    return FleetData(Same(), one)


def test_a_round_of_a_large_fleet_looks_at_those_it_asks_alone():
    """Of 50,000 registered devices no more than those of one round are ever awake."""
    linear = {"name": "linear", "sizes": {"inputs": 8, "classes": 2}}
    given = scenario(
        run={"model": linear, "policy": {"devices_per_round": 10}, "rounds": 4},
        fleet={"devices": 50_000, "partition": "drawn", "samples": 4},
    )
    data = empty_fleet(50_000)
    world = build_world(
        given, data, Always(50_000), workshop=InProcess(data.devices, in_place=True)
    )
    awake = []
    world.watch(
        lambda fact: awake.append(world.devices.awake) if isinstance(fact, RoundOpened) else None
    )

    ended = world.run()

    assert ended is not None
    assert ended.status == "finished"
    assert max(awake) <= 20
    assert world.devices.awake <= 10


def read_attempts(folder):
    with (folder / "attempts.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_time_energy_and_bytes_are_accounted_for_each_device_that_was_asked(tmp_path):
    """What the rows of the attempts add up to is what the rounds say, and none is free."""
    given = scenario(device={"classes": [{"like": "phone", "share": 1.0}]})

    result = simulate(given, tmp_path, cache=Path())

    rows = read_attempts(tmp_path)
    assert len(rows) == 20
    for row in result.rounds:
        mine = [each for each in rows if int(each["round"]) == row.round]
        assert row.energy_j == pytest.approx(sum(float(e["energy_j"]) for e in mine), abs=1e-2)
        assert row.train_s == pytest.approx(sum(float(e["train_s"]) for e in mine), abs=1e-2)
        assert all(float(e["energy_j"]) > 0.0 for e in mine)
        assert all(int(e["bytes_up"]) > row.bytes_up / 4 for e in mine)
    assert np.load(tmp_path / "fleet.npy").shape == (5, 12)
    counted = np.load(tmp_path / "fleet.npy") == 2
    assert counted.sum(1).tolist() == [len(row.devices) for row in result.rounds]


def test_a_device_whose_battery_is_empty_goes_off_and_comes_back(tmp_path):
    """A training that takes more than there is costs the update, until the sun has charged it."""
    tiny = {"share": 1.0, "step_s": 1.0, "step_j": 6.0, "battery_j": 10.0, "charge_w": 0.1}
    given = scenario(
        device={"classes": [tiny], "initial_charge": [1.0, 1.0]},
        run={"policy": {"devices_per_round": 4, "deadline_s": 60.0, "lost_grace_s": 5.0}},
    )

    result = simulate(given, tmp_path, cache=Path())

    statuses = {row["status"] for row in read_attempts(tmp_path)}
    assert "lost" in statuses
    assert any(row.status == "abandoned" for row in result.rounds) or result.updates < 20


def test_devices_that_leave_in_the_middle_of_a_round_are_lost_to_it(tmp_path):
    """With outages of blocks of time, some of those asked go off before they are done."""
    given = scenario(
        run={"rounds": 12, "policy": {"devices_per_round": 6, "deadline_s": 40.0}},
        device={"seconds_per_step": 5.0},
        availability={"kind": "blocks", "q": 0.6, "block_s": 12.0},
    )

    simulate(given, tmp_path, cache=Path())

    picture = np.load(tmp_path / "fleet.npy")
    assert (picture == 3).any()
    assert (picture == 2).any()
    assert (picture == 0).any()


def test_clocks_that_are_wrong_change_no_bit(tmp_path):
    """Devices whose clocks are hours off and drift take part like any others."""
    right = simulate(scenario(), tmp_path / "right", cache=Path())
    wrong = simulate(
        scenario(device={"clock_offset_s": 7200.0, "clock_drift_ppm": 500.0}),
        tmp_path / "wrong",
        cache=Path(),
    )

    assert wrong.model_sha256 == right.model_sha256
    assert [row.devices for row in wrong.rounds] == [row.devices for row in right.rounds]


def test_memory_does_not_grow_with_the_rounds():
    """Whatever devices come and go, no more of them are held after 300 rounds than after 100."""
    linear = {"name": "linear", "sizes": {"inputs": 8, "classes": 2}}
    given = scenario(
        run={"model": linear, "rounds": 301},
        fleet={"devices": 200, "partition": "drawn", "samples": 4},
        failures={"chance": 0.2},
    )
    data = empty_fleet(200)
    world = build_world(given, data, Always(200), workshop=InProcess(data.devices, in_place=True))
    kept = []

    def count(fact):
        if isinstance(fact, RoundClosed) and fact.round % 100 == 0:
            gc.collect()
            kept.append(sum(type(thing) is Device for thing in gc.get_objects()))

    world.watch(count)
    world.run()

    assert len(kept) == 3
    assert all(later <= sooner + 20 for sooner, later in pairwise(kept)), kept


@pytest.mark.parametrize("phase", ["round-open", "mid-gathering", "mid-aggregation"])
def test_a_hub_that_is_killed_finds_again_those_who_sleep(tmp_path, phase):
    """Whoever was asked by a hub that died takes part, asleep or not, as soon as it is back."""
    kill = {"kind": "hub-kill", "phase": phase, "round": 2, "away_s": 2.0}
    given = scenario(device={"seconds_per_step": 0.5}, faults=[kill])

    result = simulate(given, tmp_path, cache=Path())

    assert [len(row.devices) for row in result.rounds] == [4] * 5
    assert result.rounds[1].closed_s - result.rounds[1].opened_s < 15.0


def test_a_broker_that_restarts_while_devices_sleep_is_missed_by_none(tmp_path):
    """Devices that are looked at while the broker is away are linked when it is back."""
    faults = [
        {"kind": "broker-restart", "at_s": 3.0, "away_s": 5.0, "forgets": True},
        {"kind": "cut", "at_s": 4.0, "devices": ["d00", "d05"], "for_s": 1.0},
    ]
    given = scenario(run={"rounds": 12}, device={"seconds_per_step": 0.5}, faults=faults)

    result = simulate(given, tmp_path, cache=Path())

    assert result.status == "finished"
    assert all(row.closed_s - row.opened_s < 5.0 for row in result.rounds[6:])
    assert [len(row.devices) for row in result.rounds[6:]] == [4] * 6


def test_kills_at_a_phase_strike_in_their_round_and_in_no_other(tmp_path):
    """A device is killed in the round that is named, though random failures strike others."""
    faults = [{"kind": "kill", "device": "d03", "phase": "mid-training", "round": 4, "away_s": 9.0}]
    given = scenario(
        run={"policy": {"devices_per_round": 12}},
        device={"seconds_per_step": 0.5},
        faults=faults,
        failures={"chance": 0.05},
    )

    simulate(given, tmp_path, cache=Path())

    said = (tmp_path / "events.jsonl").read_text(encoding="utf-8").splitlines()
    mine = [event for event in map(json.loads, said) if event["device"] == "d03"]
    struck = {event["round"] for event in mine if event["detail"].get("status") == "lost"}
    assert 4 in struck


def test_a_device_that_the_fleet_lacks_cannot_join_it(tmp_path):
    """A fault that names nobody is refused before anything begins."""
    given = scenario(faults=[{"kind": "late-join", "device": "nope", "at_s": 1.0}])

    with pytest.raises(ConfigError, match="'nope'"):
        simulate(given, tmp_path, cache=Path())
