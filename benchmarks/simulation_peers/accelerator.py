"""Small convolutional models on an accelerator: a cohort at once, beside one client at a time."""

import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.claims import Claim, Options, claim
from benchmarks.simulation_peers.bound import matrix_rate, training_operations
from benchmarks.simulation_peers.tasks import MODELS, make_work
from benchmarks.simulation_peers.work import Arrays, Work, first_model, train
from federation.learning.cohort import Task, train_cohort
from federation.learning.data import LocalData
from federation.learning.models import initial_weights
from federation.protocol.messages import LocalPlan, ModelSpec

COHORT = 512

TIMES = 20.0
"""How many times faster than the plain loop on the same accelerator a cohort is to be."""


def measure_accelerator(options: Options) -> list[Claim]:
    """Seconds a client, where torch sees an accelerator; nothing elsewhere."""
    if not torch.cuda.is_available():
        options.tell("the accelerator is left out: torch sees none")
        return []
    options.tell(f"{COHORT} clients on {torch.cuda.get_device_name()}")
    work = make_work(options.folder, "cnn", clients=COHORT, per_round=COHORT, rounds=1, processes=1)
    return compare_cohort(work, "cuda", blocks=2 if options.is_quick else 5)


def compare_cohort(work: Work, device: str, *, blocks: int) -> list[Claim]:
    """A cohort beside the plain loop on this device, by turns; the first of each is left out."""
    arrays = Arrays(work)
    loop, cohort = _loop(work, arrays, device), _cohort(work, arrays, device)
    times: dict[str, list[float]] = {"loop": [], "cohort": []}
    for _ in range(blocks + 1):
        times["loop"].append(_seconds(loop, device))
        times["cohort"].append(_seconds(cohort, device))
    theirs, ours = (statistics.median(taken[1:]) / work.per_round for taken in times.values())
    bound = training_operations("cnn") / matrix_rate(device)
    name = f"small CNN on the accelerator, {work.per_round} clients: time for each"
    goal = 1e3 * theirs / TIMES
    return [
        claim(name, 1e3 * ours, "ms", peer="bare loop there", peer_value=1e3 * theirs, goal=goal),
        claim(
            name,
            1e3 * ours,
            "ms",
            peer="bound: its sums at the rate of a matrix product there",
            peer_value=1e3 * bound,
        ),
    ]


def _loop(work: Work, arrays: Arrays, device: str) -> Callable[[], None]:
    model = first_model(work, arrays).to(device)
    first = [parameter.detach().clone() for parameter in model.parameters()]
    held = [arrays.tensors_of(number) for number in range(work.per_round)]
    samples = [(x.to(device), y.to(device)) for x, y in held]

    def run() -> None:
        for part in samples:
            with torch.no_grad():
                for own, given in zip(model.parameters(), first, strict=True):
                    own.copy_(given)
            train(model, part, work)
            for own in model.parameters():
                own.detach().cpu()

    return run


def _cohort(work: Work, arrays: Arrays, device: str) -> Callable[[], None]:
    weights = initial_weights(MODELS["cnn"], work.seed)
    spec = ModelSpec(name=MODELS["cnn"].name, sizes=MODELS["cnn"].sizes)
    plan = LocalPlan(
        model=spec,
        epochs=work.epochs,
        batch_size=work.batch_size,
        learning_rate=work.learning_rate,
    )
    tasks = [
        Task(weights, LocalData(*arrays.client(number)), plan) for number in range(work.per_round)
    ]

    def run() -> None:
        for result in train_cohort(tasks, accelerator="auto" if device == "cuda" else "cpu"):
            if isinstance(result, Exception):
                raise result

    return run


def _seconds(run: Callable[[], None], device: str) -> float:
    began = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began
