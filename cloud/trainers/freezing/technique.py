"""Freezing as the training loop knows it: passes forward, and freezes between steps."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from cloud.trainers.freezing.activations import Activations
from cloud.trainers.freezing.chain import Chain
from cloud.trainers.freezing.controller import AtOnce, Beside, Controller
from cloud.trainers.freezing.plasticity import Front, Rule
from cloud.trainers.freezing.reference import Question, Reference
from cloud.trainers.freezing.schedules import freeze_out_scale, freeze_out_times, front_at
from cloud.trainers.loop import ALONE, Place, Step, places_of
from cloud.trainers.plans import FreezingPlan, TrainPlan
from cloud.trainers.state import TrainingState
from cloud.trainers.task import Task
from federation.errors import ConfigError
from moe_serving.layers.gating import Choice

_KEPT = "freezing"


@dataclass(frozen=True, slots=True)
class Kept:
    """What a checkpoint keeps: how far the model is frozen, and whether it may be.

    The reference is not kept. After a resume it is fresh, so that a module may freeze some
    readings later than it would have.
    """

    front: Front
    done: int = 0
    is_critical: bool = True
    loss: float = 0.0


class Freezing:
    """Freezes a model's modules from the front, by a rule or by the clock.

    Frozen modules run without gradients, in evaluation mode, and what they say is kept on disk;
    they leave backward, step and all-reduce. They keep their moments, since they may thaw. Rank 0
    takes readings and tells the other ranks how far the model is frozen, every so many steps.

    Args:
        plan: the training's; it has [freezing].
        task: its samples and the model, whose modules in order `chain` is.
        state: the model's, with a bucket for each module of the chain.
        place: this rank's.
        folder: where activations may be kept; it is emptied.
        controller: who is asked for readings (None: as the plan says).
    """

    def __init__(
        self,
        plan: TrainPlan,
        task: Task,
        state: TrainingState,
        chain: Chain,
        *,
        folder: Path,
        place: Place = ALONE,
        controller: Controller | None = None,
    ) -> None:
        if plan.freezing is None:
            raise ConfigError("the plan has no [freezing]; expected it to freeze: give it")
        self._plan, self._how, self._place = plan, plan.freezing, place
        self._task, self._state, self._chain = task, state, chain
        self._steps = plan.epochs * (len(task.train) // plan.batch_size)
        self._times = _times_of(self._how, len(chain.modules))
        self.every = self._how.every or guideline(self._how, len(chain.modules), self._steps)
        self.kept = Kept(Front(len(chain.modules), _rule_of(self._how)))
        self.frozen_at: list[tuple[int, int]] = []
        self._folder, self._cuts = folder, 0
        self._cache: Activations | None = None
        self._losses: list[float] = []
        self._is_due, self._asked, self._since_refresh, self._ignored = False, 0, 0, 0
        if place.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        place.wait()
        self._controller = controller if controller is not None else self._make_controller()
        self._scale_rates(0)

    def _make_controller(self) -> Controller | None:
        if self._times or self._place.rank > 0:
            return None
        answer = Reference(self._task.model, self._chain, self._how.reference).answer
        return Beside(answer) if self._how.is_asynchronous else AtOnce(answer)

    @property
    def front(self) -> int:
        """How many modules are frozen."""
        return self.kept.front.front

    def forward(self, x: Tensor, places: NDArray[np.int64]) -> tuple[Tensor, Tensor | None]:
        """The task's outputs; frozen modules give theirs from the disk if they can."""
        x = self._prefix(x, places)
        choices: list[Choice] = []
        begun, said = x, []
        for number in range(self.front, len(self._chain.modules)):
            x = self._chain.modules[number].run(self._task.model, x, choices)
            if self._is_due and number in self.kept.front.watched:
                said.append(x.detach()[: self._how.samples])
        if self._is_due and len(places) >= 2:
            self._ask(begun.detach()[: self._how.samples], said)
        return self._chain.finish(x, choices, self._plan.balance)

    def _prefix(self, x: Tensor, places: NDArray[np.int64]) -> Tensor:
        if self.front == 0:
            return x
        known = self._cache.take(places) if self._cache is not None else None
        if known is not None:
            return known.to(x.device)
        with torch.no_grad():
            for module in self._chain.modules[: self.front]:
                for path in module.paths:
                    self._task.model.get_submodule(path).eval()
                x = module.run(self._task.model, x, [])
        if self._cache is not None:
            self._cache.put(places, x)
        return x

    def _ask(self, x: Tensor, said: list[Tensor]) -> None:
        """Have the reference compared; every window of questions it becomes what we are now."""
        if self._controller is None or not said:
            return
        self._is_due = False
        is_refresh = self._since_refresh == 0
        modules = self.kept.front.watched
        weights = None
        if is_refresh:
            names = (name for m in modules for name in self._chain.modules[m].parameters)
            weights = {name: self._state.parameters[name].detach().clone() for name in names}
        self._asked += 1
        if self._controller.ask(Question(self._asked, modules, x, said, weights)):
            self._since_refresh = (self._since_refresh + 1) % self.kept.front.rule.window

    def after(self, step: Step) -> None:
        """Freeze or thaw as the rule, or the clock, now says."""
        self._losses.append(step.loss)
        front = self.kept.front
        if self._times:
            front = replace(front, front=front_at(self._times, step.number / self._steps))
        elif step.number % self.every == 0:
            front = self._judged(step)
            self._is_due = self._controller is not None
        if self._plan.optimizer.schedule == "steps" and not self._times:
            front = front.thawed(step.learning_rate, self._how.unfreeze)
        self._move(front, step.number)
        self._scale_rates(step.number)
        self._prefetch(step.number)

    def _judged(self, step: Step) -> Front:
        """The front after the readings that have come in; the same on every rank."""
        loss, front = float(np.mean(self._losses)), self.kept.front
        self._losses.clear()
        was, kept = self.kept.loss, self.kept
        settles = was > 0 and abs(was - loss) <= self._how.critical * was
        self.kept = replace(kept, loss=loss, is_critical=kept.is_critical and not settles)
        is_critical, is_settled = self.kept.is_critical, front.rule.mode == "settled"
        at_most = front.modules - 1
        if is_settled:
            floors = freeze_out_times(front.modules, front.rule.first)
            at_most = front_at(floors, step.number / self._steps)
        for answer in self._controller.answers() if self._controller is not None else ():
            if (
                answer.asked > self._ignored
                and answer.modules == front.watched
                and (is_settled or not is_critical)
            ):
                front = front.after(
                    answer.readings,
                    step.learning_rate,
                    at_most=front.front if is_critical else at_most,
                )
        if self._place.group is None:
            return front
        device = self._state.buckets[0].master.device
        told = torch.tensor([front.front, front.frozen_at], dtype=torch.float64, device=device)
        dist.broadcast(told, src=0, group=self._place.group)
        return replace(front, front=int(told[0]), frozen_at=float(told[1]))

    def _move(self, front: Front, step: int) -> None:
        """Make the state, and the cache, fit this front."""
        was = self.front
        self.kept = replace(self.kept, front=front, done=step)
        if front.front == was:
            return
        for module in range(min(was, front.front), max(was, front.front)):
            if module < front.front:
                self._state.freeze(module)
            else:
                self._thaw(module)
        self.frozen_at.append((step, front.front))
        if front.rule.mode != "settled" or front.front < was:
            # The reference knows the module that is in front now as it was long ago.
            self._since_refresh, self._ignored = 0, self._asked + 1
        self._cut()

    def _thaw(self, module: int) -> None:
        self._state.unfreeze(module)
        for path in self._chain.modules[module].paths:
            self._task.model.get_submodule(path).train()

    def _cut(self) -> None:
        """Forget the activations at the old cut, and begin to keep those at the new one."""
        if self._cache is not None:
            self._cache.close()
        self._cuts += 1
        self._cache = None
        if self.front and self._how.cache_mb:
            path = self._folder / f"cut-{self._cuts}.activations"
            size_bytes = self._how.cache_mb * 10**6
            self._cache = Activations(path, len(self._task.train), size_bytes)

    def _prefetch(self, step: int) -> None:
        if self._cache is not None and step < self._steps:
            places = places_of(self._plan, len(self._task.train), step, self._place)
            for part in np.array_split(places, self._plan.accumulate):
                self._cache.prefetch(part)

    def _scale_rates(self, step: int) -> None:
        if self._how.rule != "freeze-out" or step >= self._steps:
            return
        for bucket, end in zip(self._state.buckets, (*self._times, 1.0), strict=True):
            bucket.rate_scale = freeze_out_scale(self._plan.optimizer, end, step, self._steps)

    def tensors(self) -> dict[str, Tensor]:
        """How far it is frozen, and the readings so far."""
        return {
            _KEPT: torch.frombuffer(bytearray(msgspec.json.encode(self.kept)), dtype=torch.uint8)
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Freeze what was frozen."""
        kept = msgspec.json.decode(tensors[_KEPT].numpy().tobytes(), type=Kept)
        self.kept = replace(kept, front=self.kept.front)
        self._move(kept.front, kept.done)
        self._scale_rates(kept.done)

    def close(self) -> None:
        """No more readings; the activations go."""
        if self._controller is not None:
            self._controller.close()
        if self._cache is not None:
            self._cache.close()
            self._cache = None


def guideline(how: FreezingPlan, modules: int, steps: int) -> int:
    """Steps between readings: Egeria's n = I / (2 W) / modules / 1.75 (section 5.1).

    Under the rule `settled`, which reads all modules together, ten windows of the training.
    """
    windows = 10.0 if how.rule == "settled" else 2 * modules * 1.75
    return max(1, round(steps / (windows * how.window)))


def _times_of(how: FreezingPlan, modules: int) -> tuple[float, ...]:
    if how.rule == "freeze-out":
        return freeze_out_times(modules, how.first)
    if len(how.times) >= modules:
        raise ConfigError(
            f"freezing.times has {len(how.times)} times and the model {modules} modules, whose "
            f"last never freezes; expected {modules - 1} or fewer: leave some out"
        )
    return how.times


def _rule_of(how: FreezingPlan) -> Rule:
    match how.rule:
        case "settled" | "signed" | "absolute":
            return Rule(how.rule, how.window, how.tolerance, how.share, how.patience, how.first)
        case "times" | "freeze-out":
            return Rule(window=how.window)
