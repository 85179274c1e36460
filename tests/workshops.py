"""A little federated averaging on digits, done in a workshop."""

import functools
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np

from edge_agent.trainer import fulfil
from federation.datasets.cached import load
from federation.learning.data import LocalData
from federation.learning.models import initial_weights
from federation.protocol.codec import decode, digest_of, encode
from federation.protocol.effects import Trained
from federation.protocol.messages import Assignment, Content, LocalPlan, ModelSpec
from simulations.workshop import CohortRule, InProcess, Job, Processes, Remembered
from simulations.workshop.grouped import Grouped

DEVICES, ROUNDS = 12, 3
MODEL = ModelSpec(name="mlp", sizes={"inputs": 64, "hidden": 24, "classes": 10})
SMALL = CohortRule(most=5)
OWNER = "digits, seed 1"


@functools.cache
def fleet() -> dict[str, LocalData]:
    """Devices of 8 to 30 digits each."""
    digits = load("digits", cache=Path())
    return {
        f"d{n:02d}": LocalData(digits.x[n : 400 : 12 + n], digits.y[n : 400 : 12 + n])
        for n in range(DEVICES)
    }


@functools.cache
def first_base() -> bytes:
    return encode(initial_weights(MODEL, seed=1))


def job(place: int, number: int = 1, base: bytes = b"", **plan: object) -> Job:
    """One device's job of a round; attempts look like `r_1_d03`."""
    device = f"d{place:02d}"
    wanted = {"model": MODEL, "epochs": 2, "batch_size": 8, "seed": 100 * number + place} | plan
    base = base or first_base()
    assignment = Assignment(
        attempt=f"r_{number}_{device}",
        run="r",
        round=number,
        deadline_s=60.0,
        base=Content(digest=digest_of(base), size=len(base), chunk_bytes=2**18),
        plan=LocalPlan(**wanted),  # type: ignore[arg-type]
    )
    return Job(place, device, assignment, base)


def told(trained: Trained) -> tuple[object, ...]:
    """A result without the seconds that the training took, which no seed decides."""
    report = trained.report
    numbers = (report.samples, report.steps, report.loss_sum, report.correct)
    return trained.attempt, trained.update, numbers, trained.failure, trained.memory


def average(
    workshop: Grouped, rounds: int = ROUNDS, on_result: Callable[[], None] = lambda: None
) -> bytes:
    """Federated averaging: the final model. Results are asked for in an order of the seed."""
    base, rng = first_base(), random.Random(1)
    for number in range(1, rounds + 1):
        jobs = [job(place, number, base) for place in rng.sample(range(DEVICES), 9)]
        for one in jobs:
            workshop.begin(one)
        dead = jobs.pop()
        asked = rng.sample(jobs, len(jobs))
        updates = {}
        for one in asked:
            updates[one.place] = decode(workshop.result(one.assignment.attempt).update)
            on_result()
            workshop.drop(dead.assignment.attempt)
        mean = {
            name: np.mean([updates[place][name] for place in sorted(updates)], axis=0)
            for name in decode(base)
        }
        base = encode({name: tensor.astype(np.float32) for name, tensor in mean.items()})
    return base


def noted(folder: Path) -> Callable[[Assignment, bytes, LocalData, bytes], Trained]:
    """Trains, and notes down whom."""

    def train(assignment: Assignment, base: bytes, data: LocalData, memory: bytes) -> Trained:
        with (folder / "trained").open("a") as notes:
            notes.write(f"{assignment.attempt}\n")
        return fulfil(assignment, base, data, memory)

    return train


def workshop_of(kind: str, folder: Path) -> Grouped:
    """One of the kinds that runs are resumed on; `noted` notes down whom it trains."""
    match kind:
        case "noted":
            return InProcess(fleet(), train=noted(folder))
        case "in-process":
            return InProcess(fleet(), rule=SMALL)
        case _:
            return Processes(fleet(), workers=2, rule=SMALL)


def forked(body: Callable[[], None]) -> int:
    """Run a body in a process of its own, in a session of its own: its process id."""
    first_base(), fleet()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setsid()
            # Begun in the background of a shell, it would have inherited that this is ignored.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            body()
            status = 0
        finally:
            os._exit(status)
    return pid


def run_remembered(folder: Path, kind: str, die_after: int = 0) -> int:
    """A remembered run in a process of its own, killed after so many results (0: never).

    The digest of its final model goes to `folder/final`; its exit status is given back.
    """
    results = 0

    def on_result() -> None:
        nonlocal results
        results += 1
        if results == die_after:
            os.kill(os.getpid(), signal.SIGKILL)

    def body() -> None:
        with Remembered(workshop_of(kind, folder), folder, owner=OWNER) as workshop:
            final = average(workshop, on_result=on_result)
        (folder / "final").write_text(digest_of(final))

    return os.waitstatus_to_exitcode(os.waitpid(forked(body), 0)[1])
