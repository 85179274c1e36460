"""What is trained: a model, samples to train and to test on, and how they are judged."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cloud.trainers.plans import DataPlan, TrainPlan
from federation.datasets.cached import DataSet, load
from federation.errors import ConfigError
from federation.learning.models import build_model, initial_weights, load_weights


class Samples(Protocol):
    """Samples by place; each batch is made when it is asked for."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def batch(self, places: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the samples at these places."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Arrays:
    """Samples that lie in memory."""

    x: NDArray[np.float32]
    y: NDArray[np.int64]

    def __len__(self) -> int:
        """How many there are."""
        return len(self.y)

    def batch(self, places: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Inputs (B, ...) and labels (B,)."""
        return torch.from_numpy(self.x[places]), torch.from_numpy(self.y[places])


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """One thing to learn.

    `loss` is the mean over a batch, of the model's outputs (B, classes, ...) in float32 and the
    targets (B, ...).
    """

    model: nn.Module
    train: Samples
    test: Samples
    loss: Callable[[Tensor, Tensor], Tensor]
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Judged:
    """How a model does on samples: mean loss, and the share it predicts right (0 to 1)."""

    loss: float
    accuracy: float
    samples: int


def classification(plan: TrainPlan, cache: Path) -> Task:
    """A model of the zoo on a data set with labels.

    Raises:
        ConfigError: clients to hold out that the set does not have.
        DataError: a set that is unknown or was not fetched.
    """
    found = load(plan.data.set, cache=cache)
    train, test = split(found, plan.data)
    model = load_weights(build_model(plan.model), initial_weights(plan.model, plan.seed))
    return Task(
        model=model,
        train=Arrays(found.x[train], found.y[train]),
        test=Arrays(found.x[test], found.y[test]),
        loss=cross_entropy,
        labels=found.labels,
    )


def split(found: DataSet, plan: DataPlan) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The places of the samples to train and to test on; they share none.

    Raises:
        ConfigError: clients to hold out that the set does not have.
    """
    if plan.held_out:
        train, test = _by_client(found, plan.held_out)
    elif found.test is not None:
        train, test = found.train, found.test
    else:
        cut = len(found.y) - max(1, round(plan.test_share * len(found.y)))
        train, test = np.arange(cut), np.arange(cut, len(found.y))
    return (train[: plan.at_most] if plan.at_most else train), test


def _by_client(
    found: DataSet, held_out: tuple[str, ...]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    known = dict(zip(found.client_names, range(len(found.client_names)), strict=True))
    if found.client is None or (unknown := [name for name in held_out if name not in known]):
        asked = held_out[0] if found.client is None else unknown[0]
        raise ConfigError(
            f"data.held_out names {asked!r}; the clients of {found.name} are "
            f"{', '.join(found.client_names) or 'not known'}: name some of them, or none"
        )
    is_held = np.isin(found.client, [known[name] for name in held_out])
    return np.flatnonzero(~is_held), np.flatnonzero(is_held)


def judge(task: Task, *, compute: torch.dtype, batch: int = 512) -> Judged:
    """How the task's model does on its test samples."""
    loss, right, count = 0.0, 0, 0
    was_training = task.model.training
    task.model.eval()
    with torch.no_grad():
        for start in range(0, len(task.test), batch):
            places = np.arange(start, min(start + batch, len(task.test)))
            x, y = task.test.batch(places)
            outputs = task.model(as_input(x, compute)).float()
            loss += float(task.loss(outputs, y)) * len(places)
            predicted = outputs.argmax(1)
            right += int((predicted == y).sum())
            count += y.numel()
    task.model.train(was_training)
    return Judged(loss / max(1, len(task.test)), right / max(1, count), len(task.test))


def as_input(x: Tensor, compute: torch.dtype) -> Tensor:
    """Numbers in the type the model computes with; tokens stay what they are."""
    return x.to(compute) if x.is_floating_point() else x
