"""Comparing: paired by seed, resumable, the same whatever the number of processes."""

import json
import math
import signal
import subprocess
import sys
import time

import msgspec
import numpy as np
import pytest

from federation.errors import ConfigError, TrainingError
from simulations.comparison.command import compare
from simulations.comparison.crew import RoundDone, run_trials
from simulations.comparison.figures import (
    Point,
    RunFigures,
    default_target,
    first_at,
    spread,
)
from simulations.comparison.showing import as_table, by_rounds
from simulations.comparison.trial import (
    choose_variants,
    decode_trial,
    encode_trial,
    kept_figures,
    plan_trials,
)
from simulations.fleet import fleet_data
from simulations.scenario import Variant, read_scenario, vary

SMALL = """
seed = 3
[run]
name = "small"
rounds = 3
[run.model]
name = "linear"
[run.policy]
devices_per_round = 3
[run.training]
max_steps = 2
[fleet]
devices = 3
samples = 40
hold_out = 0.5
[availability]
kind = "bernoulli"
q = 0.5
[[variants]]
name = "plain"
[[variants]]
name = "quick"
method = "fedprox"
params = { mu = 0.1 }
training = { max_steps = 1, learning_rate = 0.2 }
uplink = { encoding = "int8" }
policy = { quorum = 1 }
"""


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "scenario.toml"
    file.write_text(SMALL, encoding="utf-8")
    return file


def figures_of(variant, seed, accuracies, *, status="finished", worst=0.5):
    curve = tuple(Point(n, a, 100 * n) for n, a in enumerate([0.1, *accuracies]))
    return RunFigures(
        variant=variant,
        seed=seed,
        status=status,
        reason="too few devices",
        accuracy=float(np.mean(accuracies)),
        jitter=float(np.std(accuracies)),
        worst_device=worst,
        bytes_up=100 * len(accuracies),
        bytes_down=50,
        curve=curve,
    )


def test_a_variant_changes_what_it_names_and_nothing_else(path):
    """Its tables are laid over the scenario's; a method of its own has its own numbers."""
    scenario = read_scenario(path)

    quick = vary(scenario, scenario.variants[1])

    assert quick.run.method.name == "fedprox"
    assert quick.run.method.params == {"mu": 0.1}
    assert (quick.run.training.max_steps, quick.run.training.batch_size) == (1, 32)
    assert quick.run.uplink.encoding == "int8"
    assert (quick.run.model, quick.fleet) == (scenario.run.model, scenario.fleet)
    assert quick.variants == ()


@pytest.mark.parametrize(
    ("added", "said"),
    [
        ("training = { epoch = 1 }", "variant 'odd': unknown key 'epoch' in training"),
        ("training = { momentum = 2.0 }", "variant 'odd': training.momentum is 2.0"),
        ("policy = { quorum = 'all' }", "variant 'odd': policy: Expected `int`, got `str`"),
        ("method = 'fedmagic'", "variant 'odd': no method is called 'fedmagic'"),
        ("method = 'fedprox'\nparams = { nu = 1.0 }", "has no parameter 'nu'"),
        ("fleet = { devices = 2 }", "unknown key 'fleet'"),
        ("[[variants]]\nname = 'odd'", "variants[3].name is odd; expected a new name"),
        ("[[variants]]\nname = '../up'", "variants[3].name is '../up'"),
        ("availability = { q = 0.0 }", "variant 'odd': availability.q is 0.0"),
    ],
)
def test_a_mistake_in_a_variant_is_named(path, added, said):
    """Variants are read as strictly as the scenario, before anything is run."""
    path.write_text(f"{SMALL}[[variants]]\nname = 'odd'\n{added}\n", encoding="utf-8")

    with pytest.raises(ConfigError) as caught:
        read_scenario(path)

    assert said in str(caught.value)


def test_names_are_of_variants_or_of_methods(path):
    """A variant is found before a method; without names all variants are meant."""
    scenario = read_scenario(path)

    assert [v.name for v in choose_variants(scenario, [])] == ["plain", "quick"]
    chosen = choose_variants(scenario, ["local_only", "quick", "fedprox"])
    assert chosen[1].params == {"mu": 0.1}
    assert chosen[2] == Variant(name="fedprox", method="fedprox")
    with pytest.raises(ConfigError, match=r"'slow' is neither.*plain, quick, fedavg"):
        choose_variants(scenario, ["slow"])
    with pytest.raises(ConfigError, match="'quick' is named twice"):
        choose_variants(scenario, ["quick", "quick"])


def test_variants_of_a_seed_see_the_same_data(path):
    """With one seed all devices hold the same and begin alike; with another they do not."""
    scenario = read_scenario(path)

    trials = plan_trials(scenario, scenario.variants, 2)

    assert [(t.variant.name, t.seed) for t in trials] == [
        ("plain", 0),
        ("quick", 0),
        ("plain", 1),
        ("quick", 1),
    ]
    held = [fleet_data(t.scenario, cache=path.parent).devices["d00"].x for t in trials]
    assert np.array_equal(held[0], held[1])
    assert not np.array_equal(held[0], held[2])
    assert [t.scenario.run.seed for t in trials] == [0, 0, 1, 1]
    assert [t.scenario.seed for t in trials] == [3, 3, 4, 4]
    assert all(decode_trial(encode_trial(t)) == t for t in trials)


def test_figures_are_paired_by_seed_and_counted_to_the_target(path):
    """Differences are taken seed by seed; the target is the first's accuracy less a point."""
    runs = {
        ("a", 0): figures_of("a", 0, [0.7, 0.9]),
        ("a", 1): figures_of("a", 1, [0.5, 0.7]),
        ("b", 0): figures_of("b", 0, [0.8, 0.9]),
        ("b", 1): figures_of("b", 1, [0.6, 0.6], status="failed"),
    }
    variants = [Variant(name="a"), Variant(name="b")]

    found = compare(read_scenario(path), variants, 2, runs, None)

    a, b = found.variants
    assert math.isclose(found.target, 0.69)
    assert math.isclose(default_target([runs["a", 0], runs["a", 1]]), 0.69)
    assert a.difference.values == (0.0, 0.0)
    assert np.allclose(b.difference.values, [0.05, 0.0])
    assert math.isclose(b.difference.std, 0.05 / math.sqrt(2))
    assert (a.reached, b.reached) == (2, 1)
    assert a.rounds_to_target.values == (1.0, 2.0)
    assert a.bytes_to_target.mean == 150.0
    assert b.unfinished == ("seed 1: failed, too few devices",)
    assert "| b | 72.5 ± 17.7 |" in as_table(found)
    assert "1 (1 of 2)" in as_table(found)
    assert "- b, seed 1: failed, too few devices" in as_table(found)


def test_a_round_without_a_model_has_the_accuracy_of_the_one_before():
    """Curves of runs that lost rounds still fall in one table."""
    run = msgspec.structs.replace(
        figures_of("a", 0, [0.5]), curve=(Point(0, 0.1, 0), Point(2, 0.4, 7), Point(4, 0.3, 9))
    )

    assert by_rounds([run], np.arange(6), lambda point: point.accuracy).tolist() == [
        [0.1, 0.1, 0.4, 0.4, 0.3, 0.3]
    ]
    assert first_at(run.curve, 0.35) == Point(2, 0.4, 7)
    assert first_at(run.curve, 0.5) is None
    assert spread([0.5]).std == 0.0


def test_the_command_leaves_a_table_a_plot_and_a_folder_a_run(path, tmp_path, headwater_sim):
    """`compare --json` prints what comparison.json holds, and nothing else."""
    out = tmp_path / "out"

    code, printed, errors = headwater_sim(
        "compare", path, "--methods", "plain,quick,local_only", "--seeds", 2, "--out", out, "--json"
    )

    assert (code, errors) == (0, "")
    found = json.loads(printed)
    assert found == json.loads((out / "comparison.json").read_text(encoding="utf-8"))
    assert [v["name"] for v in found["variants"]] == ["plain", "quick", "local_only"]
    plain, quick, alone = found["variants"]
    assert len(plain["accuracy"]["values"]) == 2
    assert 0 < quick["bytes_up"]["mean"] < 0.6 * plain["bytes_up"]["mean"]
    assert alone["bytes_up"]["mean"] == alone["bytes_down"]["mean"] == 0
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "| local_only |" in (out / "table.md").read_text(encoding="utf-8")
    for variant in ("plain", "quick", "local_only"):
        for seed in (0, 1):
            folder = out / variant / f"seed-{seed}"
            result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
            held = json.loads((folder / "partition.json").read_text(encoding="utf-8"))
            assert len(result["rounds"]) == 3
            assert held["seed"] == seed
            assert all(sum(counts) == 40 for counts in held["devices"].values())
    asked = [
        [row["devices"] for row in json.loads((folder / "result.json").read_text())["rounds"]]
        for folder in (out / name / "seed-0" for name in ("plain", "quick", "local_only"))
    ]
    assert asked[0] == asked[1] == asked[2]


def test_what_is_there_is_not_run_again_unless_it_changed(path, tmp_path, headwater_sim):
    """A finished run stays; a variant whose settings changed is run again, and it says so."""
    arguments = ["compare", path, "--seeds", 2, "--out", tmp_path / "out"]
    headwater_sim(*arguments)
    kept = tmp_path / "out" / "plain" / "seed-1" / "result.json"
    first = kept.stat().st_mtime_ns, (tmp_path / "out" / "comparison.json").read_bytes()

    code, _, said = headwater_sim(*arguments)
    second = kept.stat().st_mtime_ns, (tmp_path / "out" / "comparison.json").read_bytes()
    path.write_text(SMALL.replace("max_steps = 1", "max_steps = 2"), encoding="utf-8")
    _, _, changed = headwater_sim(*arguments)

    assert code == 0
    assert first == second
    assert "4 of 4 runs are there already" in said
    assert "quick seed 1 is run again: its settings have changed" in changed
    assert "2 of 4 runs are there already" in changed
    assert kept.stat().st_mtime_ns == first[0]


@pytest.mark.slow
def test_the_number_of_processes_changes_no_figure(path, tmp_path):
    """Two processes give what one gives, to the last bit, and tell of their rounds."""
    scenario = read_scenario(path)
    trials = plan_trials(scenario, scenario.variants, 2)
    heard = {1: [], 2: []}

    for jobs, news in heard.items():
        run_trials(trials, tmp_path / str(jobs), cache=tmp_path, jobs=jobs, tell=news.append)

    for trial in trials:
        one, two = (kept_figures(trial, tmp_path / str(jobs))[0] for jobs in heard)
        assert one is not None
        assert one == two
        files = [tmp_path / str(jobs) / trial.folder / "model.safetensors" for jobs in heard]
        assert files[0].read_bytes() == files[1].read_bytes()
    rounds = [sorted((n.variant, n.seed, n.round) for n in news if isinstance(n, RoundDone))
              for news in heard.values()]  # fmt: skip
    assert rounds[0] == rounds[1]
    assert len(rounds[0]) == 12


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_trial_that_cannot_be_run_is_one_error(path, tmp_path, jobs):
    """What is wrong with a trial is said with its name, whichever process found out."""
    scenario = read_scenario(path)
    run = msgspec.structs.replace(
        scenario.run, model=msgspec.structs.replace(scenario.run.model, name="giant")
    )
    trials = plan_trials(msgspec.structs.replace(scenario, run=run), scenario.variants, 1)

    with pytest.raises(
        TrainingError, match=r"(plain|quick) with seed 0: no model is called 'giant'"
    ):
        run_trials(trials, tmp_path, cache=tmp_path, jobs=jobs, tell=lambda _: None)


@pytest.mark.slow
def test_a_file_in_place_of_the_folder_is_one_error(path, tmp_path, headwater_sim):
    """It is said once, that nothing can be written there, and nothing is run."""
    (tmp_path / "taken").write_text("")

    code, _, errors = headwater_sim(
        "compare", path, "--methods", "plain", "--out", tmp_path / "taken"
    )

    assert code == 2
    assert len(errors.splitlines()) == 1
    assert "give another folder with --out" in errors


@pytest.mark.slow
def test_an_interrupt_loses_only_the_run_in_hand(path, tmp_path):
    """After Ctrl-C the finished runs are there, and the next call takes up the rest."""
    path.write_text(SMALL.replace("rounds = 3", "rounds = 400"), encoding="utf-8")
    out = tmp_path / "out"
    words = ["simulations", "compare", str(path), "--seeds", "6", "--out", str(out), "--jobs", "2"]
    log = tmp_path / "log"
    with log.open("wb") as printed:
        process = subprocess.Popen([sys.executable, "-m", *words], stdout=printed, stderr=printed)
    deadline = time.monotonic() + 90
    while not (done := list(out.glob("*/*/figures.json"))):
        assert time.monotonic() < deadline, log.read_text()
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)

    process.send_signal(signal.SIGINT)

    assert process.wait(30) == 130
    finished = {file: file.stat().st_mtime_ns for file in out.glob("*/*/figures.json")}
    assert set(done) <= finished.keys()
    assert len(finished) < 12
    assert not (out / "table.md").exists()
    assert "Traceback" not in log.read_text()
