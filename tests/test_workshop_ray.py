import os
import signal
import sys
import time
from functools import partial
from importlib.util import find_spec

import psutil
import pytest

from federation.errors import ConfigError, TrainingError
from federation.protocol.effects import Trained
from simulations.workshop import InProcess, RayWorkshop, Remembered
from simulations.workshop.remembered import journal_path
from tests.workshops import OWNER, SMALL, average, fleet, job

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize("exact", [True, False])
def test_a_run_on_ray_has_the_bits_of_one_process(exact, tmp_path):
    """The same rounds end in the same model on Ray, and a journal brings them back elsewhere."""
    with InProcess(fleet(), exact=exact, rule=SMALL) as here:
        expected = average(here)

    inner = RayWorkshop(fleet(), workers=2, exact=exact, rule=SMALL)
    with Remembered(inner, tmp_path, owner=OWNER) as workshop:
        assert average(workshop) == expected
    journal = journal_path(tmp_path).read_bytes()
    inner = InProcess(fleet(), exact=exact, rule=SMALL)
    with Remembered(inner, tmp_path, owner=OWNER) as again:
        assert average(again) == expected
    assert journal_path(tmp_path).read_bytes() == journal


@needs_ray
@pytest.mark.slow
def test_a_dead_actor_is_an_error_that_says_what_to_do(tmp_path):
    """An actor that is killed in the middle of a training is told in one line."""
    with RayWorkshop(fleet(), workers=1, train=partial(hang, tmp_path / "pid")) as workshop:
        workshop.begin(job(3))
        workshop._start_all()
        deadline = time.monotonic() + 60
        while not (tmp_path / "pid").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)

        with pytest.raises(TrainingError, match=r"actor died while it trained d03.*use fewer"):
            workshop.result("r_1_d03")


def hang(note, assignment, *_):
    partial_note = note.with_suffix(".part")
    partial_note.write_text(str(os.getpid()))
    partial_note.rename(note)
    time.sleep(120)
    return Trained(assignment.attempt)


@needs_ray
@pytest.mark.slow
def test_a_cluster_on_this_machine_ends_with_its_workshop():
    """It listens on loopback alone, tells an error in a training, and leaves no process."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with RayWorkshop(fleet(), workers=2, train=raise_odd) as workshop:
        workshop.begin(job(3))
        with pytest.raises(TrainingError, match=r"training of d03 failed on the cluster.*odd data"):
            workshop.result("r_1_d03")
        children = psutil.Process().children(recursive=True)
        started = [child for child in children if child.pid not in before]
        open_to = {
            connection.laddr.ip.removeprefix("::ffff:")
            for child in started
            for connection in child.net_connections(kind="inet")
            if connection.status == psutil.CONN_LISTEN
        }

    assert len(started) >= 3
    assert open_to == {"127.0.0.1"}
    assert psutil.wait_procs(started, timeout=30)[1] == []


def raise_odd(*_):
    raise ValueError("odd data")


def test_a_cluster_without_ray_is_refused(monkeypatch):
    """Where Ray is not installed, the error says how to install it."""
    monkeypatch.setitem(sys.modules, "ray", None)

    with pytest.raises(ConfigError, match=r"install headwater\[ray\]"):
        RayWorkshop(fleet(), workers=1)
