import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from edge_agent.frames import DataSource, Job, Stop, write_frame
from edge_agent.trainer import CheckpointFile, fulfil
from edge_agent.worker import Worker, WorkerLimits
from federation.errors import StoreError
from federation.learning.checkpoint import Checkpoint, Progress
from federation.learning.data import load_folder
from federation.learning.models import initial_weights
from federation.learning.training import Supervision
from federation.protocol.codec import decode, encode, layer_of
from federation.protocol.messages import Assignment, Content, LocalPlan, ModelSpec, Uplink

MLP = ModelSpec(name="mlp", sizes={"inputs": 8, "hidden": 16, "classes": 3})
BASE = encode(initial_weights(MLP, seed=1))


def assignment(attempt="r_1_d", **plan):
    wanted = {"model": MLP, "epochs": 2, "momentum": 0.9, "seed": 4} | plan
    return Assignment(
        attempt=attempt,
        run="r",
        round=1,
        deadline_s=60,
        base=Content(digest="", size=0, chunk_bytes=1),
        plan=LocalPlan(**wanted),
    )


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((70, 8)), rng.integers(0, 3, 70)
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "part.npz", x=x, y=y)
    return tmp_path / "data"


class Ears:
    """Hears what a worker says, and waits for it with a bounded deadline."""

    def __init__(self):
        self._heard = threading.Condition()
        self.progress, self.trained = [], []

    def on_progress(self, attempt, done, total):
        with self._heard:
            self.progress.append((attempt, done, total))
            self._heard.notify_all()

    def on_trained(self, trained):
        with self._heard:
            self.trained.append(trained)
            self._heard.notify_all()

    def wait(self, holds, timeout_s=60):
        with self._heard:
            assert self._heard.wait_for(holds, timeout_s)


def eventually(holds, timeout_s=30):
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def ears():
    return Ears()


@pytest.fixture
def hire(folder, ears, tmp_path):
    workers = []

    def make(source=None, **limits):
        worker = Worker(
            source or DataSource(folder=str(folder)),
            ears.on_progress,
            ears.on_trained,
            checkpoint_path=(tmp_path / "checkpoints").joinpath,
            limits=WorkerLimits(**limits),
        )
        workers.append(worker)
        return worker

    yield make
    for worker in workers:
        worker.close()


LONG = {"epochs": 1_000_000, "learning_rate": 0.001}
JOB = Job(assignment=assignment(), base=BASE, source=DataSource())


def test_the_child_gives_the_bytes_that_fulfil_gives(hire, ears, folder):
    """A worker's update equals, bit for bit, the one made in this process."""
    here = fulfil(assignment(), BASE, load_folder(folder))

    hire().train(assignment(), BASE)

    ears.wait(lambda: ears.trained)
    assert ears.trained[0].failure == ""
    assert ears.trained[0].update == here.update
    assert ears.trained[0].report.samples == 70
    assert ears.progress[-1] == ("r_1_d", 6, 6)


def test_a_second_job_uses_the_same_child(hire, ears):
    """Jobs queue up in one child, and each is answered once."""
    worker = hire()

    worker.train(assignment("one"), BASE)
    worker.train(assignment("two"), BASE)

    ears.wait(lambda: ears.trained)
    first = worker.child_pid
    ears.wait(lambda: len(ears.trained) == 2)
    assert [t.attempt for t in ears.trained] == ["one", "two"]
    assert worker.child_pid == first


def test_an_echo_returns_the_base_without_torch(hire, ears):
    """A plan of no epochs brings the base back, from a child without torch."""
    worker = hire()

    worker.train(assignment(epochs=0), BASE)

    ears.wait(lambda: ears.trained)
    assert decode(ears.trained[0].update).keys() == decode(BASE).keys()
    assert ears.trained[0].update == BASE
    maps = psutil.Process(worker.child_pid).memory_maps()
    assert not any("torch" in m.path for m in maps)


def test_a_killed_child_is_reported_and_the_next_job_gets_a_new_one(hire, ears):
    """A child killed from outside is a failure that names the signal; work goes on."""
    worker = hire()
    worker.train(assignment(**LONG), BASE)
    ears.wait(lambda: ears.progress)

    os.kill(worker.child_pid, signal.SIGKILL)

    ears.wait(lambda: ears.trained)
    assert "signal 9" in ears.trained[0].failure
    worker.train(assignment("again"), BASE)
    ears.wait(lambda: len(ears.trained) == 2)
    assert ears.trained[1].failure == ""


def test_a_stopped_attempt_ends_between_batches(hire, ears, tmp_path):
    """Stop ends one attempt, forgets its checkpoint, and lets the next begin."""
    worker = hire(checkpoint_every_s=0.0)
    worker.train(assignment("long", **LONG), BASE)
    worker.train(assignment("short"), BASE)
    ears.wait(lambda: ears.progress)

    worker.stop("long")

    ears.wait(lambda: len(ears.trained) == 2)
    assert ears.trained[0].attempt == "long"
    assert ears.trained[0].failure.startswith("stopped")
    assert ears.trained[1].failure == ""
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_an_attempt_stopped_before_it_begins_never_trains(hire, ears):
    """A queued attempt that is stopped is answered without a step."""
    worker = hire()
    worker.train(assignment("long", **LONG), BASE)
    worker.train(assignment("queued", **LONG), BASE)
    worker.stop("queued")
    ears.wait(lambda: ears.progress)

    worker.stop("long")

    ears.wait(lambda: len(ears.trained) == 2)
    assert ears.trained[1].failure.startswith("stopped")
    assert {attempt for attempt, _, _ in ears.progress} == {"long"}


def test_an_attempt_stopped_and_begun_again_is_told_of_once(hire, ears, folder):
    """What the stopped training still says is not taken for the new one's outcome."""
    again = {"epochs": 3}
    worker = hire()
    worker.train(assignment(**LONG), BASE)
    ears.wait(lambda: ears.progress)

    for _ in range(2):
        worker.stop("r_1_d")
        worker.train(assignment(**again), BASE)
    ears.wait(lambda: ears.trained)
    worker.train(assignment("last", epochs=0), BASE)

    ears.wait(lambda: ears.trained[-1].attempt == "last")
    assert [trained.attempt for trained in ears.trained] == ["r_1_d", "last"]
    assert ears.trained[0].failure == ""
    assert ears.trained[0].update == fulfil(assignment(**again), BASE, load_folder(folder)).update


def test_a_stop_that_comes_too_late_does_not_stop_the_next_of_its_name():
    """The child reads a stop as meant for what was asked before it, not after it."""
    pipe = io.BytesIO()
    for order in (Stop(attempt="r_1_d"), JOB):
        write_frame(pipe, order)
    script = (
        "import io, os, sys; from edge_agent import trainer\n"
        "orders = trainer._Orders(io.BytesIO(sys.stdin.buffer.read()))\n"
        "os._exit = lambda code: None\n"
        "orders.read(); print(orders.is_stopped('r_1_d'), orders.jobs.qsize())"
    )

    found = subprocess.run(
        [sys.executable, "-c", script], input=pipe.getvalue(), capture_output=True, check=True
    )

    assert found.stdout == b"False 1\n"


def test_a_checkpoint_folder_that_cannot_be_made_is_a_failure_in_words(hire, ears, tmp_path):
    """A file in the folder's way fails the training, and the worker goes on when it is gone."""
    (tmp_path / "checkpoints").write_bytes(b"in the way")
    worker = hire()

    worker.train(assignment("one", epochs=0), BASE)
    worker.stop("one")
    worker.stop("never begun")

    ears.wait(lambda: len(ears.trained) == 1)
    assert "checkpoints" in ears.trained[0].failure
    (tmp_path / "checkpoints").unlink()
    worker.train(assignment("two", epochs=0), BASE)
    ears.wait(lambda: len(ears.trained) == 2)
    assert ears.trained[1].failure == ""


def test_a_checkpoint_that_cannot_be_removed_does_not_end_the_worker(hire, ears, tmp_path):
    """What lies where a checkpoint should be costs no training but its own."""
    (tmp_path / "checkpoints" / "stuck").mkdir(parents=True)
    worker = hire()
    worker.train(assignment("one", epochs=0), BASE)
    ears.wait(lambda: len(ears.trained) == 1)

    worker.stop("stuck")
    worker.train(assignment("two", epochs=0), BASE)

    ears.wait(lambda: len(ears.trained) == 2)
    assert [trained.failure for trained in ears.trained] == ["", ""]


def test_a_trainer_that_cannot_be_started_is_a_failure_in_words(hire, ears, monkeypatch):
    """Without memory for a process the training fails, and the next one is tried anew."""
    worker = hire()

    def full(*_args, **_kwargs):
        raise OSError(12, "Cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", full)
        worker.train(assignment("one", epochs=0), BASE)
        ears.wait(lambda: len(ears.trained) == 1)
    worker.train(assignment("two", epochs=0), BASE)

    ears.wait(lambda: len(ears.trained) == 2)
    assert "Cannot allocate memory" in ears.trained[0].failure
    assert ears.trained[1].failure == ""


def test_a_stalled_child_is_ended(hire, ears):
    """A child that shows no progress for stall_s is killed, and the failure says stalled."""
    worker = hire(stall_s=20.0)
    worker.train(assignment(), BASE)
    ears.wait(lambda: len(ears.trained) == 1)
    worker._limits = WorkerLimits(stall_s=0.3)
    child = psutil.Process(worker.child_pid)
    child.suspend()

    worker.train(assignment("stuck"), BASE)

    ears.wait(lambda: len(ears.trained) == 2)
    assert "stalled" in ears.trained[1].failure
    eventually(lambda: not child.is_running())


def test_an_idle_child_goes_away(hire, ears):
    """Without work for idle_s, the child ends; the next job starts another."""
    worker = hire(idle_s=0.2)
    worker.train(assignment(epochs=0), BASE)
    ears.wait(lambda: ears.trained)
    assert ears.trained[0].failure == ""

    eventually(lambda: worker.child_pid is None)

    worker.train(assignment("later", epochs=0), BASE)
    ears.wait(lambda: len(ears.trained) == 2)
    assert ears.trained[1].failure == ""


def test_closing_ends_a_child_in_training(hire, ears):
    """Close leaves no process behind and reports nothing."""
    worker = hire()
    worker.train(assignment(**LONG), BASE)
    ears.wait(lambda: ears.progress)
    child = psutil.Process(worker.child_pid)

    worker.close()

    eventually(lambda: not child.is_running())
    assert ears.trained == []


def test_work_goes_on_after_a_restart_of_the_agent(hire, ears, folder, tmp_path):
    """A worker killed in training leaves a checkpoint, from which another gives the same bits."""
    plan = {"epochs": 400}
    undisturbed = fulfil(assignment(**plan), BASE, load_folder(folder))
    first = hire(checkpoint_every_s=0.0)
    first.train(assignment(**plan), BASE)
    checkpoints = tmp_path / "checkpoints"
    eventually(lambda: checkpoints.exists() and list(checkpoints.iterdir()))
    first.close()
    assert ears.trained == []

    hire().train(assignment(**plan), BASE)

    ears.wait(lambda: ears.trained)
    assert ears.trained[0].update == undisturbed.update
    assert ears.trained[0].report.steps == undisturbed.report.steps
    assert list(checkpoints.iterdir()) == []


def test_the_child_dies_with_its_agent(folder):
    """When the agent is killed, its trainer is gone soon, also in mid-training."""
    script = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_worker import BASE, DataSource, Ears, LONG, Worker, assignment
ears = Ears()
worker = Worker(DataSource(folder={str(folder)!r}), ears.on_progress, ears.on_trained)
worker.train(assignment(**LONG), BASE)
ears.wait(lambda: ears.progress)
print(worker.child_pid, flush=True)
time.sleep(600)
"""
    agent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    with agent:
        child = psutil.Process(int(agent.stdout.readline()))

        agent.kill()

        eventually(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def test_data_that_cannot_be_read_is_a_failure_in_words(hire, ears, tmp_path):
    """A missing folder, or one whose data does not fit, becomes a failure, not a crash."""
    worker = hire(DataSource(folder=str(tmp_path / "nowhere")))

    worker.train(assignment(), BASE)

    ears.wait(lambda: ears.trained)
    assert "nowhere" in ears.trained[0].failure
    assert "create it" in ears.trained[0].failure


def test_changed_files_are_read_again(hire, ears, folder):
    """Data added between two jobs counts in the second."""
    worker = hire()
    worker.train(assignment("before", epochs=0), BASE)
    ears.wait(lambda: len(ears.trained) == 1)

    np.savez(folder / "more.npz", x=np.zeros((5, 8)), y=np.zeros(5, int))
    worker.train(assignment("after", epochs=0), BASE)

    ears.wait(lambda: len(ears.trained) == 2)
    assert [t.report.samples for t in ears.trained] == [70, 75]


def test_what_the_owners_code_prints_does_no_harm(hire, ears, tmp_path, monkeypatch):
    """A data entry that prints, in Python or below, cannot garble the frames."""
    (tmp_path / "chatty_data.py").write_text(
        "import os, numpy as np\n"
        "def load():\n"
        "    print('hello'); os.write(1, b'\\xff' * 100)\n"
        "    return np.zeros((9, 8)), np.zeros(9, int)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    hire(DataSource(entry="chatty_data:load")).train(assignment(), BASE)

    ears.wait(lambda: ears.trained)
    assert ears.trained[0].failure == ""
    assert ears.trained[0].report.samples == 9


def test_a_worker_costs_no_numpy_until_it_trains():
    """Importing the worker loads neither NumPy nor torch."""
    code = "import sys, edge_agent.worker; print({'numpy', 'torch'} & set(sys.modules))"

    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert found.stdout.strip() == "set()"


@pytest.mark.parametrize("cut", ["resume", "torn", "foreign", "garbage"])
def test_only_a_whole_checkpoint_of_its_own_is_resumed(folder, tmp_path, cut):
    """Whatever lies at the checkpoint's path, the update has the undisturbed bits."""
    data, plan = load_folder(folder), {"epochs": 5}
    undisturbed = fulfil(assignment(**plan), BASE, data)
    file = CheckpointFile(tmp_path / "one.checkpoint", every_s=0.0)
    kept = []

    def crash(done, _total):
        if done == 8:
            kept.append(file.path.read_bytes())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fulfil(assignment(**plan), BASE, data, supervision=Supervision(crash), checkpoint=file)
    if cut == "torn":
        file.path.write_bytes(kept[0][:-7])
    if cut == "garbage":
        file.path.write_bytes(os.urandom(200))
    steps = []
    attempt = "r_2_d" if cut == "foreign" else "r_1_d"
    resumed = fulfil(
        assignment(attempt, **plan),
        BASE,
        data,
        supervision=Supervision(lambda done, _total: steps.append(done)),
        checkpoint=file,
    )

    assert steps[0] == (9 if cut == "resume" else 1)
    assert resumed.update == undisturbed.update
    assert resumed.report.loss_sum == undisturbed.report.loss_sum
    assert not file.path.exists()


def test_a_write_cut_short_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    """When the new file cannot be finished, the old one still reads."""
    file = CheckpointFile(tmp_path / "one.checkpoint")
    weights = {"w": np.ones(2, np.float32)}
    file.write("id", Checkpoint(weights, np.zeros(2, np.float32), Progress(steps=1)))

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space"):
        file.write("id", Checkpoint(weights, np.zeros(2, np.float32), Progress(steps=2)))

    assert file.read("id").progress.steps == 1
    assert file.read("other") is None
    monkeypatch.undo()
    file.forget()
    assert list(tmp_path.iterdir()) == []


def test_only_the_layers_asked_for_travel(folder):
    """An update holds the plan's layers, in the plan's encoding, and no others."""
    plan = {"layers": ("classifier",), "uplink": Uplink(encoding="int8")}

    trained = fulfil(assignment(**plan), BASE, load_folder(folder))

    assert {layer_of(name) for name in decode(trained.update)} == {"classifier"}


@pytest.mark.parametrize(
    ("plan", "base", "words"),
    [
        ({"learning_rate": 1e30}, BASE, "lower the learning rate"),
        ({"layers": ("nose",)}, BASE, "no layer 'nose'"),
        ({"method": "magic"}, BASE, "fedavg"),
        ({"model": ModelSpec(name="elephant")}, BASE, "conv1d"),
        ({"batch_size": 0}, BASE, "batch_size"),
        ({}, BASE[:-1], "fetch it again"),
        ({}, encode({"w": np.ones(3, np.float32)}), "same model"),
    ],
)
def test_what_cannot_be_fulfilled_says_why(folder, plan, base, words):
    """A bad plan, base or outcome is a failure in words, with no update."""
    trained = fulfil(assignment(**plan), base, load_folder(folder))

    assert words in trained.failure
    assert trained.update == b""
