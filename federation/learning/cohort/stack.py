"""Members of a group in training side by side: one row of one matrix each."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from federation.errors import TrainingError
from federation.learning.cohort.feed import Batch, Feed
from federation.learning.cohort.network import bind, count_activations, side_by_side
from federation.learning.cohort.scene import all_features, all_labels, part_of, scene_of
from federation.learning.cohort.tally import Tally
from federation.learning.cohort.task import Member
from federation.learning.layers import model_part
from federation.learning.losses import OBJECTIVES
from federation.learning.losses.objective import Ending, Leavings, Objective, Pass, Scene
from federation.learning.methods import method_named
from federation.learning.models import forward_pass, initial_weights, input_shape
from federation.learning.submodel import LEARNED, local_weights, own_weights, starting_weights
from federation.learning.training import LocalResult, check_finite
from federation.protocol.codec import Weights
from federation.protocol.messages import LocalPlan, ModelSpec, Report


class Stack:
    """So many models of one kind that train side by side, and the memory that takes.

    It serves group after group, whatever their plans, as long as their model is this one.
    """

    def __init__(self, spec: ModelSpec, device: torch.device) -> None:
        self._model, self._device = side_by_side(spec), device
        self._shapes = {name: tuple(p.shape) for name, p in self._model.named_parameters()}
        ends = list(accumulate(math.prod(shape) for shape in self._shapes.values()))
        self._windows = [slice(*ends) for ends in zip([0, *ends], ends, strict=False)]
        self._forward = forward_pass(self._model)
        self._parameters: list[Tensor] = list(self._model.parameters())
        self._gradient = torch.empty((0, ends[-1]), device=device)
        self._velocity = torch.empty_like(self._gradient)
        self._feed = Feed(device)
        fresh = torch.zeros((1, ends[-1]))
        bind(self._model, self._shapes.values(), self._windows, fresh)
        self._activations = count_activations(self._model, math.prod(input_shape(spec)))

    def rows_within(self, size_bytes: int, batch: int) -> int:
        """How many models fit in so much memory, training with batches of this size.

        A model has weights, base, gradient and velocity; of what passes through it there are
        about three: what came, its gradient, and what a module keeps.
        """
        each = 4 * self._gradient.shape[1] + 3 * batch * self._activations
        return max(1, size_bytes // (4 * each))

    def train(
        self, members: Sequence[Member], clock: Callable[[], float]
    ) -> list[LocalResult | TrainingError]:
        """What each of these members comes to; they are alike, those with the most steps first.

        Raises:
            TrainingError: none of them can be trained like this.
            ConfigError: likewise.
        """
        began = clock()
        base, flat = self._beginning(members)
        scene = scene_of(members, self._model, base)
        tally = Tally(members)
        self._feed.open(members)
        self._make_room(len(members), members[0].task.plan)
        left: list[Leavings] = []
        done, active = 0, len(members)
        while active:
            last = members[active - 1].steps
            objective = self._advance(scene, flat[:active], last - done, tally)
            staying = sum(member.steps > last for member in members)
            if objective.finish is None:
                left[:0] = [Leavings()] * (active - staying)
            else:
                left[:0] = self._leavings(scene, flat, members, slice(staying, active))
            done, active = last, staying
        reports = tally.reports(clock() - began)
        trained = flat.cpu().numpy()
        is_finite: list[bool] = np.isfinite(trained.sum(1)).tolist()
        finished = zip(members, trained, left, reports, is_finite, strict=True)
        return [self._result(*each) for each in finished]

    def _make_room(self, rows: int, plan: LocalPlan) -> None:
        if len(self._gradient) < rows:
            self._gradient = self._gradient.new_empty((rows, self._gradient.shape[1]))
        if plan.momentum:
            if len(self._velocity) < rows:
                self._velocity = torch.empty_like(self._gradient)
            self._velocity[:rows].zero_()

    def _beginning(self, members: Sequence[Member]) -> tuple[Tensor, Tensor]:
        """The bases (K, P), and the weights from which training begins, on the device."""
        known: dict[object, NDArray[np.float32]] = {}
        bases, starts = [], {}
        for row, member in enumerate(members):
            task = member.task
            origin = object() if task.memory else (id(task.weights), task.plan.layers)
            if origin not in known:
                draw = partial(initial_weights, task.plan.model, task.plan.seed)
                base = local_weights(
                    self._shapes, model_part(task.weights), task.memory, task.plan.layers, draw
                )
                known[origin] = self._row(base)
                if any(name.startswith(f"{LEARNED}/") for name in task.memory):
                    starts[row] = self._row(starting_weights(base, task.memory))
            bases.append(known[origin])
        if len(known) == 1:
            base_rows = torch.from_numpy(bases[0]).expand(len(members), -1)
        else:
            base_rows = torch.from_numpy(np.stack(bases))
        flat = torch.empty(base_rows.shape, device=self._device).copy_(base_rows)
        for row, start in starts.items():
            flat[row] = torch.from_numpy(start)
        return base_rows, flat

    def _advance(self, scene: Scene, flat: Tensor, steps: int, tally: Tally) -> Objective:
        """Train the members that still have steps to go, as many rows as `flat` has."""
        bind(self._model, self._shapes.values(), self._windows, flat)
        seen = part_of(scene, slice(len(flat)), self._device)
        objective = _objective(seen)
        gradient = self._gradient[: len(flat)]
        self._gradients = [
            gradient[:, window].view_as(parameter)
            for parameter, window in zip(self._parameters, self._windows, strict=True)
        ]
        for batch in self._feed.steps(len(flat), steps):
            tally.add(batch, *self._step(objective, batch, flat, seen))
        return objective

    def _step(
        self, objective: Objective, batch: Batch, flat: Tensor, scene: Scene
    ) -> tuple[Tensor, Tensor]:
        """One step of SGD of each: the losses before it, and how many were right, both (K,)."""
        plan, rows = scene.plan, len(flat)
        gradient, velocity = self._gradient[:rows], self._velocity[:rows]
        features, logits, exits = self._forward(batch.x)
        done = Pass(batch.x, batch.labels, features, logits, exits, batch.shares, batch.indices)
        loss = objective.output(done)
        found = torch.autograd.grad(
            loss.sum(), self._parameters, allow_unused=True, materialize_grads=True
        )
        with torch.no_grad():
            value = loss.detach()
            if not (
                objective.on_weights or objective.resting or plan.weight_decay or plan.momentum
            ):
                # Parameters are windows on `flat`: that is the step, in one pass.
                torch._foreach_add_(self._parameters, found, alpha=-plan.learning_rate)
            else:
                torch._foreach_copy_(self._gradients, found)
                for term in objective.on_weights:
                    value = value + term(flat, scene.base, gradient)
                if plan.weight_decay:
                    gradient.add_(flat, alpha=plan.weight_decay)
                for window in objective.resting:
                    gradient[:, window] = 0.0
                if plan.momentum:
                    gradient = velocity.mul_(plan.momentum).add_(gradient)
                flat.add_(gradient, alpha=-plan.learning_rate)
            right = (logits.argmax(-1) == batch.labels) & (batch.shares > 0.0)
            return value, right.sum(-1)

    def _leavings(
        self, scene: Scene, flat: Tensor, members: Sequence[Member], rows: slice
    ) -> list[Leavings]:
        """What the members of these rows leave; their training is over, after equal steps."""
        weights, ended = flat[rows].cpu(), members[rows]
        bind(self._model, self._shapes.values(), self._windows, weights)
        features = partial(all_features, self._forward, ended)
        ending = Ending(weights, ended[0].steps, features, all_labels(ended))
        finish = _objective(part_of(scene, rows)).finish
        with torch.no_grad():
            left = finish(ending) if finish is not None else Leavings()
        return [
            Leavings(
                {name: tensor[row] for name, tensor in left.state.items()},
                {name: tensor[row] for name, tensor in left.memory.items()},
            )
            for row in range(len(ended))
        ]

    def _result(
        self,
        member: Member,
        row: NDArray[np.float32],
        left: Leavings,
        report: Report | TrainingError,
        is_finite: bool,
    ) -> LocalResult | TrainingError:
        if isinstance(report, TrainingError):
            return report
        trained = {
            name: row[window].reshape(shape)
            for (name, shape), window in zip(self._shapes.items(), self._windows, strict=True)
        }
        try:
            if left.state or not is_finite:
                check_finite({**trained, **left.state})
        except TrainingError as error:
            return error
        own = own_weights(trained, member.task.weights)
        return LocalResult(trained, report, left.state, {**own, **left.memory})

    def _row(self, weights: Weights) -> NDArray[np.float32]:
        return np.concatenate([weights[name].reshape(-1) for name in self._shapes])


def _objective(scene: Scene) -> Objective:
    return OBJECTIVES[method_named(scene.plan.method).loss](scene)
