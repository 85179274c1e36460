"""One training from its plan to a model in the registry, whatever ends it in between.

The folder of a training:

```
<out>/checkpoints/   the newest two, while it lasts
<out>/dense/         the same of the dense training before a ticket is drawn
<out>/masks.safetensors, start.safetensors   the ticket, and the weights it was drawn from
<out>/metrics.jsonl  a line for every step that was reported
<out>/result.json    what it came to
```
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cloud.trainers.checkpoints import Checkpoints, digest_of
from cloud.trainers.freezing.chain import Chain, chain_of
from cloud.trainers.freezing.technique import Freezing
from cloud.trainers.loop import COMPUTE, Place, State, Trainer, Watcher, steps_each_epoch
from cloud.trainers.parallel.mesh import open_mesh, shape_for
from cloud.trainers.parallel.parallelize import parallelize
from cloud.trainers.parallel.state import ShardedState
from cloud.trainers.plans import SparsePlan, TrainPlan
from cloud.trainers.sparse.masks import (
    EarlyBird,
    Masks,
    apply_masks,
    kept_share,
    load_masks,
    magnitude_masks,
    save_masks,
)
from cloud.trainers.state import TrainingState
from cloud.trainers.task import Task, judge
from cloud.trainers.tasks import open_task
from federation.errors import ConfigError


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What a training came to: on its test samples, and what it took on this rank.

    `state_bytes` is all that training kept of the model at its end, by kind. `kept` is the share
    of prunable entries that live. `reduced_bytes` went into all-reduces, if there were any.
    """

    name: str
    steps: int
    loss: float
    accuracy: float
    seconds: float
    state_bytes: dict[str, int]
    reduced_bytes: int
    kept: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """A training that is over: its task, its weights (dense, float32), and what it came to."""

    task: Task
    weights: dict[str, Tensor]
    result: Result


@dataclass(frozen=True, slots=True)
class Setting:
    """Where a training happens: its folder, the cache of data sets, this rank, the clock."""

    out: Path
    cache: Path
    place: Place
    device: torch.device
    clock: Callable[[], float] = time.monotonic


def run_training(plan: TrainPlan, setting: Setting, watchers: Sequence[Watcher] = ()) -> Outcome:
    """Train to the end, from the newest checkpoint if there is one.

    Raises:
        ConfigError: a plan whose parts do not fit each other.
        DataError: a data set that was not fetched.
        TrainingError: a loss that is not finite.
        StoreError: checkpoints of another plan, or a disk that is full.
    """
    if plan.sparse is not None:
        task, masks = _ticket(plan, plan.sparse, setting, watchers)
    else:
        task, masks = open_task(plan, setting.cache), {}
        task.model.to(setting.device)
    trainer = _trainer(plan, task, masks, setting, "checkpoints", watchers)
    trainer.resume()
    try:
        trainer.run()
    finally:
        trainer.close()
    judged = judge(task, compute=COMPUTE[plan.precision])
    result = Result(
        name=plan.name,
        steps=trainer.done,
        loss=judged.loss,
        accuracy=judged.accuracy,
        seconds=trainer.spent_s,
        state_bytes=trainer.state.sizes(),
        reduced_bytes=trainer.state.reduced_bytes,
        kept=kept_share(masks) if masks else 1.0,
    )
    return Outcome(task, trainer.state.weights(), result)


def _trainer(
    plan: TrainPlan,
    task: Task,
    masks: Masks,
    setting: Setting,
    folder: str,
    watchers: Sequence[Watcher],
) -> Trainer:
    chain = chain_of(task.model, plan.freezing.modules) if plan.freezing is not None else None
    state, place = _state(plan, task, masks, setting, chain)
    trainer = Trainer(
        plan,
        task,
        state,
        place=place,
        checkpoints=Checkpoints(setting.out / folder, digest_of(plan)),
        watchers=watchers,
        clock=setting.clock,
    )
    if chain is not None and isinstance(state, TrainingState):
        aside = setting.out / "activations"
        trainer.technique = Freezing(plan, task, state, chain, folder=aside, place=place)
    return trainer


def _state(
    plan: TrainPlan, task: Task, masks: Masks, setting: Setting, chain: Chain | None
) -> tuple[State, Place]:
    """The state of the task's model on this rank, and the rank's share of each batch."""
    place, compute = setting.place, COMPUTE[plan.precision]
    if plan.parallel is None or plan.moe is None:
        on_device = {name: mask.to(setting.device) for name, mask in masks.items()}
        whole = TrainingState(
            task.model,
            plan.optimizer,
            masks=on_device,
            buckets=[module.parameters for module in chain.modules] if chain is not None else (),
            compute=compute,
            group=place.group,
        )
        return whole, place
    if place.group is None:
        raise ConfigError(
            "[parallel] lays a model over processes, and this is the only one: start it with "
            "torchrun --nproc-per-node, or leave [parallel] out"
        )
    parallel = plan.parallel
    n_experts = plan.moe.n_experts
    shape = shape_for(
        place.ranks, tensor=parallel.tensor, expert=parallel.expert, n_experts=n_experts
    )
    mesh = open_mesh(shape, setting.device.type)
    parallelize(
        task.model,
        mesh,
        drops_duplicates=parallel.drops_duplicates,
        keeps_collectives=parallel.keeps_collectives,
        recomputes=parallel.recomputes,
    )
    shards = ShardedState(task.model, mesh, plan.optimizer, compute=compute, tile=parallel.tile)
    return shards, Place(mesh.data_rank, shape.data, mesh.data, leads=place.leads)


def _ticket(
    plan: TrainPlan, sparse: SparsePlan, setting: Setting, watchers: Sequence[Watcher]
) -> tuple[Task, Masks]:
    """A task at the weights a ticket was drawn from, and the ticket."""
    task = open_task(plan, setting.cache)
    if sparse.file is not None:
        masks = load_masks(sparse.file, task.model)
    else:
        drawn, start = setting.out / "masks.safetensors", setting.out / "start.safetensors"
        if not drawn.exists():
            _draw(plan, sparse, setting, watchers, drawn=drawn, start=start)
        setting.place.wait()
        task.model.load_state_dict(load_file(start))
        masks = load_masks(drawn, task.model)
    apply_masks(task.model, masks)
    task.model.to(setting.device)
    return task, masks


def _draw(
    plan: TrainPlan,
    sparse: SparsePlan,
    setting: Setting,
    watchers: Sequence[Watcher],
    *,
    drawn: Path,
    start: Path,
) -> None:
    """Train dense until the mask that pruning would give has settled; write it, and the weights.

    Each epoch's mask is on disk before the next begins, so that one who comes back after a
    kill has seen what the others saw.
    """
    task = open_task(plan, setting.cache)
    task.model.to(setting.device)
    prune = partial(magnitude_masks, task.model, sparse.sparsity, scope=sparse.scope)
    watch, masks = EarlyBird(), prune()
    weights = task.model.state_dict()
    if sparse.rule == "early-bird":
        dense = msgspec.structs.replace(plan, sparse=None, freezing=None, epochs=sparse.at_most)
        trainer = _trainer(dense, task, {}, setting, "dense", watchers)
        trainer.resume()
        each = steps_each_epoch(plan, len(task.train))
        seen = setting.out / "dense"
        for epoch in range(1, sparse.at_most + 1):
            trainer.run(until=epoch * each)
            path = seen / f"epoch-{epoch:04d}.masks"
            if setting.place.leads and not path.exists():
                seen.mkdir(parents=True, exist_ok=True)
                save_masks(prune(), path)
            setting.place.wait()
            masks = load_masks(path, task.model)
            watch = watch.after(masks)
            if watch.has_settled:
                break
        weights = trainer.state.weights()
    if setting.place.leads:
        setting.out.mkdir(parents=True, exist_ok=True)
        save_file({name: t.cpu().contiguous() for name, t in weights.items()}, start)
        save_masks(masks, drawn)
