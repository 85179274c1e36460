"""Trains a cohort: sorts its tasks into groups, and takes each group the quickest way.

The rule, and why. Tasks that agree in model, method and numbers train side by side as one
`Stack`, as many as fit in 256 MB (8 GB on a GPU): a step is then one product for all of them.
All models and methods of the zoo can. Seeds, sizes and numbers of steps may differ: batches are
those of `training.batches`, filled up where they are smaller, and who has done all steps leaves.
What remains goes through `train_locally`, one after another: `exact`, plans without epochs, and
whatever a group refuses, so that each of its tasks says what is wrong with it.

Measured on one thread of an AVX2 machine that was busy with other work (AMD EPYC, torch 2.13),
least of several, in ms of CPU, beside a bare loop (one model, load weights, SGD, copy weights
out). With one row a stack is one model whose weights are swapped:

    10 x 64-64-10, 2 steps of 8          bare  13                side by side   3.3
    100 of these                         bare 101   one row 209  side by side  10
    10 x CNN of 28x28 (114k), 3 of 20    bare 338   one row 259  side by side 226
    10 x CNN of windows (33k), 2 of 32   bare 124   one row 134  side by side  71
    4 x fedlp_cnn 32x32 (85k), 2 of 20   bare 162   one row 177  side by side 148
    10 x 784-1000-10 (795k), 2 of 32     bare  92   one row 100  side by side  93

So more rows are never worse, and there is one row only where one task is all there is. The CNN
takes 1.3 to 1.6 times what its multiplications take in a large matrix product: `benchmarks.cohort`
prints that bound.

Objectives are written for K devices by hand and not through `torch.func`: they add to gradients
in place, and some look at data before they decide what they are.
"""

import time
from collections.abc import Callable, Hashable, Sequence

import torch

from federation.errors import ConfigError, HeadwaterError
from federation.learning.cohort.allocator import keep_freed_memory
from federation.learning.cohort.stack import Stack
from federation.learning.cohort.task import Member, Sorter, Task
from federation.learning.training import LocalResult, Supervision, torch_threads, train_locally

CPU_BYTES, CUDA_BYTES = 1 << 28, 1 << 33
"""What models side by side may take, with all that passes through them."""

MOST_IDLE = 8
"""So many stacks are kept for the next cohort: to build one takes as long as 20 small steps."""

_IDLE: dict[Hashable, Stack] = {}


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
    keep_freed_memory()
    results: dict[int, LocalResult | HeadwaterError] = {}
    sorter, watch = Sorter(), Supervision(clock=clock, threads=threads)
    with torch_threads(threads):
        for place, task in enumerate(tasks):
            if exact or task.plan.epochs == 0:
                results[place] = _alone(task, watch)
                continue
            try:
                sorter.add(place, task)
            except HeadwaterError as error:
                results[place] = error
        for group in sorter.groups():
            for member, result in _train_group(group, device, watch):
                results[member.place] = result
    return [results[place] for place in range(len(tasks))]


def _train_group(
    group: Sequence[Member], device: torch.device, watch: Supervision
) -> list[tuple[Member, LocalResult | HeadwaterError]]:
    spec = group[0].task.plan.model
    key = spec.name, tuple(sorted(spec.sizes.items())), device
    done: list[tuple[Member, LocalResult | HeadwaterError]] = []
    try:
        stack = _IDLE.pop(key, None) or Stack(spec, device)
        size_bytes = CPU_BYTES if device.type == "cpu" else CUDA_BYTES
        rows = stack.rows_within(size_bytes, group[0].task.plan.batch_size)
        for start in range(0, len(group), rows):
            part = group[start : start + rows]
            done += zip(part, stack.train(part, watch.clock), strict=True)
        if len(_IDLE) < MOST_IDLE:
            _IDLE[key] = stack
    except HeadwaterError:
        done += [(member, _alone(member.task, watch)) for member in group[len(done) :]]
    return done


def _alone(task: Task, watch: Supervision) -> LocalResult | HeadwaterError:
    try:
        return train_locally(
            task.weights, task.data, task.plan, memory=task.memory, supervision=watch
        )
    except HeadwaterError as error:
        return error


def _device(accelerator: str) -> torch.device:
    if accelerator == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if accelerator not in {"cpu", "cuda"}:
        raise ConfigError(f'accelerator is {accelerator!r}; expected "auto", "cpu" or "cuda"')
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise ConfigError('accelerator is "cuda", and torch finds none: say "auto" or "cpu"')
    return torch.device(accelerator)
