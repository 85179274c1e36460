"""The steps of a thousand digital agents side by side, beside the same steps one by one."""

import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch

from benchmarks.claims import Claim, Options, claim, main
from federation.learning.cohort import Task, train_cohort
from federation.learning.data import LocalData
from federation.learning.distillation import answers, first_student, student_of
from federation.learning.models import initial_weights
from federation.learning.training import torch_threads, train_locally
from federation.protocol.messages import LocalPlan, ModelSpec
from twin.teacher import trained

TEACHER = ModelSpec(name="mlp", sizes={"hidden": 256, "hidden2": 128})
STUDENTS = (
    ModelSpec(name="mlp", sizes={"hidden": 32}),
    ModelSpec(name="mlp", sizes={"hidden": 32, "hidden2": 16}),
    ModelSpec(name="cnn", sizes={"height": 8, "width": 8, "filters": 4, "hidden": 32}),
)
SAMPLES, BATCH, EPOCHS = 24, 8, 2
GOALS = {"cpu": 3.0, "cuda": 20.0}
"""How many times as fast as the loop; issue 5, line 6."""


def measure(options: Options) -> list[Claim]:
    """Student steps of 1,000 digital agents, batched, beside `train_locally` one by one.

    Every agent has 24 samples of its own with its teacher's answers to them, and makes 6 steps of
    8 by SimKD; architectures are dealt in turn, and each is measured alone too. On the CPU what
    counts is CPU time of one thread, on a GPU, where torch finds one, wall time beside the loop on
    the CPU of the same machine. The two take turns; a first time is not counted.
    """
    agents, turns = (200, 2) if options.is_quick else (1000, 3)
    everybody = _tasks(agents)
    claims = []
    with torch_threads(1):
        for device, clock in (("cpu", time.process_time), ("cuda", time.perf_counter)):
            if device == "cuda" and not torch.cuda.is_available():
                options.tell("torch finds no GPU: its case is left out")
                continue
            for name, tasks in _kinds(everybody):
                options.tell(f"{device}: {len(tasks)} agents, {name}")
                claims.append(_claim(name, tasks, device, clock, turns))
    return claims


def _claim(
    name: str, tasks: list[Task], device: str, clock: Callable[[], float], turns: int
) -> Claim:
    batched, loop = [], []
    _batched(tasks, device)
    for _ in range(turns):
        batched.append(_timed(lambda: _batched(tasks, device), clock))
        loop.append(_timed(lambda: _one_by_one(tasks), clock))
    is_mixed = name == "three architectures"
    return claim(
        f"{device}: {len(tasks)} agents, {name}",
        median(batched),
        "CPU s" if device == "cpu" else "s",
        peer="train_locally, one by one",
        peer_value=median(loop),
        goal=median(loop) / GOALS[device] if is_mixed else None,
    )


def _kinds(tasks: list[Task]) -> list[tuple[str, list[Task]]]:
    kinds = [("three architectures", tasks)]
    for place, model in enumerate(STUDENTS):
        depth = " of two layers" if "hidden2" in model.sizes else ""
        kinds.append((f"{model.name}{depth} alone", tasks[place :: len(STUDENTS)]))
    return kinds


def _batched(tasks: list[Task], device: str) -> None:
    for result in train_cohort(tasks, accelerator=device):
        trained(result)


def _one_by_one(tasks: list[Task]) -> None:
    for task in tasks:
        train_locally(task.weights, task.data, task.plan)


def _timed(work: Callable[[], None], clock: Callable[[], float]) -> float:
    began = clock()
    work()
    return clock() - began


def _tasks(agents: int) -> list[Task]:
    rng, teacher = np.random.default_rng(0), initial_weights(TEACHER, 0)
    tasks = []
    for number in range(agents):
        data = LocalData(
            rng.standard_normal((SAMPLES, 64)).astype(np.float32), rng.integers(0, 10, SAMPLES)
        )
        model = student_of(STUDENTS[number % len(STUDENTS)], TEACHER)
        base = first_student(model, teacher, number) | answers(
            TEACHER, teacher, data, ("features",)
        )
        plan = LocalPlan(
            model=model,
            method="simkd",
            epochs=EPOCHS,
            batch_size=BATCH,
            learning_rate=0.02,
            momentum=0.9,
            seed=number,
        )
        tasks.append(Task(base, data, plan))
    return tasks


if __name__ == "__main__":
    main("digital_agents", measure)
