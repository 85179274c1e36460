"""Benchmarks measure real processes and say what they found in one shape."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.claims import Claim, Options, claim, main
from benchmarks.fleet import echo_plan, running_fleet, seconds_per_round
from benchmarks.plain_publish import generous_broker, publish_plainly
from benchmarks.processes import cpu_s, memory
from simulations.link import LinkProxy

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


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["round_latency", "transfer", "footprint"])
def test_quick_benchmarks_give_the_promised_shape(name: str) -> None:
    """Each benchmark with --quick --json ends by itself and prints one complete object."""
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--json"]

    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=True)

    check_shape(json.loads(done.stdout), name)
