"""Benchmarks measure real processes and say what they found in one shape."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.claims import Claim, Options, claim, main
from benchmarks.fleet import echo_plan, running_fleet, seconds_per_round
from benchmarks.plain_publish import generous_broker, publish_plainly
from benchmarks.processes import cpu_s, memory
from benchmarks.uplink import STUDIES, Step, compare_bytes, first_at
from benchmarks.uplink import measure as measure_uplink
from federation.datasets.cached import cache_folder, load
from federation.errors import DataError
from simulations.link import LinkProxy
from simulations.scenario import find_scenario, read_scenario

FIELDS = {"name", "value", "unit", "peer", "peer_value", "ratio", "goal", "holds"}


def check_shape(result: dict[str, Any], name: str) -> None:
    assert set(result) == {"benchmark", "machine", "claims"}
    assert result["benchmark"] == name
    assert {"cpu", "cores", "memory_gb", "python", "load_before"} <= set(result["machine"])
    assert result["claims"]
    for each in result["claims"]:
        assert set(each) == FIELDS
        assert each["value"] >= 0
        if each["goal"] is not None:
            assert each["holds"] == (each["value"] <= each["goal"])


def measure_tiny_fleet(options: Options) -> list[Claim]:
    """Rounds of one real agent."""
    with running_fleet(options.folder / "one", devices=1, broker=options.broker) as fleet:
        rows = fleet.run(
            echo_plan("tiny", model_bytes=100_000, devices=1, rounds=4), patience_s=60.0
        )
        seconds = seconds_per_round(rows)
        assert len(seconds) == 3
        assert rows[-1].bytes_up is not None
        assert rows[-1].bytes_up >= 4 * 100_000
        return [
            claim("round", max(seconds), "s", goal=30.0),
            claim("CPU", cpu_s(fleet.pids), "CPU s"),
            claim("memory", memory(fleet.pids).rss_mb, "MiB", peer="itself", peer_value=1.0),
        ]


@pytest.mark.broker
def test_json_is_one_object_of_the_promised_shape(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --json a benchmark of a real fleet prints one object, whose claims are complete."""
    monkeypatch.setattr(sys, "argv", ["tiny", "--json"])

    main("tiny", measure_tiny_fleet)

    result = json.loads(capsys.readouterr().out)
    check_shape(result, "tiny")
    assert [each["holds"] for each in result["claims"]] == [True, None, None]
    assert result["claims"][1]["value"] > 0.1
    assert result["claims"][2]["ratio"] == result["claims"][2]["value"]


def test_a_claim_beyond_its_goal_does_not_hold() -> None:
    """A value above its goal does not hold, and the ratio is the value over the peer's."""
    found = claim("round", 0.3, "s", peer="other", peer_value=0.1, goal=0.25)

    assert found.holds is False
    assert found.ratio == pytest.approx(3.0)


@pytest.mark.broker
def test_plain_publish_has_a_fair_chance(broker_kind: Any, tmp_path: Path) -> None:
    """The peer of the transfer arrives over a good link, whole megabytes at once."""
    with (
        generous_broker(broker_kind, tmp_path / "plain") as port,
        LinkProxy(port) as link,
    ):
        seconds = publish_plainly(
            bytes(2_000_000), near_port=link.port, broker_port=port, keepalive_s=30, patience_s=20.0
        )

        assert seconds is not None
        assert link.up_bytes > 2_000_000


DIGITS = """
[run]
name = "digits"
rounds = 6
[run.model]
name = "linear"
[run.policy]
devices_per_round = 3
[run.training]
learning_rate = 0.1
momentum = 0.9
[fleet]
devices = 3
samples = 100
[[variants]]
name = "fedavg"
[[variants]]
name = "top-int8"
uplink = { encoding = "int8", delta = true, top_k = 0.2, residual = true }
[[variants]]
name = "hardly-learns"
training = { learning_rate = 0.000001 }
"""


def test_bytes_to_the_target_are_those_devices_sent(tmp_path: Path) -> None:
    """The peer's bytes are its rounds' whole models; who misses the target gets no ratio."""
    file = tmp_path / "digits.toml"
    file.write_text(DIGITS, encoding="utf-8")
    options = Options(True, "auto", tmp_path, lambda _: None)

    claims = compare_bytes(options, "digits", read_scenario(file))

    found = {each.name.removeprefix("digits, "): each for each in claims}
    sent = found["top-int8: bytes up to the target"]
    took = found["top-int8: rounds to the target"]
    assert sent.peer_value is not None
    assert took.peer_value is not None
    models_mb = took.peer_value * 3 * 4 * 650 / 1e6
    assert models_mb < sent.peer_value < 2 * models_mb
    assert sent.value / took.value < 0.7 * sent.peer_value / took.peer_value
    best = found["the best (top-int8): share of FedAvg's bytes"]
    assert best.value == pytest.approx(sent.ratio, rel=1e-3)
    assert best.goal == 0.1
    idle = found["hardly-learns: bytes up to the target"]
    assert idle.ratio is None
    assert "1 of 1 missed the target" in idle.peer
    assert found["hardly-learns: rounds to the target"].value == 3 * 6


def test_a_target_needs_three_rounds() -> None:
    """One lucky round reaches nothing: the mean of three in a row does."""
    accuracies = [0.1, 0.9, 0.2, 0.5, 0.8, 0.8]
    steps = [Step(place, value, place * 10) for place, value in enumerate(accuracies, start=1)]

    assert first_at(steps, 0.7) == steps[5]
    assert first_at(steps, 0.5) == steps[3]
    assert first_at(steps, 0.71) is None


def test_a_benchmark_says_how_to_fetch_its_data(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Without the data sets the uplink benchmark ends with code 2 and names the command."""
    monkeypatch.setenv("HEADWATER_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["uplink", "--quick"])

    with pytest.raises(SystemExit) as ended:
        main("uplink", measure_uplink)

    assert ended.value.code == 2
    assert "headwater-sim data fetch watch" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_quick_uplink_benchmark_gives_the_promised_shape() -> None:
    """It ends by itself, prints one complete object, and a tenth of the bytes is enough."""
    try:
        for shipped in STUDIES.values():
            data = read_scenario(find_scenario(shipped)).fleet.data
            load(data, cache=cache_folder(os.environ))
    except DataError as cause:
        pytest.skip(str(cause))
    command = [sys.executable, "-m", "benchmarks.uplink", "--quick", "--json"]

    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=True)

    result = json.loads(done.stdout)
    check_shape(result, "uplink")
    assert [each["holds"] for each in result["claims"] if each["goal"]] == [True, True]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["round_latency", "transfer", "footprint"])
def test_quick_benchmarks_give_the_promised_shape(name: str) -> None:
    """Each benchmark with --quick --json ends by itself and prints one complete object."""
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--json"]

    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=True)

    check_shape(json.loads(done.stdout), name)
