"""The one training loop: devices, hub and simulation all call `train_locally`.

Plain SGD on weights that lie in one flat vector, so an update of all of them is three
operations, whatever the number of tensors. What is minimised is the method's (`losses`).
The order of batches is a function of the plan's seed and the epoch alone, and a checkpoint
holds all state: a run resumed at any batch gives the same bits as one left undisturbed. Torch
is imported when there is something to train.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from federation.errors import TrainingError
from federation.learning.checkpoint import Checkpoint, Progress
from federation.learning.data import LocalData
from federation.learning.layers import method_part, model_part, sample_part
from federation.learning.methods import method_named
from federation.learning.plans import out_of_range
from federation.learning.samples import check_taught
from federation.learning.submodel import local_weights, own_weights, starting_weights
from federation.protocol.codec import Weights
from federation.protocol.messages import LocalPlan, Report

if TYPE_CHECKING:
    import torch

    from federation.learning.losses.objective import Leavings, Objective


class StoppedError(TrainingError):
    """Training was asked to stop, and did so between two batches."""


@dataclass(frozen=True, slots=True)
class LocalResult:
    """The trained weights of the local model, what training them took, and what it leaves.

    `state` answers the hub's tensors beside the model; `memory` is for this device's next
    training in the same run.
    """

    weights: Weights
    report: Report
    state: Weights = field(default_factory=dict)
    memory: Weights = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Supervision:
    """Who watches a training: called between batches, on the thread that trains.

    `on_step` gets the steps done and the steps in all. `save` gets a checkpoint at most
    every `save_every_s` seconds. `clock` gives seconds; it decides what is reported and
    when is saved, and never the weights. `threads` is how many cores torch may use; another
    number may round sums differently, so what must agree bit for bit keeps to one.
    """

    on_step: Callable[[int, int], None] | None = None
    should_stop: Callable[[], bool] | None = None
    save: Callable[[Checkpoint], None] | None = None
    save_every_s: float = 5.0
    clock: Callable[[], float] = time.monotonic
    threads: int = 1


UNWATCHED = Supervision()


def train_locally(
    weights: Weights,
    data: LocalData,
    plan: LocalPlan,
    *,
    memory: Weights | None = None,
    supervision: Supervision = UNWATCHED,
    resume: Checkpoint | None = None,
) -> LocalResult:
    """Train the plan's model, from these weights, on local data.

    In the report, `samples` counts the local samples; `loss_sum` and `correct` are means
    over all samples seen, each before its step, times `samples`: as if over one epoch.

    Args:
        weights: the base, and the tensors that travel beside it; they are not changed.
        data: local samples, labels from 0.
        plan: how to train. With no epochs the base comes back as it is.
        memory: what this device kept of its last training in the same run.
        supervision: who is told of progress, may stop the training, and keeps checkpoints.
        resume: a checkpoint of a training with the same weights, data, plan and memory.

    Raises:
        StoppedError: `should_stop` said so.
        TrainingError: no data, samples or labels that do not fit the model, a plan out of
            range, or a loss that is not finite.
        ConfigError: a model or method that does not exist, or numbers it does not know.
    """
    total, kept = total_steps(plan, data.samples), memory or {}
    if plan.epochs == 0:
        return _echo(weights, data, kept)
    from federation.learning.models import check_samples

    check_samples(plan.model, data)
    check_taught(weights, data)
    with torch_threads(supervision.threads):
        run = _Run(weights, data, plan, kept, resume)
        progress = _loop(run, total, supervision)
        trained, left = run.weights(), run.finish(progress)
    check_finite({**trained, **left.state})
    scale = data.samples / progress.seen
    report = Report(
        samples=data.samples,
        steps=progress.steps,
        loss_sum=progress.loss_sum * scale,
        correct=round(progress.correct * scale),
        seconds=progress.seconds,
    )
    own = own_weights(trained, weights)
    return LocalResult(trained, report, left.state, {**own, **left.memory})


def _echo(weights: Weights, data: LocalData, memory: Weights) -> LocalResult:
    """The base as it came: no step was asked for, so there is nothing new to say of it."""
    silent = {name: np.zeros_like(tensor) for name, tensor in method_part(weights).items()}
    return LocalResult(model_part(weights), Report(samples=data.samples), silent, memory)


def total_steps(plan: LocalPlan, samples: int) -> int:
    """How many batches the plan comes to with this many samples.

    Raises:
        TrainingError: a plan whose numbers are out of range.
    """
    _check_plan(plan)
    return count_steps(plan, samples)


def count_steps(plan: LocalPlan, samples: int) -> int:
    """As `total_steps`, of a plan that was checked."""
    steps = plan.epochs * math.ceil(samples / plan.batch_size)
    return min(steps, plan.max_steps) if plan.max_steps else steps


def batches(plan: LocalPlan, samples: int, start: int = 0) -> Iterator[NDArray[np.int64]]:
    """The samples of each batch, beginning with batch `start`; the order is new each epoch.

    A function of the plan's seed and the epoch: no state is carried from batch to batch.
    """
    total, each = total_steps(plan, samples), math.ceil(samples / plan.batch_size)
    order = np.empty(0, np.int64)
    for step in range(start, total):
        epoch, place = divmod(step, each)
        if place == 0 or step == start:
            order = np.random.default_rng([plan.seed % 2**64, epoch]).permutation(samples)
        yield order[place * plan.batch_size : (place + 1) * plan.batch_size]


class _Run:
    """A model in training: its weights, gradient and velocity, each one flat vector."""

    def __init__(
        self,
        weights: Weights,
        data: LocalData,
        plan: LocalPlan,
        memory: Weights,
        resume: Checkpoint | None,
    ) -> None:
        import torch

        from federation.learning.models import (
            build_model,
            forward_pass,
            initial_weights,
            load_weights,
        )

        self.plan, self.data = plan, data
        self.model = build_model(plan.model)
        shapes = {name: tuple(t.shape) for name, t in self.model.state_dict().items()}
        draw = partial(initial_weights, plan.model, plan.seed)
        base = local_weights(shapes, model_part(weights), memory, plan.layers, draw)
        load_weights(self.model, base)
        self.base = _flatten(self.model)
        self.objective = _objective(self.model, self.base, data, plan, weights, memory)
        self.is_taught = bool(sample_part(weights))
        start = starting_weights(base, memory) if resume is None else resume.weights
        load_weights(self.model, start)
        self.flat = _flatten(self.model)
        self.gradient = torch.zeros_like(self.flat)
        self.velocity = torch.zeros_like(self.flat)
        if resume is not None:
            _check_velocity(resume, self.base.numel())
            self.velocity.copy_(torch.tensor(resume.velocity))
        _view_parameters(self.model, self.flat, self.gradient)
        self.progress = resume.progress if resume is not None else Progress()
        self._forward = forward_pass(self.model)
        # Batches are copied into memory of torch's own, since the bits of a matrix product
        # can depend on how its operands are aligned.
        size = min(plan.batch_size, data.samples)
        self._x = torch.empty((size, *data.x.shape[1:]))
        self._y = torch.empty(size, dtype=torch.int64)

    def step(self, indices: NDArray[np.int64]) -> tuple[float, int]:
        """One step of SGD on these samples: the loss before it, and how many were right."""
        import torch

        from federation.learning.losses.objective import Pass

        x, labels = self._x[: len(indices)], self._y[: len(indices)]
        # With mode "raise" NumPy would go through a buffer; these indices are in range.
        np.take(self.data.x, indices, axis=0, out=x.numpy(), mode="clip")
        np.take(self.data.y, indices, out=labels.numpy(), mode="clip")
        features, logits, exits = self._forward(x)
        places = torch.from_numpy(indices) if self.is_taught else None
        loss = self.objective.output(Pass(x, labels, features, logits, exits, indices=places))
        self.gradient.zero_()
        loss.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            value = loss.item()
            for term in self.objective.on_weights:
                value += float(term(self.flat, self.base, self.gradient))
            if self.plan.weight_decay:
                self.gradient.add_(self.flat, alpha=self.plan.weight_decay)
            for window in self.objective.resting:
                self.gradient[window] = 0.0
            self.velocity.mul_(self.plan.momentum).add_(self.gradient)
            self.flat.add_(self.velocity, alpha=-self.plan.learning_rate)
            return value, int((logits.argmax(1) == labels).sum().item())

    def finish(self, progress: Progress) -> "Leavings":
        """What the method leaves beside the weights, now that the training is over."""
        import torch

        from federation.learning.losses.objective import Ending, Leavings

        if self.objective.finish is None:
            return Leavings()
        labels = torch.tensor(self.data.y)
        with torch.no_grad():
            ending = Ending(self.flat, progress.steps, self._features, labels)
            return self.objective.finish(ending)

    def _features(self, batch: int = 256) -> "torch.Tensor":
        import torch

        x = self.data.x
        starts = range(0, len(x), batch)
        return torch.cat([self._forward(torch.tensor(x[i : i + batch]))[0] for i in starts])

    def weights(self) -> Weights:
        """A copy of the weights as they are."""
        return {name: t.numpy().copy() for name, t in self.model.state_dict().items()}

    def checkpoint(self, progress: Progress) -> Checkpoint:
        """All state, copied."""
        return Checkpoint(self.weights(), self.velocity.numpy().copy(), progress)


def _loop(run: _Run, total: int, watch: Supervision) -> Progress:
    progress, samples = run.progress, run.data.samples
    began = saved = watch.clock()
    spent_before = progress.seconds
    for indices in batches(run.plan, samples, progress.steps):
        if watch.should_stop is not None and watch.should_stop():
            raise StoppedError(
                f"training stopped after {progress.steps} of {total} steps, as asked"
            )
        loss, correct = run.step(indices)
        check_loss(loss, progress.steps + 1, total)
        now = watch.clock()
        progress = Progress(
            steps=progress.steps + 1,
            seen=progress.seen + len(indices),
            loss_sum=progress.loss_sum + loss * len(indices),
            correct=progress.correct + correct,
            seconds=spent_before + now - began,
        )
        if watch.save is not None and progress.steps < total and now - saved >= watch.save_every_s:
            watch.save(run.checkpoint(progress))
            saved = now
        if watch.on_step is not None:
            watch.on_step(progress.steps, total)
    return progress


def check_loss(loss: float, step: int, total: int) -> None:
    """Refuse to go on from a loss that is no number.

    Raises:
        TrainingError: it is NaN or infinite.
    """
    if not math.isfinite(loss):
        raise TrainingError(
            f"the loss is {loss} at step {step} of {total}; expected a finite "
            "number: lower the learning rate or look for outliers in the data"
        )


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Let torch use this many cores, and afterwards as many as before."""
    import torch

    before = torch.get_num_threads()
    if threads != before:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        if threads != before:
            torch.set_num_threads(before)


def _objective(
    model: "torch.nn.Module",
    base: "torch.Tensor",
    data: LocalData,
    plan: LocalPlan,
    weights: Weights,
    memory: Weights,
) -> "Objective":
    import torch

    from federation.learning.losses import OBJECTIVES
    from federation.learning.losses.objective import Scene
    from federation.learning.models import sizes_of

    method = method_named(plan.method)
    counts = np.bincount(data.y, minlength=sizes_of(plan.model)["classes"])
    scene = Scene(
        plan=plan,
        params=method.settings(plan.params),
        counts=torch.tensor(counts, dtype=torch.float32),
        model=model,
        base=base,
        state={name: torch.tensor(value) for name, value in method_part(weights).items()},
        memory={name: torch.tensor(value) for name, value in memory.items()},
        taught={name: torch.tensor(value) for name, value in sample_part(weights).items()},
    )
    return OBJECTIVES[method.loss](scene)


def _flatten(model: "torch.nn.Module") -> "torch.Tensor":
    import torch

    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def _view_parameters(
    model: "torch.nn.Module", flat: "torch.Tensor", gradient: "torch.Tensor"
) -> None:
    """Make each parameter and its gradient a window on these vectors."""
    start = 0
    for parameter in model.parameters():
        window = slice(start, start + parameter.numel())
        parameter.data = flat[window].view_as(parameter)
        parameter.grad = gradient[window].view_as(parameter)
        start = window.stop


def _check_plan(plan: LocalPlan) -> None:
    if wrong := out_of_range(plan):
        name, _ = wrong
        raise TrainingError(
            f"the plan has {name} = {getattr(plan, name)}, which is out of range: correct the plan"
        )


def _check_velocity(resume: Checkpoint, parameters: int) -> None:
    if resume.velocity.shape != (parameters,):
        raise TrainingError(
            f"the checkpoint's velocity has shape {resume.velocity.shape}; the model has "
            f"{parameters} parameters: start over without it"
        )


def check_finite(weights: Weights) -> None:
    """Refuse what is no answer.

    Raises:
        TrainingError: a tensor with NaN or infinity.
    """
    for name, tensor in weights.items():
        if not np.isfinite(tensor).all():
            raise TrainingError(
                f"tensor {name!r} is no longer finite after training; expected finite numbers: "
                "lower the learning rate or look for outliers in the data"
            )
