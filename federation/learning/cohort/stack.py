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
from federation.learning.cohort.network import bind, side_by_side
from federation.learning.cohort.scene import all_features, all_labels, part_of, scene_of
from federation.learning.cohort.tally import Tally
from federation.learning.cohort.task import Member
from federation.learning.layers import model_part
from federation.learning.losses import OBJECTIVES
from federation.learning.losses.objective import Ending, Leavings, Objective, Pass, Scene
from federation.learning.methods import method_named
from federation.learning.models import forward_pass, initial_weights
from federation.learning.submodel import LEARNED, local_weights, own_weights, starting_weights
from federation.learning.training import LocalResult, check_finite
from federation.protocol.codec import Weights
from federation.protocol.messages import ModelSpec, Report


class Stack:
    """So many models of one kind that train side by side, and the memory that takes.

    It serves group after group, whatever their plans, as long as their model is this one.
    """

    def __init__(self, spec: ModelSpec, rows: int, device: torch.device) -> None:
        self._model, self._device = side_by_side(spec), device
        self._shapes = {name: tuple(p.shape) for name, p in self._model.named_parameters()}
        ends = list(accumulate(math.prod(shape) for shape in self._shapes.values()))
        self._windows = [slice(*ends) for ends in zip([0, *ends], ends, strict=False)]
        self._forward = forward_pass(self._model)
        self._gradient = torch.empty((rows, ends[-1]), device=device)
        self._velocity = torch.empty_like(self._gradient)

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
        feed, tally = Feed(members, self._device), Tally(members)
        self._velocity.zero_()
        left: list[Leavings] = []
        done, active = 0, len(members)
        while active:
            last = members[active - 1].steps
            self._advance(scene, flat[:active], feed, last - done, tally)
            staying = sum(member.steps > last for member in members)
            left[:0] = self._leavings(scene, flat, members, slice(staying, active))
            done, active = last, staying
        reports = tally.reports(clock() - began)
        finished = zip(members, flat.cpu().numpy(), left, reports, strict=True)
        return [self._result(*each) for each in finished]

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

    def _advance(self, scene: Scene, flat: Tensor, feed: Feed, steps: int, tally: Tally) -> None:
        """Train the members that still have steps to go, as many rows as `flat` has."""
        bind(self._model, self._shapes.values(), self._windows, flat)
        seen = part_of(scene, slice(len(flat)), self._device)
        objective = _objective(seen)
        gradient = self._gradient[: len(flat)]
        self._parameters = list(self._model.parameters())
        self._gradients = [
            gradient[:, window].view_as(parameter)
            for parameter, window in zip(self._parameters, self._windows, strict=True)
        ]
        for batch in feed.steps(len(flat), steps):
            tally.add(batch, *self._step(objective, batch, flat, seen))

    def _step(
        self, objective: Objective, batch: Batch, flat: Tensor, scene: Scene
    ) -> tuple[Tensor, Tensor]:
        """One step of SGD of each: the losses before it, and how many were right, both (K,)."""
        plan, rows = scene.plan, len(flat)
        gradient, velocity = self._gradient[:rows], self._velocity[:rows]
        features, logits, exits = self._forward(batch.x)
        done = Pass(batch.x, batch.labels, features, logits, exits, batch.shares)
        loss = objective.output(done)
        found = torch.autograd.grad(
            loss.sum(), self._parameters, allow_unused=True, materialize_grads=True
        )
        with torch.no_grad():
            torch._foreach_copy_(self._gradients, found)
            value = loss.detach()
            for term in objective.on_weights:
                value = value + term(flat, scene.base, gradient)
            if plan.weight_decay:
                gradient.add_(flat, alpha=plan.weight_decay)
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
        objective = _objective(part_of(scene, rows))
        if objective.finish is None:
            return [Leavings()] * len(ended)
        features = partial(all_features, self._forward, ended)
        with torch.no_grad():
            ending = Ending(weights, ended[0].steps, features, all_labels(ended))
            left = objective.finish(ending)
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
    ) -> LocalResult | TrainingError:
        if isinstance(report, TrainingError):
            return report
        trained = {
            name: row[window].reshape(shape)
            for (name, shape), window in zip(self._shapes.items(), self._windows, strict=True)
        }
        try:
            if not np.isfinite(row.sum()) or left.state:
                check_finite({**trained, **left.state})
        except TrainingError as error:
            return error
        own = own_weights(trained, member.task.weights)
        return LocalResult(trained, report, left.state, {**own, **left.memory})

    def _row(self, weights: Weights) -> NDArray[np.float32]:
        return np.concatenate([weights[name].reshape(-1) for name in self._shapes])


def _objective(scene: Scene) -> Objective:
    return OBJECTIVES[method_named(scene.plan.method).loss](scene)
