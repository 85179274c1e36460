"""The benchmark of simulators compares like with like, and says what it found in one shape."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.claims import Options, main
from benchmarks.simulation_peers import bare, headwater
from benchmarks.simulation_peers.accelerator import compare_cohort
from benchmarks.simulation_peers.bound import bound_cpu_s
from benchmarks.simulation_peers.comparison import Case, compare
from benchmarks.simulation_peers.harness import bare_loop, perform
from benchmarks.simulation_peers.harness import headwater as headwater_driver
from benchmarks.simulation_peers.tasks import make_work
from federation.errors import HeadwaterError

FIELDS = {"name", "value", "unit", "peer", "peer_value", "ratio", "goal", "holds"}


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options(False, "auto", tmp_path, lambda _: None)


def test_json_has_each_claim_beside_its_peer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A case of real processes gives CPU, wall time, memory and errors of both drivers."""
    case = Case(
        task="mlp", clients=20, per_round=4, rounds=5, slow_rounds=5, times={"bare loop": 1e-3}
    )
    drivers = [headwater_driver(), bare_loop()]
    monkeypatch.setattr(sys, "argv", ["simulation", "--json"])

    main("simulation", lambda options: compare(options, drivers, [case], blocks=1))

    result = json.loads(capsys.readouterr().out)
    claims = {(each["name"], each["peer"]): each for each in result["claims"]}
    assert all(set(each) == FIELDS for each in claims.values())
    cpu = claims["mlp, 4 of 20: CPU a round", "bare loop"]
    assert cpu["holds"] == (cpu["value"] <= cpu["goal"])
    assert cpu["goal"] == pytest.approx(1000 * cpu["peer_value"], rel=1e-3)
    wall = claims["mlp, 4 of 20: wall time a round", "bare loop"]
    assert wall["value"] > 0
    assert wall["ratio"] == pytest.approx(wall["value"] / wall["peer_value"], rel=1e-3)
    memory = claims["mlp, 4 of 20: most memory of all processes", "bare loop"]
    assert 50 < memory["peer_value"] < 5_000
    errors = claims["mlp, 4 of 20: errors on held-out data after 5 rounds", "bare loop, 5 rounds"]
    assert 0 < errors["value"] < 95


def test_all_train_alike(options: Options) -> None:
    """On the same data with the same steps Headwater and the bare loop come equally far."""
    work = make_work(options.folder, "mlp", clients=100, per_round=10, rounds=50)

    theirs, ours = bare.run(work), headwater.run(work)

    assert theirs.updates == 10 * 50
    assert ours.updates >= work.least_updates
    assert len(ours.ends) == len(theirs.ends) == 50
    assert theirs.accuracy > 0.8
    assert ours.accuracy == pytest.approx(theirs.accuracy, abs=0.06)


def test_where_nobody_trains_the_model_stays(options: Options) -> None:
    """Without training the weights travel, and the model is as right as it was at first."""
    work = make_work(options.folder, "noop", clients=20, per_round=3, rounds=2)

    theirs, ours = bare.run(work), headwater.run(work)

    assert ours.updates == theirs.updates == 6
    assert ours.accuracy == theirs.accuracy


def test_a_driver_that_takes_too_long_is_ended(options: Options) -> None:
    """Beyond its patience the harness ends a driver and says who it was."""
    work = make_work(options.folder, "mlp", clients=20, per_round=4, rounds=100_000)

    with pytest.raises(HeadwaterError, match="bare loop failed at mlp"):
        perform(bare_loop(), work, options.folder, patience_s=0.5)


def test_a_bound_is_below_what_is_measured(options: Options) -> None:
    """The sums alone take less than the plain loop, and those of convolutions more."""
    work = make_work(options.folder, "mlp", clients=100, per_round=10, rounds=10)
    marks = bare.run(work)

    bound_s = bound_cpu_s("mlp", 10)

    assert 0 < bound_s < (marks.cpu_s[1] - marks.cpu_s[0]) / 9
    assert bound_cpu_s("cnn", 10) > 100 * bound_s


def test_a_cohort_is_measured_beside_a_loop_on_the_same_device(options: Options) -> None:
    """A cohort's time for each client stands beside the loop's, and above the bound."""
    work = make_work(options.folder, "cnn", clients=3, per_round=3, rounds=1)

    beside_loop, above_bound = compare_cohort(work, "cpu", blocks=1)

    assert beside_loop.goal == pytest.approx((beside_loop.peer_value or 0) / 20, rel=1e-3)
    assert above_bound.ratio is not None
    assert above_bound.ratio > 1


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_quick_benchmark_gives_the_promised_shape() -> None:
    """It ends by itself, prints one complete object, and says what it leaves out."""
    command = [sys.executable, "-m", "benchmarks.simulation", "--quick", "--json"]

    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=True)

    result = json.loads(done.stdout)
    assert all(set(each) == FIELDS for each in result["claims"])
    assert any("start to the end" in each["name"] for each in result["claims"])
    assert "left out" in done.stderr
