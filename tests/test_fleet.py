"""Devices hold what their partition says, made when asked for, and saved as who holds what."""

import os
import tracemalloc
from pathlib import Path

import msgspec
import numpy as np
import pytest

from federation.datasets.cached import cache_folder, fetch, load
from federation.datasets.fetching import UnreachableError
from federation.errors import ConfigError
from federation.learning.data import LocalData
from simulations.fleet import LISTED, device_names, fleet_data, manifest
from simulations.holdings import Names, deal, let_draw
from simulations.scenario import Scenario, find_scenario, read_scenario


def scenario(**fleet):
    plan = {
        "run": {
            "name": "small",
            "rounds": 1,
            "model": {"name": "linear"},
            "policy": {"devices_per_round": 1},
        },
        "fleet": {"devices": 5, **fleet},
    }
    return msgspec.convert(plan, Scenario)


def fetched(name):
    cache = cache_folder(os.environ)
    try:
        fetch(name, cache=cache, on_progress=lambda *_: None)
    except UnreachableError as cause:
        pytest.skip(str(cause))
    return load(name, cache=cache), cache


def rows(held):
    return {row.tobytes() for row in held.x}


def numbered(count):
    return LocalData(np.arange(count, dtype=np.float32)[:, None], np.arange(count) % 3)


@pytest.mark.parametrize(("name", "people", "unseen"), [("watch", 10, 2), ("hapt", 30, 6)])
def test_natural_devices_hold_one_person_each(name, people, unseen):
    """Everything of the people who are not held out, a person's on one device; nobody twice."""
    dataset, cache = fetched(name)
    given = scenario(devices=people - unseen, data=name, partition="natural", hold_out=0.2)

    data = fleet_data(given, cache=cache)

    whose = {row.tobytes(): person for row, person in zip(dataset.x, dataset.client, strict=True)}
    wearers = [{whose[row] for row in rows(held)} for held in data.devices.values()]
    assert all(len(persons) == 1 for persons in wearers)
    seen = set.union(*wearers)
    held_out = {whose[row] for row in rows(data.held_out)}
    assert (len(seen), len(held_out)) == (people - unseen, unseen)
    assert not seen & held_out
    parts = [*data.devices.values(), data.held_out]
    assert sum(part.samples for part in parts) == len(dataset.y)


def test_more_devices_than_people_share_a_person_and_no_sample():
    """Devices of one person hold different sessions of theirs, in the order of recording."""
    dataset, cache = fetched("watch")
    given = scenario(devices=20, data="watch", partition="natural", hold_out=0.2)

    data = fleet_data(given, cache=cache)

    whose = {row.tobytes(): person for row, person in zip(dataset.x, dataset.client, strict=True)}
    held = [rows(own) for own in data.devices.values()]
    assert all(len({whose[row] for row in own}) == 1 for own in held)
    assert sum(len(own) for own in held) == len(set.union(*held))
    with pytest.raises(ConfigError, match="take fewer devices"):
        fleet_data(scenario(devices=9000, data="watch", partition="natural"), cache=cache)


def test_wrist_devices_are_the_demos():
    """Ten devices on seven people, three held out; another number of devices is refused."""
    dataset, cache = fetched("watch")
    given = scenario(devices=10, data="watch", partition="wrist")

    data = fleet_data(given, cache=cache)

    assert list(data.devices) == [f"wrist-{number:02d}" for number in range(1, 11)]
    assert sum(own.samples for own in data.devices.values()) + data.held_out.samples == len(
        dataset.y
    )
    saved = manifest(given.fleet, data)
    assert sum(map(sum, saved["devices"].values())) + sum(saved["held_out"]) == len(dataset.y)
    with pytest.raises(ConfigError, match=r"fleet\.devices is 5; partition 'wrist' has 10"):
        fleet_data(scenario(data="watch", partition="wrist"), cache=cache)


def test_drawn_devices_hold_so_many_samples_that_none_holds_twice(tmp_path):
    """Each draws its own, by seed and place alone; every sample is with as many as any other."""
    given = scenario(devices=4000, partition="drawn", samples=30)

    data = fleet_data(given, cache=tmp_path)
    again = fleet_data(given, cache=tmp_path)

    assert len(data.devices) == 4000
    held = [rows(own) for own in data.devices.values()]
    assert {own.samples for own in data.devices.values()} == {30}
    assert min(map(len, held)) >= 29  # two of the digits are equal to the bit
    assert not set.union(*held) & rows(data.held_out)
    assert np.array_equal(data.devices["d1234"].x, again.devices["d1234"].x)
    assert held[0] != held[1]
    pool = let_draw(numbered(50), 20_000, 10, seed=1)
    counts = np.bincount(np.concatenate([pool[n].x[:, 0].astype(int) for n in pool.names]))
    assert counts == pytest.approx(4000, rel=0.12)
    with pytest.raises(ConfigError, match=r"fleet\.samples is 51; expected at most the 50"):
        let_draw(numbered(50), 3, 51, seed=1)
    with pytest.raises(ConfigError, match=r"fleet\.samples is 0; expected 1 or more"):
        scenario(partition="drawn")


def test_what_a_device_holds_is_a_view():
    """Nothing is copied or kept when a device's samples are asked for."""
    samples, parts = numbered(9), [np.array([8, 0]), np.array([], np.int64), np.array([3, 4, 5])]

    held = deal(samples, parts)

    assert [held[name].x[:, 0].tolist() for name in held] == [[8, 0], [], [3, 4, 5]]
    assert [held[name].y.tolist() for name in held] == [[2, 0], [], [0, 1, 2]]
    assert np.shares_memory(held["d00"].x, held["d00"].x)
    assert not np.shares_memory(held["d00"].x, samples.x)
    assert "d03" not in held
    with pytest.raises(KeyError):
        held["d03"]


def test_a_million_devices_are_registered_in_no_memory(tmp_path):
    """A mapping of a million takes what its samples take, and names are found by reading."""
    given = scenario(devices=1_000_000, partition="drawn", samples=32)
    load("digits", cache=tmp_path)
    tracemalloc.start()

    data = fleet_data(given, cache=tmp_path)
    saved = manifest(given.fleet, data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert len(data.devices) == 1_000_000
    assert data.devices["d999999"].samples == 32
    assert "d000123" in data.devices
    assert (saved["size"], len(saved["devices"])) == (1_000_000, LISTED)
    assert peak < 60e6


def test_names_are_a_sequence_that_is_not_written_down():
    """They are like the list of them; no other spelling is a name."""
    names = device_names(1000)
    written = [f"d{place:03d}" for place in range(1000)]

    assert isinstance(names, Names)
    assert names == written
    assert list(names) == written
    assert (names[7], names[-1], names[2:4]) == ("d007", "d999", ["d002", "d003"])
    assert [names.index(name) for name in written] == list(range(1000))
    for stranger in ("d7", "d0007", "d1000", "e007", "d00x", "d\u0660\u0660\u0667", "", 7):
        assert stranger not in names
    with pytest.raises(ValueError, match="d000 to d999"):
        names.index("d1000")
    with pytest.raises(IndexError):
        names[1000]
    assert device_names(3) == ["d00", "d01", "d02"]
    assert device_names(3) != device_names(4)


def test_a_manifest_says_who_holds_what(tmp_path):
    """Seed, data and partition, and for each device how many samples of each class."""
    given = scenario(partition="dirichlet", seed=4, levels=[1, 2])
    data = fleet_data(given, cache=tmp_path)

    saved = manifest(given.fleet, data)

    assert (saved["seed"], saved["data"], saved["partition"]) == (4, "digits", "dirichlet")
    assert (saved["classes"], saved["size"]) == (10, 5)
    assert saved["levels"] == {"d00": 1, "d01": 2, "d02": 1, "d03": 2, "d04": 1}
    for name, own in data.devices.items():
        assert saved["devices"][name] == np.bincount(own.y, minlength=10).tolist()
    assert saved["held_out"] == np.bincount(data.held_out.y, minlength=10).tolist()


def test_the_ready_scenario_of_thirty_people_has_a_device_each():
    """Twenty-four of the thirty wear one, six are held out, and nobody is on two devices."""
    given = read_scenario(find_scenario("hapt_30_people"))
    dataset, cache = fetched("hapt")

    data = fleet_data(given, cache=cache)

    whose = {row.tobytes(): person for row, person in zip(dataset.x, dataset.client, strict=True)}
    wearers = [whose[own.x[0].tobytes()] for own in data.devices.values()]
    assert len(set(wearers)) == given.fleet.devices == 24
    assert len({whose[row] for row in rows(data.held_out)}) == 6


def test_peers_are_no_scenario_of_a_hub():
    """A scenario of peers that is asked for as one of a hub is said to be one of peers."""
    assert Path(find_scenario("smoke")).is_file()
    with pytest.raises(ConfigError, match="headwater-sim peers peers --out DIR"):
        find_scenario("peers")
