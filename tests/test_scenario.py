"""A scenario is read strictly, deals data out as it says, and leaves its result in files."""

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest

from cloud.initial import initial_model
from federation.errors import ConfigError
from federation.protocol import codec
from simulations.fleet import device_names, fleet_data
from simulations.report import drop_reasons
from simulations.scenario import (
    BrokerRestart,
    Cut,
    Kill,
    LateJoin,
    Scenario,
    find_scenario,
    read_scenario,
    shipped_scenarios,
)
from simulations.simulation import simulate
from simulations.tables import FailurePlan

SMALL = """
seed = 3
[run]
name = "small"
rounds = 2
[run.model]
name = "linear"
[run.policy]
devices_per_round = 3
[run.training]
max_steps = 2
[fleet]
devices = 4
"""


def written(tmp_path, text=SMALL):
    path = tmp_path / "scenario.toml"
    path.write_text(text, encoding="utf-8")
    return path


def small(tmp_path, **changes):
    scenario = read_scenario(written(tmp_path))
    fleet = {k: changes.pop(k) for k in list(changes) if k in scenario.fleet.__struct_fields__}
    scenario = msgspec.structs.replace(scenario, **changes)
    return msgspec.structs.replace(scenario, fleet=msgspec.structs.replace(scenario.fleet, **fleet))


@pytest.mark.parametrize(
    ("added", "said"),
    [
        ("dropuot = 1", "dropuot"),
        ("partition = 'sorted'", "fleet.partition is 'sorted'"),
        ("hold_out = 2.0", "fleet.hold_out is 2.0"),
        ("[failures]\nchance = 1.5", "failures.chance is 1.5"),
        ("[link]\ndelay_s = [2.0, 1.0]", "link.delay_s is [2.0, 1.0]"),
        ("[link]\ndelay_s = 1.0", "link.delay_s is a number"),
        ("[[faults]]\nkind = 'meteor'", "meteor"),
        ("[[faults]]\nkind = 'kill'\ndevice = 'd00'", "either at_s or phase"),
        ("[[faults]]\nkind = 'kill'\ndevice = 'd00'\nphase = 'lunch'", "lunch"),
        ("[[faults]]\nkind = 'cut'\ndevice = 'd00'\nat_s = 1.0\nfor_s = 1.0", "device"),
        ("[device]\nkeepalive_s = 0.0", "device.keepalive_s is 0.0"),
    ],
)
def test_a_mistake_in_a_scenario_is_named(tmp_path, added, said):
    """Unknown keys, wrong types and values out of range are refused, with the key's name."""
    path = written(tmp_path, SMALL + added)

    with pytest.raises(ConfigError) as caught:
        read_scenario(path)

    assert said in str(caught.value)


def test_a_fault_for_a_device_that_is_not_there_is_refused(tmp_path):
    """The message names the device and those there are."""
    scenario = small(tmp_path, faults=(Kill(device="d77", at_s=1.0),))

    with pytest.raises(ConfigError, match="'d77'; the fleet has d00 to d03"):
        simulate(scenario, tmp_path / "out", cache=tmp_path)


def test_shipped_scenarios_can_be_read_and_found_by_name():
    """Each is valid and begins with a line that says what it is."""
    shipped = shipped_scenarios()

    assert {"smoke", "flaky_fleet", "skewed_labels", "layerwise", "heterogeneous", "robust"} <= set(
        shipped
    )
    for name, path in shipped.items():
        assert isinstance(read_scenario(find_scenario(name)), Scenario)
        assert path.read_text(encoding="utf-8").startswith("# ")
    with pytest.raises(ConfigError, match="smoke"):
        find_scenario("smokes")


def test_relative_paths_are_relative_to_the_scenario(tmp_path):
    """Data beside the scenario file is found from anywhere."""
    folder = tmp_path / "data"
    folder.mkdir()
    rng = np.random.default_rng(0)
    np.savez(folder / "all.npz", x=rng.normal(size=(60, 64)), y=rng.integers(0, 10, 60))
    text = SMALL.replace('name = "small"', 'name = "small"\nevaluation = "data"')
    scenario = read_scenario(written(tmp_path, text + 'folder = "data"'))

    data = fleet_data(scenario, cache=tmp_path)

    assert scenario.fleet.folder == folder.resolve()
    assert data.held_out.samples == 60
    assert sum(held.samples for held in data.devices.values()) == 48


@pytest.mark.parametrize("partition", ["iid", "shards", "dirichlet"])
def test_partitions_deal_every_sample_once_and_hold_the_rest_out(tmp_path, partition):
    """No sample is with two devices, none of the held-out ones with any, none is missing."""
    scenario = small(tmp_path, partition=partition, devices=7)

    data = fleet_data(scenario, cache=tmp_path)
    again = fleet_data(scenario, cache=tmp_path)

    parts = [*data.devices.values(), data.held_out]
    rows = np.concatenate([np.c_[part.x.reshape(part.samples, -1), part.y] for part in parts])
    assert len(rows) == 1797
    assert data.held_out.samples == round(0.2 * 1797)
    assert sorted(data.devices) == device_names(7)
    assert len(np.unique(rows, axis=0)) == len(np.unique(every_digit(tmp_path), axis=0))
    for name, held in data.devices.items():
        assert np.array_equal(held.x, again.devices[name].x)


def every_digit(cache):
    from federation.datasets.cached import load

    digits = load("digits", cache=cache)
    return np.c_[digits.x.reshape(1797, -1), digits.y]


def test_a_cap_on_samples_is_kept(tmp_path):
    """`samples` bounds what each device holds."""
    data = fleet_data(small(tmp_path, samples=20), cache=tmp_path)

    assert {held.samples for held in data.devices.values()} == {20}


def test_natural_clients_are_asked_of_a_set_that_has_some(tmp_path):
    """Digits do not say whose they are: partition `natural` is refused with a remedy."""
    with pytest.raises(ConfigError, match="use iid, shards or dirichlet"):
        fleet_data(small(tmp_path, partition="natural"), cache=tmp_path)


def test_a_late_joiner_is_asked_only_after_it_came(tmp_path):
    """A device that joins late is not in the rounds before."""
    faults = (LateJoin(device="d03", at_s=50.0),)
    policy = msgspec.structs.replace(small(tmp_path).run.policy, devices_per_round=4, gather_s=5.0)
    run = msgspec.structs.replace(small(tmp_path).run, policy=policy, rounds=30)
    device = msgspec.structs.replace(small(tmp_path).device, seconds_per_step=1.0)
    scenario = small(tmp_path, faults=faults, run=run, device=device)

    result = simulate(scenario, tmp_path / "out", cache=tmp_path)

    early = {name for row in result.rounds if row.opened_s < 50.0 for name in row.devices}
    late = {name for row in result.rounds if row.opened_s > 51.0 for name in row.devices}
    assert early == {"d00", "d01", "d02"}
    assert late == {"d00", "d01", "d02", "d03"}


def test_dropouts_happen_as_often_as_asked_for_and_are_accounted_for(tmp_path):
    """Each device that was asked either counts or is listed with what became of it."""
    run = small(tmp_path).run
    policy = msgspec.structs.replace(
        run.policy, devices_per_round=4, gather_s=60.0, lost_grace_s=0.0, deadline_s=60.0
    )
    run = msgspec.structs.replace(run, rounds=40, policy=policy)
    phases = dict.fromkeys(("before-download", "mid-training", "before-upload"), 1.0)
    failures = FailurePlan(chance=0.3, phases=phases, away_s=(5.0, 6.0))

    result = simulate(small(tmp_path, run=run, failures=failures), tmp_path / "out", cache=tmp_path)

    asked = sum(row.asked for row in result.rounds)
    dropped = sum(len(row.dropped) for row in result.rounds)
    assert all(row.asked == len(row.devices) + len(row.dropped) for row in result.rounds)
    assert abs(dropped - 0.3 * asked) < 4 * (asked * 0.21) ** 0.5
    assert drop_reasons(list(result.rounds)) == result.drop_reasons
    assert set(result.drop_reasons) == {"lost: its link was lost"}


def test_the_files_hold_what_happened_and_are_the_same_again(tmp_path):
    """result.json, curves, events and the model: same scenario and seed, same bytes."""
    faults = (
        Cut(devices=("d00", "hub"), at_s=0.2, for_s=3.0),
        BrokerRestart(at_s=5.0, forgets=True),
    )
    scenario = small(tmp_path, faults=faults)
    for name in ("one", "two"):
        simulate(scenario, tmp_path / name, cache=tmp_path)
    one, two = tmp_path / "one", tmp_path / "two"

    result = json.loads((one / "result.json").read_text(encoding="utf-8"))
    events = [json.loads(line) for line in (one / "events.jsonl").read_bytes().splitlines()]

    for name in ("result.json", "events.jsonl", "model.safetensors"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    assert result["status"] == "finished"
    assert [row["round"] for row in result["rounds"]] == [1, 2]
    assert 0.0 <= result["accuracy"] <= 1.0
    assert result["versions"]["torch"]
    assert [e["kind"] for e in events].count("round-closed") == 2
    assert (one / "curves.png").read_bytes().startswith(b"\x89PNG")
    model = (one / "model.safetensors").read_bytes()
    assert codec.digest_of(model) == result["model_sha256"]
    assert codec.decode(model).keys() == codec.decode(initial_model(scenario.run)).keys()


def test_a_scenario_that_kills_the_hub_keeps_its_record_beside_the_result(tmp_path):
    """The real store on SQLite is in the folder, begun anew when the scenario is run again."""
    text = SMALL + "[[faults]]\nkind = 'hub-kill'\nphase = 'mid-aggregation'\nround = 1\n"
    scenario = read_scenario(written(tmp_path, text))

    killed = [simulate(scenario, tmp_path / "out", cache=tmp_path) for _ in range(2)]
    calm = simulate(small(tmp_path), tmp_path / "calm", cache=tmp_path)

    assert (tmp_path / "out" / "hub" / "hub.db").is_file()
    assert [result.status for result in killed] == ["finished"] * 2
    assert killed[0] == killed[1]
    assert killed[0].rounds[0].devices == calm.rounds[0].devices


def test_the_command_prints_one_object_and_leaves_files(tmp_path, headwater_sim):
    """`run --json` prints the result and nothing else, and exits with 0."""
    out = tmp_path / "out"

    code, printed, errors = headwater_sim("run", written(tmp_path), "--out", out, "--json")

    assert (code, errors) == (0, "")
    assert json.loads(printed) == json.loads((out / "result.json").read_text(encoding="utf-8"))
    assert (out / "curves.png").is_file()


@pytest.mark.parametrize("arguments", [["nosuch"], ["{bad}"], ["{good}", "--out", "{file}"]])
def test_the_command_says_what_is_wrong_in_one_line(tmp_path, headwater_sim, arguments):
    """A user's mistake is one line on standard error and exit code 2, never a traceback."""
    names = {name: tmp_path / name for name in ("bad", "good", "file")}
    for name, text in (("bad", "[run]\nname = 1"), ("good", SMALL), ("file", "in the way")):
        names[name].write_text(text, encoding="utf-8")
    given = [argument.format(**names) for argument in arguments]
    if "--out" not in given:
        given += ["--out", str(tmp_path / "out")]

    code, printed, errors = headwater_sim("run", *given)

    assert code == 2
    assert errors.count("\n") == 1
    assert errors.startswith("error: ")
    assert printed == ""


def test_the_command_exits_with_1_when_the_run_fails(tmp_path, headwater_sim):
    """A run without a quorum is not a success, and the summary says why."""
    text = SMALL.replace(
        "devices_per_round = 3", "devices_per_round = 9\nquorum = 9\nmax_abandoned = 1"
    )

    code, printed, _ = headwater_sim("run", written(tmp_path, text), "--out", tmp_path / "out")

    assert code == 1
    assert "failed" in printed
    assert "quorum is 9" in printed


def test_the_command_lists_the_shipped_scenarios(headwater_sim):
    """`scenarios` names each with what it is about."""
    code, printed, _ = headwater_sim("scenarios", "--json")

    assert code == 0
    assert json.loads(printed)["smoke"].startswith("Eight devices")


@pytest.mark.slow
def test_the_flaky_fleet_learns_through_all_of_it(tmp_path):
    """Kills, cuts, lost acknowledgements, a forgetful broker, two hub restarts: it learns."""
    scenario = read_scenario(find_scenario("flaky_fleet"))

    result = simulate(scenario, tmp_path, cache=Path())

    assert result.status == "finished"
    assert result.accuracy is not None
    assert result.accuracy > 0.85
    assert sum(row.interruptions for row in result.rounds) > 10
