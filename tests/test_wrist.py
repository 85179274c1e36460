"""The demo's fleet is ten devices of seven people, and three people nobody sees."""

import os

import numpy as np
import pytest

from federation.datasets.cached import DataSet, cache_folder, fetch, load
from federation.datasets.fetching import UnreachableError
from federation.errors import DataError
from simulations.demo.wrist import HELD_OUT, WristFleet, scale_motion, wrist_fleet


@pytest.fixture(scope="module")
def watch() -> DataSet:
    cache = cache_folder(os.environ)
    try:
        fetch("watch", cache=cache, on_progress=lambda _stage, _done, _total: None)
    except UnreachableError as cause:
        pytest.skip(str(cause))
    return load("watch", cache=cache)


@pytest.fixture(scope="module")
def fleet(watch: DataSet) -> WristFleet:
    return wrist_fleet(watch)


def _rows(x: np.ndarray) -> set[bytes]:
    return {window.tobytes() for window in x}


def test_ten_devices_hold_seven_people(fleet: WristFleet) -> None:
    """Three people wear two devices, four wear one, and three are held out."""
    worn = sorted(list(fleet.person_of.values()).count(p) for p in set(fleet.person_of.values()))

    assert worn == [1, 1, 1, 1, 2, 2, 2]
    assert list(fleet.devices) == [f"wrist-{number:02d}" for number in range(1, 11)]
    assert fleet.person_of.keys() == fleet.devices.keys()
    assert not set(fleet.person_of.values()) & set(HELD_OUT)


def test_a_device_holds_one_person_only(watch: DataSet, fleet: WristFleet) -> None:
    """Each window of a device is its wearer's, and every window of the set is in one place."""
    assert watch.client is not None
    scaled = scale_motion(watch.x)
    seen = 0
    for device, data in fleet.devices.items():
        person = watch.client_names.index(fleet.person_of[device])
        assert _rows(data.x) <= _rows(scaled[watch.client == person])
        assert set(np.unique(data.y)) == set(range(7))
        seen += data.samples
    unseen = np.isin(watch.client, [watch.client_names.index(person) for person in HELD_OUT])

    assert seen + fleet.held_out.samples == len(watch.x)
    assert _rows(fleet.held_out.x) == _rows(scaled[unseen])
    assert not any(_rows(data.x) & _rows(fleet.held_out.x) for data in fleet.devices.values())


def test_two_devices_of_a_person_are_on_two_arms(watch: DataSet, fleet: WristFleet) -> None:
    """Where a person wears two devices, one has the left arm's windows and one the right's."""
    assert watch.client is not None
    assert watch.part is not None
    scaled = scale_motion(watch.x)
    for arm, device in enumerate(["wrist-01", "wrist-02"]):
        mine = (watch.client == 0) & (watch.part == arm)
        assert np.array_equal(fleet.devices[device].x, scaled[mine])


def test_the_fleet_is_the_same_each_time(watch: DataSet, fleet: WristFleet) -> None:
    """Building the fleet twice gives the same samples in the same order."""
    again = wrist_fleet(watch)

    for device, data in fleet.devices.items():
        assert np.array_equal(again.devices[device].x, data.x)
        assert np.array_equal(again.devices[device].y, data.y)


def test_scaling_uses_nothing_of_other_people(watch: DataSet) -> None:
    """A window is scaled the same whether or not the others are there."""
    assert np.array_equal(scale_motion(watch.x)[:5], scale_motion(watch.x[:5]))


def test_another_choice_of_people_can_be_held_out(watch: DataSet) -> None:
    """Whoever is held out is on no device; a name that is nobody's is refused."""
    other = wrist_fleet(watch, ("person-01", "person-02", "person-03"))

    assert len(other.devices) == 10
    assert "person-01" not in other.person_of.values()
    with pytest.raises(DataError, match="nobody in watch is called 'person-11'"):
        wrist_fleet(watch, ("person-11",))


def test_a_set_without_people_is_refused() -> None:
    """Digits make no fleet of wrists, and the message says which set does."""
    with pytest.raises(DataError, match="use watch"):
        wrist_fleet(load("digits", cache=cache_folder(os.environ)))
