import dataclasses
import logging
import multiprocessing
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Mapping
from functools import partial

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.trainer import fulfil
from federation.errors import ConfigError, TrainingError
from federation.learning.data import LocalData
from federation.learning.models import initial_weights
from federation.protocol.codec import encode
from federation.protocol.effects import Trained
from federation.protocol.messages import ModelSpec, Uplink
from simulations.workshop import CohortRule, InProcess, Processes
from simulations.workshop.cohorts import cut, macs_of
from simulations.workshop.parcels import Receiver, send_parcel, shared_file
from tests.workshops import DEVICES, MODEL, SMALL, average, first_base, fleet, forked, job, told

BENCHES = {
    "one process": InProcess,
    "one worker": partial(Processes, workers=1),
    "two workers": partial(Processes, workers=2),
}


@pytest.fixture(params=BENCHES)
def bench(request):
    return BENCHES[request.param]


def results_of(workshop, jobs, order=None):
    """Begin all, ask for all (by default in another order), and close: what was told of each."""
    with workshop:
        for one in jobs:
            workshop.begin(one)
        attempts = [one.assignment.attempt for one in jobs]
        asked = random.Random(0).sample(attempts, len(attempts)) if order is None else order
        found = {attempt: told(workshop.result(attempt)) for attempt in asked}
    return [found[attempt] for attempt in attempts]


@pytest.mark.parametrize("exact", [True, False])
def test_a_run_has_the_same_bits_on_every_bench(bench, exact):
    """The same rounds, with devices that die, end in the same model wherever they are trained."""
    with InProcess(fleet(), exact=exact, rule=SMALL) as here:
        expected = average(here)

    with bench(fleet(), exact=exact, rule=SMALL) as workshop:
        assert average(workshop) == expected


def test_exact_results_are_those_of_the_device_alone(bench):
    """With `exact`, each job gives the bits of a training by itself, whatever its cohort."""
    jobs = [job(place) for place in range(DEVICES)]

    found = results_of(bench(fleet(), exact=True, rule=SMALL), jobs)

    alone = [told(fulfil(j.assignment, j.base, fleet()[j.device], j.memory)) for j in jobs]
    assert found == alone


def test_the_order_of_beginning_and_asking_changes_no_bit():
    """Jobs that begin and are asked for in another order come out the same."""
    jobs = [job(place) for place in range(DEVICES)]
    expected = results_of(InProcess(fleet(), rule=SMALL), jobs)
    shuffled = random.Random(3).sample(jobs, len(jobs))

    found = results_of(Processes(fleet(), workers=2, rule=SMALL), shuffled)

    assert sorted(found) == sorted(expected)


def test_jobs_of_many_bases_models_and_memories_meet_in_one_cohort(bench):
    """Each job is trained from its own base and memory, and a bad one harms no other."""
    other = ModelSpec(name="mlp", sizes={"inputs": 64, "hidden": 9, "classes": 10})
    bases = [first_base(), encode(initial_weights(MODEL, seed=2))]
    jobs = [job(place, base=bases[place % 2]) for place in range(4)]
    jobs += [job(4, base=encode(initial_weights(other, seed=0)), model=other)]
    jobs += [job(5, model=ModelSpec(name="unheard-of")), job(6, base=b"no weights")]

    found = results_of(bench(fleet(), exact=True, rule=SMALL), jobs)

    alone = [told(fulfil(j.assignment, j.base, fleet()[j.device], j.memory)) for j in jobs]
    assert found == alone
    assert [bool(failure) for *_, failure, _ in found] == [False] * 5 + [True] * 2


def test_a_memory_reaches_the_next_training_of_its_device(bench):
    """What a training leaves on the device is there, bit for bit, when it trains again."""
    uplink = Uplink(delta=True, top_k=0.2, residual=True)
    first = job(3, uplink=uplink)
    with bench(fleet(), exact=True) as workshop:
        workshop.begin(first)
        left = workshop.result("r_1_d03").memory
        second = dataclasses.replace(job(3, 2, uplink=uplink), memory=left)
        workshop.begin(second)
        found = workshop.result("r_2_d03")

    alone = fulfil(second.assignment, second.base, fleet()["d03"], left)
    assert left
    assert told(found) == told(alone)


class Lazy(Mapping):
    """A fleet that builds what a device holds at each access."""

    def __getitem__(self, name):
        held = fleet()[name]
        return LocalData(held.x.copy(), held.y.copy())

    def __iter__(self):
        return iter(fleet())

    def __len__(self):
        return DEVICES


def test_a_fleet_may_be_built_at_each_access(bench):
    """Data that exist only while they are looked at give the same model."""
    with InProcess(fleet(), rule=SMALL) as here:
        expected = average(here, rounds=2)

    with bench(Lazy(), rule=SMALL) as workshop:
        assert average(workshop, rounds=2) == expected


def test_what_is_dropped_before_it_started_is_not_trained(bench, tmp_path):
    """A device that dies before anybody waits costs no training."""
    with bench(fleet(), train=partial(note_and_train, tmp_path)) as workshop:
        for place in range(4):
            workshop.begin(job(place))
        workshop.drop("r_1_d02")
        for place in (0, 1, 3):
            workshop.result(f"r_1_d{place:02d}")

    assert sorted(p.name for p in tmp_path.iterdir()) == ["r_1_d00", "r_1_d01", "r_1_d03"]


def note_and_train(folder, assignment, base, data, memory):
    (folder / assignment.attempt).touch()
    return fulfil(assignment, base, data, memory)


def test_a_result_is_given_once_and_only_of_what_began(bench):
    """Asking for what never began, was dropped or was given is an error that says so."""
    with bench(fleet(), exact=True) as workshop:
        for place in range(2):
            workshop.begin(job(place))
        workshop.result("r_1_d00")
        workshop.drop("r_1_d01")
        workshop.drop("r_1_d01")

        for attempt in ("r_1_d00", "r_1_d01", "r_9_d00"):
            with pytest.raises(TrainingError, match=f"no training of '{attempt}' has begun"):
                workshop.result(attempt)


def test_a_job_that_begins_again_is_trained_again(bench):
    """An attempt dropped in the middle of its cohort and begun anew gives its result."""
    with bench(fleet(), exact=True) as workshop:
        for place in range(3):
            workshop.begin(job(place))
        workshop.result("r_1_d00")
        workshop.drop("r_1_d01")
        workshop.begin(job(1))
        found = workshop.result("r_1_d01")

    alone = job(1)
    assert told(found) == told(fulfil(alone.assignment, alone.base, fleet()["d01"], b""))


PLACES = st.lists(st.integers(0, DEVICES - 1), min_size=1, max_size=DEVICES, unique=True)


@given(places=PLACES, most=st.integers(1, 8), macs=st.sampled_from([1.0, 1e5, 3e5, 1e9]))
def test_cohorts_depend_on_the_jobs_alone(places, most, macs):
    """Every job is in one cohort, cohorts keep to the rule, and the order of jobs is nothing."""
    rule, jobs = CohortRule(most, macs), [job(place) for place in places]

    cohorts = cut(jobs, fleet(), rule)

    assert cohorts == cut(sorted(jobs, key=lambda j: -j.place), fleet(), rule)
    assert sorted(j.place for cohort in cohorts for j in cohort) == sorted(places)
    for cohort in cohorts:
        cost = sum(macs_of(j.assignment.plan, fleet()[j.device].samples) for j in cohort)
        assert len(cohort) == 1 or (len(cohort) <= most and cost <= macs)


def test_the_cost_of_a_training_counts_what_it_sees():
    """A training's MACs are those of a sample times the samples seen, capped steps included."""
    plan = job(0).assignment.plan
    a_sample = 64 * 24 + 24 * 10

    assert macs_of(plan, 30) == 2 * 30 * a_sample
    assert macs_of(job(0, max_steps=3).assignment.plan, 30) == 3 * 8 * a_sample


PARTS = st.lists(st.binary(max_size=300), max_size=6)


@given(parcels=st.lists(st.tuples(PARTS, st.integers(0, 2)), max_size=8), shared=PARTS)
def test_parcels_arrive_as_they_were_sent(parcels, shared):
    """Parts of any size arrive in order, beside what they share, and no descriptor is left."""
    ours, theirs = socket.socketpair()
    before = psutil.Process().num_fds()
    files = [None, shared_file(shared, 1), shared_file([*shared, b"more"], 2)]
    with ours, theirs:
        receiver = Receiver(theirs)
        for parts, which in parcels:
            send_parcel(ours, parts, files[which])
            expected = [[], shared, [*shared, b"more"]][which]
            assert receiver.receive() == (parts, expected)
        for file in files[1:]:
            file.close()
        assert psutil.Process().num_fds() == before
        ours.close()
        assert receiver.receive() is None


def test_large_parts_pass_through_memory():
    """A part far larger than any socket's buffer is sent without anybody reading meanwhile."""
    ours, theirs = socket.socketpair()
    part = os.urandom(8 * 2**20)
    with ours, theirs:
        send_parcel(ours, [part])

        assert Receiver(theirs).receive() == ([part], [])


def meet(folder, assignment, base, data, memory):
    """Trains only while the other of two devices is being trained."""
    (folder / assignment.attempt).touch()
    deadline = time.monotonic() + 30
    while len(list(folder.iterdir())) < 2:
        if time.monotonic() > deadline:
            return Trained(assignment.attempt, failure="alone")
        time.sleep(0.005)
    return fulfil(assignment, base, data, memory)


def test_workers_train_at_the_same_time(tmp_path):
    """While the caller waits for one result, another worker trains another job."""
    jobs = [job(0), job(1)]

    found = results_of(Processes(fleet(), workers=2, train=partial(meet, tmp_path)), jobs)

    assert [failure for *_, failure, _ in found] == ["", ""]


def hang(mark, assignment, *_):
    mark.touch()
    time.sleep(60)
    return Trained(assignment.attempt)


def ended(pids, within_s=20.0):
    """Whether all these processes end within so many seconds; children of ours are reaped."""
    processes = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs(processes, timeout=within_s)
    return not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


def wait_for(condition, within_s=30.0):
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def kill_itself(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_dead_worker_is_an_error_that_says_what_to_do():
    """A worker that is killed ends the run with one line: who, during what, and the remedy."""
    workshop = Processes(fleet(), workers=2, train=kill_itself)
    with workshop:
        for place in range(4):
            workshop.begin(job(place))

        with pytest.raises(TrainingError, match=r"signal 9 while it trained d0\d.*use fewer work"):
            workshop.result("r_1_d00")
        with pytest.raises(TrainingError, match="signal 9"):
            workshop.result("r_1_d01")
    assert ended(workshop.pids)


def fail(*_):
    raise ValueError("odd data")


def test_an_unexpected_error_in_a_worker_reaches_the_caller():
    """What goes wrong in a worker is told with the device it happened on."""
    with Processes(fleet(), workers=1, train=fail) as workshop:
        workshop.begin(job(7))

        with pytest.raises(TrainingError, match="training of d07 failed: ValueError: odd data"):
            workshop.result("r_1_d07")


def test_closing_ends_workers_in_the_middle_of_a_training(tmp_path):
    """No training is waited for when the workshop closes, and no process is left."""
    workshop = Processes(fleet(), workers=2, train=partial(hang, tmp_path / "mark"))
    for place in range(6):
        workshop.begin(job(place))
    workshop._start_all()
    wait_for((tmp_path / "mark").exists)

    began_s = time.monotonic()
    workshop.close()

    assert time.monotonic() - began_s < 10
    assert ended(workshop.pids, 0)


def train_in_vain(folder):
    workshop = Processes(fleet(), workers=2, train=partial(hang, folder / "mark"))
    (folder / "pids").write_text(" ".join(map(str, workshop.pids)))
    for place in range(3):
        workshop.begin(job(place))
    with workshop:
        workshop.result("r_1_d00")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_no_worker_outlives_its_parent(how, tmp_path):
    """After SIGKILL of the parent, and after Ctrl-C in its terminal, all processes are gone."""
    parent = forked(partial(train_in_vain, tmp_path))
    wait_for((tmp_path / "mark").exists)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]

    if how == signal.SIGKILL:
        os.kill(parent, how)
    else:
        os.killpg(parent, how)

    assert os.waitpid(parent, 0)[1] != 0
    assert len(pids) == 2
    assert ended(pids)


def train_after_computing(folder):
    torch.set_num_threads(2)
    square = torch.randn(600, 600, requires_grad=True)
    (square @ square).sum().backward()
    stop = threading.Event()
    busy = threading.Thread(target=keep_logging, args=(stop,))
    busy.start()
    try:
        for turn in range(3):
            with Processes(fleet(), workers=2, rule=SMALL) as workshop:
                model = average(workshop, rounds=1)
            (folder / str(turn)).write_bytes(model)
    finally:
        stop.set()
        busy.join()


def keep_logging(stop):
    while not stop.is_set():
        logging.getLogger("tests.busy").debug("and on")
        # No product of matrices: OpenBLAS hangs a thread that is in one while another forks.
        np.sort(np.ones(40_000))


def test_workers_start_from_a_process_that_computes_with_threads(tmp_path):
    """Forked beside threads that log and compute, after torch used several, workers still train."""
    # A process of its own: what earlier tests left in this one is not what is promised.
    process = multiprocessing.get_context("spawn").Process(
        target=train_after_computing, args=(tmp_path,)
    )
    process.start()
    process.join(60)
    assert process.exitcode == 0

    with InProcess(fleet(), rule=SMALL) as here:
        expected = average(here, rounds=1)
    assert [(tmp_path / str(turn)).read_bytes() == expected for turn in range(3)] == [True] * 3


def test_no_workers_is_refused():
    """A workshop without workers is an error of the configuration."""
    with pytest.raises(ConfigError, match="0 workers; expected 1 or more"):
        Processes(fleet(), workers=0)
