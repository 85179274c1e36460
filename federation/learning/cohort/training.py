"""Trains a cohort: sorts its tasks into groups, and takes each group the quickest way."""

import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from federation.errors import ConfigError, HeadwaterError
from federation.learning.cohort.stack import Stack
from federation.learning.cohort.task import Member, Task, groups_of, see_through
from federation.learning.models import build_model
from federation.learning.training import LocalResult, Supervision, torch_threads, train_locally
from federation.protocol.messages import ModelSpec

STACK_BYTES = 1 << 26
"""What the weights, gradients and bases of models side by side may take on a CPU."""


def train_cohort(
    tasks: Sequence[Task],
    *,
    exact: bool = False,
    accelerator: str = "auto",
    threads: int = 1,
    clock: Callable[[], float] = time.monotonic,
) -> list[LocalResult | HeadwaterError]:
    """What `train_locally` gives for each of these tasks, to 1e-5 or to the bit.

    Tasks of any model, plan and size may come mixed. One that cannot be trained gives its error
    in its place, and the others never notice.

    Args:
        tasks: what to train.
        exact: give the very bits of `train_locally`, which takes as long as calling it.
        accelerator: "cpu", "cuda", or "auto": CUDA where torch finds it.
        threads: how many cores torch may use.
        clock: gives seconds, for the reports.

    Raises:
        ConfigError: an accelerator that is not there.
    """
    device = _device(accelerator)
    results: dict[int, LocalResult | HeadwaterError] = {}
    with torch_threads(threads):
        watch = Supervision(clock=clock, threads=threads)
        members: list[Member] = []
        for place, task in enumerate(tasks):
            if exact or task.plan.epochs == 0:
                results[place] = _alone(task, watch)
                continue
            try:
                members.append(see_through(place, task))
            except HeadwaterError as error:
                results[place] = error
        for group in groups_of(members):
            for member, result in _train_group(group, device, watch):
                results[member.place] = result
    return [results[place] for place in range(len(tasks))]


def _train_group(
    group: Sequence[Member], device: torch.device, watch: Supervision
) -> Iterator[tuple[Member, LocalResult | HeadwaterError]]:
    spec = group[0].task.plan.model
    rows = min(len(group), _rows(spec, device))
    try:
        stack = Stack(spec, rows, device)
        for start in range(0, len(group), rows):
            part = group[start : start + rows]
            yield from zip(part, stack.train(part, watch.clock), strict=True)
    except HeadwaterError:
        for member in group:
            yield member, _alone(member.task, watch)


def _alone(task: Task, watch: Supervision) -> LocalResult | HeadwaterError:
    try:
        return train_locally(
            task.weights, task.data, task.plan, memory=task.memory, supervision=watch
        )
    except HeadwaterError as error:
        return error


def _rows(spec: ModelSpec, device: torch.device) -> int:
    model = build_model(spec)
    if device.type == "cpu" and any(
        isinstance(module, (nn.Conv1d, nn.Conv2d)) for module in model.modules()
    ):
        return 1
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return max(1, STACK_BYTES // (16 * parameters))


def _device(accelerator: str) -> torch.device:
    if accelerator == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if accelerator not in {"cpu", "cuda"}:
        raise ConfigError(f'accelerator is {accelerator!r}; expected "auto", "cpu" or "cuda"')
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise ConfigError('accelerator is "cuda", and torch finds none: say "auto" or "cpu"')
    return torch.device(accelerator)
