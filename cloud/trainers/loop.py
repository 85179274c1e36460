"""The hub's one training loop: batches, gradients, steps, checkpoints, on any number of ranks.

Which samples a step sees is a function of the seed and the step alone; a rank takes its share of
each batch. So a training goes on from a checkpoint at the batch, also on another number of
processes, with the losses it would have had (to rounding, where the number changes).
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from cloud.trainers.checkpoints import Checkpoints
from cloud.trainers.plans import OptimizerPlan, TrainPlan
from cloud.trainers.task import Task, drawn
from federation.errors import TrainingError

COMPUTE = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Place:
    """Which share of every batch this process takes: number `rank` of `ranks`.

    Processes of one share train shards of one model. One process of all `leads`: it writes.
    """

    rank: int = 0
    ranks: int = 1
    group: dist.ProcessGroup | None = None
    leads: bool = True

    def wait(self) -> None:
        """Until all ranks have come here; at once where there is one."""
        if self.group is not None:
            dist.barrier()


ALONE = Place()


@dataclass(frozen=True, slots=True)
class Step:
    """What one step was: its number from 1, the mean loss over its batch, and its rate."""

    number: int
    of: int
    loss: float
    learning_rate: float
    seconds: float


class Watcher(Protocol):
    """Is told of each step after it; what it returns is not looked at."""

    def __call__(self, step: Step) -> object:
        """One step is done."""
        ...


class Technique(Protocol):
    """Passes forward in place of the task, is told of each step, and has state to be kept."""

    def forward(self, x: Tensor, places: NDArray[np.int64]) -> tuple[Tensor, Tensor | None]:
        """As the task's, of the samples at these places."""
        ...

    def after(self, step: Step) -> None:
        """One step is done, on every rank."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it, by names no other has."""
        ...

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from there."""
        ...

    def close(self) -> None:
        """The training is over."""
        ...


class Plain:
    """No technique: the task's own pass, and no state."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def forward(self, x: Tensor, _: NDArray[np.int64]) -> tuple[Tensor, Tensor | None]:
        """The task's."""
        return self._task.forward(x)

    def after(self, step: Step) -> None:
        """Nothing changes."""

    def tensors(self) -> dict[str, Tensor]:
        """None."""
        return {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Nothing to go on from."""

    def close(self) -> None:
        """Nothing to close."""


def steps_each_epoch(plan: TrainPlan, samples: int) -> int:
    """How many whole batches an epoch has; what is left over waits for the next order.

    Raises:
        TrainingError: fewer samples than a batch.
    """
    if samples < plan.batch_size:
        raise TrainingError(
            f"there are {samples} samples and batch_size is {plan.batch_size}; expected one batch "
            "or more: lower batch_size"
        )
    return samples // plan.batch_size


def places_of(plan: TrainPlan, samples: int, step: int, place: Place) -> NDArray[np.int64]:
    """The samples this rank sees in step `step` (from 0)."""
    each = steps_each_epoch(plan, samples)
    epoch, number = divmod(step, each)
    order = np.random.default_rng([plan.seed % 2**64, epoch]).permutation(samples)
    batch = order[number * plan.batch_size : (number + 1) * plan.batch_size]
    return np.array_split(batch, place.ranks)[place.rank]


def learning_rate(plan: OptimizerPlan, step: int, steps: int) -> float:
    """The rate of step `step` (from 0) of `steps`."""
    if step < plan.warmup:
        return plan.learning_rate * (step + 1) / plan.warmup
    done = step / max(1, steps)
    match plan.schedule:
        case "constant":
            return plan.learning_rate
        case "cosine":
            return plan.learning_rate * 0.5 * (1.0 + math.cos(math.pi * done))
        case "steps":
            passed = sum(done >= milestone for milestone in plan.milestones)
            return plan.learning_rate / plan.factor**passed


class State(Protocol):
    """What training keeps of a model: whole, sparse, or this rank's shards."""

    reduced_bytes: int

    def step(self, learning_rate: float) -> None:
        """Reduce gradients over ranks, step, and give the model its new parameters."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """The parameters of the whole model, float32; all ranks call this together."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint keeps; all ranks call this together."""
        ...

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` gave."""
        ...

    def sizes(self) -> dict[str, int]:
        """The bytes of each kind of state on this rank."""
        ...


class Trainer:
    """Trains one task on this rank; a step at a time, or to the end.

    A technique may be put in place of the plain one before the first step.

    Args:
        plan: how; its optimizer's rate is set for every step.
        task: what; its model is trained in place.
        state: the model's state, built from the same model.
        place: this rank's share of each batch.
        checkpoints: where state is kept, and found again (None: nowhere). All ranks read, and
            rank 0 writes, so that a disk they share is written once.
        watchers: told of each step.
        clock: gives seconds; decides nothing but what is reported.
    """

    def __init__(
        self,
        plan: TrainPlan,
        task: Task,
        state: State,
        *,
        place: Place = ALONE,
        checkpoints: Checkpoints | None = None,
        watchers: Sequence[Watcher] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.plan, self.task, self.state, self.place = plan, task, state, place
        self.steps = plan.epochs * steps_each_epoch(plan, len(task.train))
        self.done = 0
        self.technique: Technique = Plain(task)
        self._checkpoints, self._watchers, self._clock = checkpoints, tuple(watchers), clock
        self._compute = COMPUTE[plan.precision]
        self.spent_s = 0.0

    def resume(self) -> int:
        """Go on from the newest checkpoint, if there is one; the steps that are done.

        Raises:
            StoreError: the checkpoint is of another plan.
            TrainingError: it is of another model.
        """
        moment = self._checkpoints.newest() if self._checkpoints is not None else None
        if moment is not None:
            self.state.load(moment.tensors)
            self.technique.load(moment.tensors)
            self.done, self.spent_s = moment.facts.step, moment.facts.seconds
        return self.done

    def run(self, until: int | None = None) -> None:
        """Train up to step `until` (None: to the end).

        Raises:
            TrainingError: a loss that is not finite.
            StoreError: a checkpoint that could not be written.
        """
        stop = self.steps if until is None else min(until, self.steps)
        self.task.model.train()
        while self.done < stop:
            self._step()
            if self.done % self.plan.checkpoint.every_steps == 0 and self.done < self.steps:
                self._keep()

    def close(self) -> None:
        """Let go of what the technique holds beside the training."""
        self.technique.close()

    def _step(self) -> None:
        began = self._clock()
        places = places_of(self.plan, len(self.task.train), self.done, self.place)
        rate = learning_rate(self.plan.optimizer, self.done, self.steps)
        loss = sum(
            self._backward(part, len(part) / len(places))
            for part in np.array_split(places, self.plan.accumulate)
            if len(part)
        )
        loss = self._mean(loss)
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss} at step {self.done + 1} of {self.steps}; expected a finite "
                "number: lower optimizer.learning_rate, or use precision float32"
            )
        self.state.step(rate)
        self.done += 1
        spent = self._clock() - began
        self.spent_s += spent
        step = Step(self.done, self.steps, loss, rate, spent)
        self.technique.after(step)
        for watch in self._watchers:
            watch(step)

    def _backward(self, places: NDArray[np.int64], weight: float) -> float:
        """Add the gradient of these samples, as a share of this rank's batch; their loss so."""
        x, y = drawn(self.task, self.task.train, places, self._compute)
        outputs, penalty = self.technique.forward(x, places)
        loss = self.task.loss(outputs.float(), y)
        loss = (loss if penalty is None else loss + penalty) * weight
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    def _mean(self, loss: float) -> float:
        """The mean over ranks: all of them stop at the same step, or none."""
        if self.place.group is None:
            return loss
        device = next(self.task.model.parameters()).device
        total = torch.tensor(loss, dtype=torch.float64, device=device)
        dist.all_reduce(total, group=self.place.group)
        return float(total) / self.place.ranks

    def _keep(self) -> None:
        if self._checkpoints is None:
            return
        tensors = self.state.tensors()  # Shards come together: all ranks take part.
        if self.place.leads:
            self._checkpoints.save(self.done, tensors, seconds=self.spent_s)
        self.place.wait()
