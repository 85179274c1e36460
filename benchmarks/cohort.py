"""Many clients trained side by side, beside one after another in a bare PyTorch loop."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarks.claims import Claim, Options, claim, main
from federation.errors import HeadwaterError
from federation.learning.cohort import Task, train_cohort
from federation.learning.costs import count_macs
from federation.learning.data import LocalData
from federation.learning.models import build_model, initial_weights, input_shape, sizes_of
from federation.learning.training import torch_threads
from federation.protocol.codec import Weights
from federation.protocol.messages import LocalPlan, ModelSpec


@dataclass(frozen=True, slots=True)
class Case:
    """What is trained: so many clients with so many samples each, for one epoch.

    `goal` is the most of the bare loop's time that it may take.
    """

    name: str
    model: ModelSpec
    clients: int
    samples: int
    batch_size: int
    goal: float | None = None


MLP = ModelSpec(name="mlp", sizes={"inputs": 64, "hidden": 64, "classes": 10})
CNN = ModelSpec(name="cnn", sizes={"hidden": 64})
WINDOWS = ModelSpec(name="conv1d")
DEEP = ModelSpec(name="fedlp_cnn", sizes={"filters": 8})

CPU_CASES = (
    Case("MLP 64-64-10", MLP, 10, 15, 8, goal=1 / 3),
    Case("MLP 64-64-10", MLP, 100, 15, 8, goal=1 / 3),
    Case("CNN of 28x28, 114k", CNN, 10, 60, 20, goal=0.8),
    Case("CNN of windows, 33k", WINDOWS, 10, 64, 32),
    Case("fedlp_cnn of 32x32, 85k", DEEP, 4, 40, 20),
)
GPU_CASES = (
    Case("MLP 64-64-10", MLP, 1000, 15, 8),
    Case("CNN of 28x28, 114k", CNN, 200, 60, 20, goal=1 / 20),
    Case("CNN of windows, 33k", WINDOWS, 200, 64, 32, goal=1 / 20),
)

MATRIX = {"cpu": 1024, "cuda": 8192}
"""The side of the square matrices whose product gives the rate a device can multiply at."""


def measure(options: Options) -> list[Claim]:
    """Clients trained side by side, beside a bare PyTorch loop over them, on one CPU thread.

    The two take turns on the same clients, models and steps; on the CPU what counts is CPU time.
    The bound is what the multiplications alone would take at the rate of a large matrix product,
    measured in the same run. Both keep the memory they free, as `train_cohort` has it kept. The
    same on a GPU where torch finds one, in wall time.
    """
    with torch_threads(1):
        claims = _on_device(options, "cpu", CPU_CASES, time.process_time)
    if torch.cuda.is_available():
        claims += _on_device(options, "cuda", GPU_CASES, time.perf_counter)
    else:
        options.tell("torch finds no GPU: its cases are left out")
    return claims


def _on_device(
    options: Options, device: str, cases: tuple[Case, ...], clock: Callable[[], float]
) -> list[Claim]:
    rate = _matrix_rate(device, clock)
    claims = [claim(f"{device}: matrix product", rate / 1e9, "GFLOP/s")]
    for case in cases:
        options.tell(f"{device}: {case.clients} x {case.name}")
        claims += _claims(case, device, rate, clock, patience_s=2.0 if options.is_quick else 20.0)
    return claims


def _claims(
    case: Case, device: str, rate: float, clock: Callable[[], float], patience_s: float
) -> list[Claim]:
    weights = initial_weights(case.model, 0)
    data = _data(case)
    plans = [
        LocalPlan(model=case.model, batch_size=case.batch_size, seed=seed)
        for seed in range(case.clients)
    ]
    tasks = [Task(weights, each, plan) for each, plan in zip(data, plans, strict=True)]

    def ours() -> None:
        for result in train_cohort(tasks, accelerator=device):
            if isinstance(result, HeadwaterError):
                raise result

    model = build_model(case.model).to(device)

    def bare() -> None:
        _bare_loop(model, case, weights, data, plans[0].learning_rate)

    ours_s, bare_s = _take_turns((ours, bare), clock, patience_s)
    name = f"{device}: {case.clients} x {case.name}"
    unit = "CPU ms" if device == "cpu" else "ms"
    bound_s = 2 * _macs_of_epoch(case) / rate
    return [
        claim(
            f"{name}: a round",
            1e3 * ours_s,
            unit,
            peer="bare PyTorch loop",
            peer_value=1e3 * bare_s,
            goal=None if case.goal is None else 1e3 * bare_s * case.goal,
        ),
        claim(
            f"{name}: over the bound",
            ours_s / bound_s,
            "times",
            peer="bare PyTorch loop",
            peer_value=bare_s / bound_s,
        ),
        claim(
            f"{name}: clients a second",
            case.clients / ours_s,
            "1/s",
            peer="bound by matrix rate",
            peer_value=case.clients / bound_s,
        ),
    ]


def _take_turns(
    trainings: tuple[Callable[[], None], ...], clock: Callable[[], float], patience_s: float
) -> list[float]:
    """The median seconds of each; they take turns, thrice or as often as there is patience.

    A first time is not counted.
    """
    spent: list[list[float]] = [[] for _ in trainings]
    for each in trainings:
        each()
    until = time.monotonic() + patience_s
    while len(spent[0]) < 3 or time.monotonic() < until:
        for seconds, each in zip(spent, trainings, strict=True):
            began = clock()
            each()
            seconds.append(clock() - began)
    return [median(seconds) for seconds in spent]


def _bare_loop(
    model: nn.Module, case: Case, weights: Weights, data: list[LocalData], learning_rate: float
) -> list[Weights]:
    """What one writes without any framework: one model, which takes up and gives back weights."""
    model.train()
    device = next(model.parameters()).device
    trained = []
    for each in data:
        model.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
        x, y = torch.from_numpy(each.x).to(device), torch.from_numpy(each.y).to(device)
        optimiser = torch.optim.SGD(model.parameters(), lr=learning_rate)
        for start in range(0, case.samples, case.batch_size):
            batch = slice(start, start + case.batch_size)
            optimiser.zero_grad()
            loss = functional.cross_entropy(model(x[batch]), y[batch])
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            float(loss.detach())
        trained.append({n: t.cpu().numpy().copy() for n, t in model.state_dict().items()})
    return trained


def _macs_of_epoch(case: Case) -> int:
    """Forward, and twice that backward: by the weights, and by what came in."""
    return 3 * count_macs(case.model) * case.samples * case.clients


def _matrix_rate(device: str, clock: Callable[[], float]) -> float:
    """Floating-point operations a second, float32, of the best of some large products."""
    side = MATRIX[device]
    matrix = torch.randn(side, side, device=device)
    seconds = []
    for _ in range(6):
        began = clock()
        product = matrix @ matrix
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(clock() - began)
    del product
    return 2 * side**3 / min(seconds)


def _data(case: Case) -> list[LocalData]:
    rng, shape = np.random.default_rng(0), input_shape(case.model)
    classes = sizes_of(case.model)["classes"]
    return [
        LocalData(
            rng.standard_normal((case.samples, *shape), np.float32),
            rng.integers(0, classes, case.samples),
        )
        for _ in range(case.clients)
    ]


if __name__ == "__main__":
    main("cohort", measure)
