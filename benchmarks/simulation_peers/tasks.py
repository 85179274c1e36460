"""Makes the works that are compared: real digits or drawn images, dealt out alike to all."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.simulation_peers.work import Task, Work, save_arrays
from cloud.config import ModelChoice

MODELS: dict[Task, ModelChoice] = {
    "linear": ModelChoice(name="linear"),
    "mlp": ModelChoice(name="mlp", sizes={"hidden": 64}),
    "cnn": ModelChoice(name="cnn", sizes={"hidden": 64}),
    "noop": ModelChoice(name="cnn", sizes={"hidden": 64}),
}
"""The tasks' models as the zoo has them."""

IMAGES_EACH = 60
"""Images of a client, whatever the number of clients."""

TEST_IMAGES, TEST_DIGITS = 500, 297

DIGITS_EACH = 15
"""Digits of a client; where there are more clients than digits, they share some."""

Pair = tuple[NDArray[np.float32], NDArray[np.int64]]


@dataclass(frozen=True, slots=True)
class Training:
    """How a task is trained, as the peers' own comparisons have it."""

    epochs: int
    batch_size: int
    learning_rate: float


TRAININGS: dict[Task, Training] = {
    "noop": Training(0, 20, 0.05),
    "mlp": Training(1, 8, 0.1),
    "cnn": Training(1, 20, 0.05),
    "linear": Training(1, 8, 0.1),
}


def make_work(
    folder: Path,
    task: Task,
    *,
    clients: int,
    per_round: int,
    rounds: int,
    processes: int = 1,
    seed: int = 0,
) -> Work:
    """A work, with its arrays written into this folder unless they are there."""
    file = folder / f"{task}-{clients}-{seed}.npz"
    if not file.exists():
        _write(file, task, clients, seed)
    how = TRAININGS[task]
    return Work(
        task=task,
        clients=clients,
        per_round=per_round,
        rounds=rounds,
        processes=processes,
        epochs=how.epochs,
        batch_size=how.batch_size,
        learning_rate=how.learning_rate,
        arrays=str(file),
        seed=seed,
    )


def _write(file: Path, task: Task, clients: int, seed: int) -> None:
    from federation.learning.models import initial_weights

    weights = list(initial_weights(MODELS[task], seed).values())
    rng = np.random.default_rng(seed)
    if task in ("mlp", "linear"):
        samples, bounds, held_out = _digits(clients, rng)
    else:
        # Where nobody trains, neither what is learned from nor what is measured on matters.
        each, tests = (1, 1) if task == "noop" else (IMAGES_EACH, TEST_IMAGES)
        prototypes = rng.normal(size=(10, 1, 28, 28)).astype(np.float32)
        samples = _images(prototypes, clients * each, rng)
        bounds = _windows(np.arange(clients) * each, each)
        held_out = _images(prototypes, tests, rng)
    save_arrays(file, samples, bounds, held_out, weights)


def _digits(clients: int, rng: np.random.Generator) -> tuple[Pair, NDArray[np.int64], Pair]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = rng.permutation(len(y))
    x, y = (x[order] / 16.0).astype(np.float32), y[order].astype(np.int64)
    train = x[TEST_DIGITS:], y[TEST_DIGITS:]
    last = len(train[1]) - DIGITS_EACH
    starts = np.arange(clients) * DIGITS_EACH % (last + 1)
    return train, _windows(starts, DIGITS_EACH), (x[:TEST_DIGITS], y[:TEST_DIGITS])


def _images(prototypes: NDArray[np.float32], count: int, rng: np.random.Generator) -> Pair:
    labels = rng.integers(0, len(prototypes), size=count)
    noise = rng.standard_normal((count, *prototypes.shape[1:]), dtype=np.float32)
    return 0.6 * prototypes[labels] + noise, labels.astype(np.int64)


def _windows(starts: NDArray[np.int64], each: int) -> NDArray[np.int64]:
    return np.stack([starts, starts + each], axis=1)
