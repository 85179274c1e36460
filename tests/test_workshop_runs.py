import os
from collections import Counter
from pathlib import Path
from signal import SIGKILL

import pytest
from msgspec.structs import replace

from simulations.fleet import fleet_data
from simulations.report import as_builtins
from simulations.scenario import find_scenario, read_scenario
from simulations.simulation import simulate
from simulations.workshop import InProcess, Processes, Remembered
from tests.workshops import forked, noted


@pytest.fixture(params=["smoke", "flaky_fleet"])
def scenario(request):
    whole = read_scenario(find_scenario(request.param))
    return replace(whole, run=replace(whole.run, rounds=4))


@pytest.fixture
def data(scenario):
    return fleet_data(scenario, cache=Path())


def run(scenario, data, out, workshop, on_round=None):
    with workshop:
        return as_builtins(
            simulate(scenario, out, cache=Path(), data=data, workshop=workshop, on_round=on_round)
        )


def test_a_scenario_has_the_same_bits_in_one_process_and_in_two(scenario, data, tmp_path):
    """Whatever fails in it, a simulated run ends in one result, wherever its devices train."""
    here = run(scenario, data, tmp_path / "1", InProcess(data.devices))
    there = run(scenario, data, tmp_path / "2", Processes(data.devices, workers=2))

    assert here["status"] == "finished"
    assert there == here
    assert (tmp_path / "1" / "events.jsonl").read_bytes() == (
        tmp_path / "2" / "events.jsonl"
    ).read_bytes()


def test_a_killed_simulation_goes_on_where_it_was(scenario, data, tmp_path):
    """Killed after its second round and begun again, a run ends as if nothing had happened."""
    workshop = InProcess(data.devices, train=noted(tmp_path))
    undisturbed = run(scenario, data, tmp_path / "undisturbed", workshop)
    needed = Counter((tmp_path / "trained").read_text().split())
    (tmp_path / "trained").unlink()

    def remembered():
        inner = InProcess(data.devices, train=noted(tmp_path))
        return Remembered(inner, tmp_path / "out", owner="this run")

    def run_and_die():
        run(scenario, data, tmp_path / "out", remembered(), on_round=die_after_two)

    assert os.waitstatus_to_exitcode(os.waitpid(forked(run_and_die), 0)[1]) == -SIGKILL
    known = Counter((tmp_path / "trained").read_text().split())
    again = remembered()

    assert run(scenario, data, tmp_path / "out", again) == undisturbed
    assert again.resumed >= known.total() > 0
    assert Counter((tmp_path / "trained").read_text().split()) == needed


def die_after_two(row):
    if row.round == 2:
        os.kill(os.getpid(), SIGKILL)
