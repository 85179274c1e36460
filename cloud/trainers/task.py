"""What is trained: a model, samples to train and to test on, and how they are judged."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

IGNORED = -100
"""The target of a place where nothing is to be predicted, as torch's losses have it."""


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

    `forward` gives the model's outputs (B, classes, ...) of inputs, and what is added to the
    loss whatever the targets (None: nothing). `loss` is the mean over a batch, of outputs in
    float32 and targets (B, ...); a target of `IGNORED` counts nowhere.
    """

    model: nn.Module
    train: Samples
    test: Samples
    forward: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Judged:
    """How a model does: mean loss (nats), and the share it predicts right (0 to 1)."""

    loss: float
    accuracy: float
    predictions: int


def judge(task: Task, *, compute: torch.dtype, batch: int = 512) -> Judged:
    """How the task's model does on its test samples."""
    loss, right, count = 0.0, 0, 0
    was_training = task.model.training
    task.model.eval()
    with torch.no_grad():
        for start in range(0, len(task.test), batch):
            places = np.arange(start, min(start + batch, len(task.test)))
            x, y = drawn(task, task.test, places, compute)
            outputs = task.forward(x)[0].float()
            counted = int((y != IGNORED).sum())
            loss += float(task.loss(outputs, y)) * counted
            right += int((outputs.argmax(1) == y).sum())
            count += counted
    task.model.train(was_training)
    return Judged(loss / max(1, count), right / max(1, count), count)


def drawn(
    task: Task, samples: Samples, places: NDArray[np.int64], compute: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The samples at these places, where the task's model is.

    Numbers come in the type the model computes with; tokens stay what they are.
    """
    device = next(task.model.parameters()).device
    x, y = samples.batch(places)
    x = x.to(device, compute) if x.is_floating_point() else x.to(device)
    return x, y.to(device)
