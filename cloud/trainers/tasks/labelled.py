"""Samples with labels: images and sensor windows, for models of the zoo and for experts."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cloud.config import ModelChoice
from cloud.trainers.plans import DataPlan, TrainPlan
from cloud.trainers.task import Arrays, Samples, Task
from cloud.trainers.tasks.turned import AXES, TurnedWindows
from federation.datasets.cached import DataSet, load
from federation.errors import ConfigError
from federation.learning.models import build_model, initial_weights, load_weights
from moe_serving.layers.gating import Choice, balance_loss
from moe_serving.models.classifier import WindowClassifier
from moe_serving.models.config import ClassifierConfig


def of_the_zoo(plan: TrainPlan, choice: ModelChoice, cache: Path) -> Task:
    """A model of the zoo on a data set with labels.

    Raises:
        ConfigError: clients to hold out that the set does not have.
        DataError: a set that is unknown or was not fetched.
    """
    found = load(plan.data.set, cache=cache)
    train, test = split(found, plan.data)
    model = load_weights(build_model(choice), initial_weights(choice, plan.seed))
    return Task(
        model=model,
        train=Arrays(found.x[train], found.y[train]),
        test=Arrays(found.x[test], found.y[test]),
        forward=lambda x: (model(x), None),
        labels=found.labels,
    )


def of_windows(plan: TrainPlan, config: ClassifierConfig, cache: Path) -> Task:
    """A mixture-of-experts classifier of sensor windows, which it takes as they are measured.

    Raises:
        ConfigError: a set whose windows have another shape, or clients it does not have.
        DataError: a set that is unknown or was not fetched.
    """
    found = load(plan.data.set, cache=cache)
    expected = (config.window_length, config.n_channels)
    if found.x.shape[1:] != expected or len(found.labels) != config.n_classes:
        raise ConfigError(
            f"{found.name} has samples of shape {found.x.shape[1:]} in {len(found.labels)} "
            f"classes; the model takes {expected} in {config.n_classes}: correct [moe]"
        )
    train, test = split(found, plan.data)
    torch.manual_seed(plan.seed)
    model = WindowClassifier(config)

    def forward(x: Tensor) -> tuple[Tensor, Tensor | None]:
        choices: list[Choice] = []
        logits = model(x, choices)
        return logits, plan.balance * sum_of(choices)

    return Task(
        model=model,
        train=_varied(found, train, plan),
        test=Arrays(found.x[test], found.y[test]),
        forward=forward,
        labels=found.labels,
    )


def _varied(found: DataSet, places: NDArray[np.int64], plan: TrainPlan) -> Samples:
    """The windows at these places, in as many turned copies as the plan says."""
    x, y, data = found.x[places], found.y[places], plan.data
    if data.copies == 1 and not data.turn_deg and not data.scale:
        return Arrays(x, y)
    if x.shape[2] % AXES:
        raise ConfigError(
            f"data.turn_deg is {data.turn_deg} and {found.name} has {x.shape[2]} channels; only "
            "sensors of three axes can be turned: leave out data.copies, turn_deg and scale"
        )
    return TurnedWindows(x, y, data.copies, data.turn_deg, data.scale, plan.seed)


def sum_of(choices: list[Choice]) -> Tensor:
    """The balance losses of all expert layers of a pass, added up."""
    return torch.stack([balance_loss(choice) for choice in choices]).sum()


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
