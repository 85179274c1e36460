"""The work that all drivers do alike: one model, one deal of data, the same steps.

It is read from a file, so that every driver starts from the same bits whatever its environment
holds. Only NumPy and torch are needed to read it and to do it.
"""
# mypy: disable-error-code="no-untyped-call"

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Task: TypeAlias = Literal["noop", "mlp", "cnn", "linear"]

Samples: TypeAlias = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """So many rounds of FedAvg, `per_round` of `clients` each, in so many worker processes.

    With no epochs the weights of the task's model travel and nobody trains. `arrays` is the file
    with the samples and the first weights.
    """

    task: Task
    clients: int
    per_round: int
    rounds: int
    processes: int
    epochs: int
    batch_size: int
    learning_rate: float
    arrays: str
    seed: int = 0

    @property
    def least_updates(self) -> float:
        """How many must count in all rounds: some clients are away where most are asked."""
        share = 0.8 if self.per_round > 0.8 * self.clients else 0.97
        return share * self.rounds * self.per_round

    def save(self, path: Path) -> None:
        """Write it down for a driver to read."""
        path.write_text(json.dumps(asdict(self)))


def read_work(path: str | Path) -> Work:
    """The work in this file."""
    return Work(**json.loads(Path(path).read_text()))


class Arrays:
    """What a work is done on: everybody's samples, one after the other, and the first weights.

    Client i holds the samples from `bounds[i, 0]` to before `bounds[i, 1]`; clients may share
    some. `weights` are in the order of the model's parameters.
    """

    def __init__(self, work: Work) -> None:
        with np.load(work.arrays, allow_pickle=False) as held:
            self.x: NDArray[np.float32] = held["x"]
            self.y: NDArray[np.int64] = held["y"]
            self.bounds: NDArray[np.int64] = held["bounds"]
            self.test_x: NDArray[np.float32] = held["test_x"]
            self.test_y: NDArray[np.int64] = held["test_y"]
            names = sorted(name for name in held.files if name.startswith("weight"))
            self.weights: list[NDArray[np.float32]] = [held[name] for name in names]

    def client(self, number: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The samples of one client."""
        part = slice(*self.bounds[number].tolist())
        return self.x[part], self.y[part]

    def tensors_of(self, number: int) -> Samples:
        """The samples of one client, for torch, in the same memory."""
        x, y = self.client(number)
        return torch.from_numpy(x), torch.from_numpy(y)

    @property
    def held_out(self) -> Samples:
        """What no client holds."""
        return torch.from_numpy(self.test_x), torch.from_numpy(self.test_y)


def save_arrays(
    path: Path,
    samples: tuple[NDArray[np.float32], NDArray[np.int64]],
    bounds: NDArray[np.int64],
    held_out: tuple[NDArray[np.float32], NDArray[np.int64]],
    weights: list[NDArray[np.float32]],
) -> None:
    """Write the samples and the first weights down for all drivers to read."""
    named = {f"weight{place:02}": tensor for place, tensor in enumerate(weights)}
    (x, y), (test_x, test_y) = samples, held_out
    np.savez(
        path, allow_pickle=False, x=x, y=y, bounds=bounds, test_x=test_x, test_y=test_y, **named
    )


def first_model(work: Work, arrays: Arrays) -> nn.Module:
    """The task's model as plain torch, with the first weights."""
    model = _cnn() if work.task in ("cnn", "noop") else _dense(work.task)
    with torch.no_grad():
        for parameter, weights in zip(model.parameters(), arrays.weights, strict=True):
            parameter.copy_(torch.from_numpy(weights))
    return model


def train(model: nn.Module, samples: Samples, work: Work) -> None:
    """The client's part: plain SGD in batches, in the order of the samples."""
    if work.epochs == 0:
        return
    x, y = samples
    optimiser = torch.optim.SGD(model.parameters(), lr=work.learning_rate)
    cross_entropy = nn.CrossEntropyLoss()
    model.train()
    for _ in range(work.epochs):
        for start in range(0, len(y), work.batch_size):
            batch = slice(start, start + work.batch_size)
            optimiser.zero_grad()
            loss = cross_entropy(model(x[batch]), y[batch])
            loss.backward()
            optimiser.step()


@torch.no_grad()
def accuracy(model: nn.Module, held_out: Samples) -> float:
    """The share of held-out samples the model is right about."""
    x, y = held_out
    model.eval()
    return float((model(x).argmax(1) == y).float().mean())


def _dense(task: Task) -> nn.Module:
    if task == "linear":
        return nn.Sequential(nn.Linear(64, 10))
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
