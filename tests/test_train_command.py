"""`headwater-hub train`: from a file to a model that is used, whatever ends it in between."""

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import psutil
import pytest
import torch
from numpy.typing import NDArray

from cloud.record.registry import ManifestEntry, Registry
from cloud.trainers.checkpoints import Checkpoints, Moment, digest_of
from cloud.trainers.loop import Step
from cloud.trainers.plans import TrainPlan
from cloud.trainers.running import Result
from edge_agent.inference import Predictor
from federation.config import read_config
from federation.datasets.cached import cache_folder, fetch, load
from federation.datasets.fetching import UnreachableError
from simulations.processes import Process, write_toml
from tests.command_line import Type

DIGITS: dict[str, Any] = {
    "name": "digits",
    "epochs": 3,
    "batch_size": 64,
    "data": {"set": "digits"},
    "model": {"name": "mlp"},
    "optimizer": {"learning_rate": 5e-3},
    "checkpoint": {"every_steps": 5},
}
WINDOWS: dict[str, Any] = {
    "name": "windows",
    "epochs": 6,
    "batch_size": 32,
    "data": {"set": "hapt", "held_out": ["person-05"], "at_most": 256},
    "moe": {
        "kind": "classifier",
        "n_channels": 6,
        "window_length": 128,
        "patch_length": 16,
        "n_classes": 6,
        "d_model": 16,
        "n_layers": 1,
        "n_heads": 2,
        "d_expert": 16,
        "n_experts": 4,
        "top_k": 1,
    },
    "checkpoint": {"every_steps": 2},
}
PATIENCE_S = 120.0
QUIET = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums are added up in one order, here and in processes that are told so too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def windows() -> dict[str, Any]:
    """A plan on HAPT; it skips only where there is no network and it was never fetched."""
    try:
        fetch("hapt", cache=cache_folder(os.environ), on_progress=lambda *_: None)
    except UnreachableError as cause:
        pytest.skip(str(cause))
    return WINDOWS


def _written(folder: Path, plan: dict[str, Any]) -> Path:
    return write_toml(folder / "train.toml", plan)


def _losses(out: Path) -> dict[int, float]:
    """The loss of each step that was reported; of one done again, as it was the last time."""
    lines = (out / "metrics.jsonl").read_bytes().splitlines()
    steps = [msgspec.json.decode(line, type=Step) for line in lines]
    return {step.number: step.loss for step in steps}


def _result(out: Path) -> Result:
    return msgspec.json.decode((out / "result.json").read_bytes(), type=Result)


def _newest(plan: Path, out: str) -> Moment:
    digest = digest_of(read_config(plan, TrainPlan))
    found = Checkpoints(plan.parent / out / "checkpoints", digest).newest()
    assert found is not None
    return found


def _published(hub: Path, run: str) -> ManifestEntry:
    (entry,) = Registry(hub).manifest(run)
    return entry


def _until(is_so: Callable[[], bool], process: Process) -> None:
    """Waits until something is so, as long as the process runs."""
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert process.is_running, process.last_words()
        assert time.monotonic() < deadline, process.last_words()
        time.sleep(0.01)


def test_a_training_ends_as_a_run_that_devices_infer_with(typed: Type, tmp_path: Path) -> None:
    """The run's ONNX file answers as well as the result says; steps and losses are on disk."""
    plan = _written(tmp_path, DIGITS)
    said = typed("headwater-hub", "train", plan, "--out", "out", "--hub", "hub").succeeds()

    result = _result(tmp_path / "out")
    assert result.steps == 3 * (1438 // 64) == 66
    assert "66 steps" in said
    assert "run 'digits' in the registry" in said
    losses = _losses(tmp_path / "out")
    assert list(losses) == [20, 40, 60, 66]
    assert losses[66] < losses[20]
    onnx = tmp_path / "model.onnx"
    onnx.write_bytes(Registry(tmp_path / "hub").read(_published(tmp_path / "hub", "digits").onnx))
    digits = load("digits", cache=tmp_path)
    answers = Predictor(onnx).predict(digits.x[1438:]).argmax(1)
    assert (answers == digits.y[1438:]).mean() == pytest.approx(result.accuracy, abs=0.003)
    assert result.accuracy > 0.7


def test_json_is_one_object_on_standard_output(typed: Type, tmp_path: Path) -> None:
    """With --json standard output is the result and nothing else."""
    plan = _written(tmp_path, DIGITS | {"epochs": 1})
    said = typed("headwater-hub", "train", plan, "--out", "out", "--json").succeeds()

    assert msgspec.json.decode(said, type=Result).steps == 22


BAD_PLANS = {
    "unknown key": (DIGITS | {"momentum": 0.9}, "unknown key 'momentum'"),
    "no model": ({k: v for k, v in DIGITS.items() if k != "model"}, "give one"),
    "parallel zoo": (DIGITS | {"parallel": {"tensor": 2}}, "leave [parallel] out"),
    "both": (WINDOWS | {"parallel": {}, "sparse": {}}, "[parallel] and [sparse] are both given"),
    "large batch": (DIGITS | {"batch_size": 4096}, "there are 1438 samples"),
    "no data": (DIGITS | {"data": {"set": "digit"}}, "digits"),
    "steep": (DIGITS | {"optimizer": {"learning_rate": -1}}, "learning_rate is -1"),
}


@pytest.mark.parametrize("what", list(BAD_PLANS))
def test_a_plan_that_cannot_be_is_one_line(what: str, typed: Type, tmp_path: Path) -> None:
    """What is wrong is said in one line, with exit code 2, before anything is trained."""
    plan, words = BAD_PLANS[what]
    typed("headwater-hub", "train", _written(tmp_path, plan), "--out", "out").fails(words)

    assert not (tmp_path / "out" / "result.json").exists()


def test_parts_of_a_model_need_processes(
    typed: Type, tmp_path: Path, windows: dict[str, Any]
) -> None:
    """[parallel] in a process alone is refused, and the line names torchrun."""
    plan = _written(tmp_path, windows | {"parallel": {"tensor": 2}})
    typed("headwater-hub", "train", plan, "--out", "out").fails("torchrun --nproc-per-node")


def test_the_checkpoints_of_another_plan_are_refused(typed: Type, tmp_path: Path) -> None:
    """A folder with checkpoints goes on with the plan that they are of, or not at all."""
    typed("headwater-hub", "train", _written(tmp_path, DIGITS), "--out", "out").succeeds()
    changed = _written(tmp_path, DIGITS | {"seed": 5})

    typed("headwater-hub", "train", changed, "--out", "out").fails("checkpoints of another plan")


@pytest.mark.usefixtures("one_thread")
def test_a_killed_training_ends_with_the_bits_of_an_undisturbed_one(
    typed: Type, launch: Callable[..., Process], tmp_path: Path
) -> None:
    """Killed without warning in the middle and started again: the same losses, the same state."""
    path = _written(tmp_path, DIGITS | {"epochs": 20})
    kept = tmp_path / "killed" / "checkpoints"
    typed("headwater-hub", "train", path, "--out", "whole").succeeds()

    killed = launch("cloud", "train", str(path), "--out", str(tmp_path / "killed"), **QUIET)
    _until(lambda: len(list(kept.glob("step-*.safetensors"))) > 1, killed)
    assert killed.kill() == -signal.SIGKILL
    assert 5 < _newest(path, "killed").facts.step < 435
    typed("headwater-hub", "train", path, "--out", "killed").succeeds()

    assert _losses(tmp_path / "killed") == _losses(tmp_path / "whole")
    resumed, whole = (_newest(path, out) for out in ("killed", "whole"))
    assert resumed.facts.step == whole.facts.step == 435
    assert resumed.tensors.keys() == whole.tensors.keys()
    assert all(torch.equal(tensor, whole.tensors[name]) for name, tensor in resumed.tensors.items())


def _by_torchrun(
    launch: Callable[..., Process], ranks: int, plan: Path, out: Path, *more: str, restarts: int = 0
) -> Process:
    asked = ("--standalone", f"--nproc-per-node={ranks}", f"--max-restarts={restarts}")
    train = ("-m", "cloud", "train", str(plan), "--out", str(out), *more)
    return launch("torch.distributed.run", *asked, *train, **QUIET)


def _ends_well(process: Process) -> None:
    deadline = time.monotonic() + 2 * PATIENCE_S
    while process.is_running:
        assert time.monotonic() < deadline, process.last_words()
        time.sleep(0.05)
    assert process.stop() == 0, process.last_words(60)


def _rank(process: Process, rank: int) -> psutil.Process:
    """The process that torchrun started as this rank."""
    children = psutil.Process(process.pid).children()
    (found,) = (child for child in children if child.environ().get("RANK") == str(rank))
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["copies", "shards"])
def test_a_rank_that_is_killed_costs_only_the_steps_since_the_checkpoint(
    kind: str, launch: Callable[..., Process], tmp_path: Path, windows: dict[str, Any]
) -> None:
    """Under torchrun a training goes on after a rank was killed, with the losses it would have had.

    With copies of a model, and with a mixture of experts of which each rank has half.
    """
    plans = {"copies": DIGITS | {"epochs": 40}, "shards": windows | {"parallel": {"expert": 2}}}
    path = _written(tmp_path, plans[kind])
    _ends_well(_by_torchrun(launch, 2, path, tmp_path / "whole"))

    kept = tmp_path / "killed" / "checkpoints"
    run = _by_torchrun(launch, 2, path, tmp_path / "killed", restarts=1)
    try:
        _until(lambda: len(list(kept.glob("step-*.safetensors"))) > 1, run)
        _rank(run, 1).kill()
        _ends_well(run)
    finally:
        run.stop()

    assert _losses(tmp_path / "killed") == _losses(tmp_path / "whole")
    resumed, whole = (_result(tmp_path / out) for out in ("killed", "whole"))
    assert resumed.loss == whole.loss
    assert resumed.steps == whole.steps
    assert "failed (exitcode" in run.last_words(400)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_experts_trained_on_four_ranks_are_served(
    launch: Callable[..., Process], tmp_path: Path, windows: dict[str, Any]
) -> None:
    """Tensor 2 by expert 2 trains HAPT's classifier; `headwater-moe serve` is as often right."""
    data = windows["data"] | {"at_most": 2048}
    shape = {"parallel": {"tensor": 2, "expert": 2}, "optimizer": {"learning_rate": 5e-3}}
    path = _written(tmp_path, windows | shape | {"data": data, "epochs": 2})
    _ends_well(_by_torchrun(launch, 4, path, tmp_path / "out", "--hub", str(tmp_path / "hub")))
    serve = write_toml(tmp_path / "moe.toml", {"repository": "hub/served", "http": {"port": 0}})

    server = launch("moe_serving", "serve", str(serve), **QUIET)
    _until(lambda: "serving" in server.last_words(), server)
    found = re.search(r"serving windows \(1\) on (\S+)", server.last_words())
    assert found, server.last_words()
    hapt = load("hapt", cache=cache_folder(os.environ))
    assert hapt.client is not None
    held = hapt.client == hapt.client_names.index("person-05")
    with httpx.Client(base_url=found.group(1), timeout=60.0) as client:
        told = [label for x in np.array_split(hapt.x[held], 10) for label in _asked(client, x)]

    right = np.mean([label == hapt.labels[y] for label, y in zip(told, hapt.y[held], strict=True)])
    result = _result(tmp_path / "out")
    assert right == pytest.approx(result.accuracy, abs=0.003)
    assert right > 0.6


def _asked(client: httpx.Client, x: NDArray[np.float32]) -> list[str]:
    """What a server of models calls these windows."""
    tensor = {"name": "windows", "shape": x.shape, "datatype": "FP32", "data": x.ravel().tolist()}
    answer = client.post("/v2/models/windows/infer", json={"inputs": [tensor]}).raise_for_status()
    labels: list[str] = answer.json()["outputs"][1]["data"]
    return labels
