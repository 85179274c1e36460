"""A pruned model cut into stages, one a rank, each with compressed state.

Inter-layer parallelism as SAMO has it (arXiv:2302.05045, section III-D): because a stage's state
is small, a model needs fewer stages, and with fewer stages the pipeline idles less. Activations
and their gradients travel dense between stages; parameters, gradients and moments stay where
their layers are. Beside it each stage may be data parallel with its like in other pipelines.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from cloud.trainers.plans import OptimizerPlan
from cloud.trainers.state import TrainingState
from federation.errors import ConfigError, TrainingError

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """How a model lies over ranks, and a batch over time.

    A batch is cut into `micro_batches`, `stages` of them or more: a rank idles a share of
    (stages - 1) / (micro_batches + stages - 1). `pipeline` is a group of one rank a stage, in
    their order (None: all ranks), `data` one of ranks that hold the same stage of other pipelines
    (None: there is one pipeline).

    Raises:
        ConfigError: fewer micro-batches than stages.
    """

    stages: int
    micro_batches: int
    pipeline: dist.ProcessGroup | None = None
    data: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        if self.micro_batches < self.stages:
            raise ConfigError(
                f"there are {self.micro_batches} micro-batches for {self.stages} stages; expected "
                "one for each stage or more: raise micro_batches"
            )


def cuts_of(sizes: Sequence[int], stages: int) -> tuple[int, ...]:
    """Where to cut modules in a row, so that the largest stage has as few parameters as can be.

    Args:
        sizes: the parameters of each module.
        stages: how many, each with one module or more that has parameters.

    Returns:
        The places (stages + 1,), from 0 to the number of modules.

    Raises:
        ConfigError: more stages than modules with parameters.
    """
    if not 1 <= stages <= sum(size > 0 for size in sizes):
        raise ConfigError(
            f"a pipeline of {stages} stages was asked for, and {sum(s > 0 for s in sizes)} modules "
            "have parameters; expected 1 or more stages, and no more than these: take fewer"
        )
    low, high = max(sizes), sum(sizes)
    while low < high:
        middle = (low + high) // 2
        fits = len(_filled(sizes, middle, stages)) <= stages + 1
        low, high = (low, middle) if fits else (middle + 1, high)
    return _filled(sizes, low, stages)


def _filled(sizes: Sequence[int], most: int, stages: int) -> tuple[int, ...]:
    """Cuts of stages that are filled in order up to `most`, but leave one module for each later."""
    places, filled = [0], 0
    left = sum(size > 0 for size in sizes)
    for number, size in enumerate(sizes):
        missing = stages - len(places)
        if size and filled and (filled + size > most or left <= missing):
            places.append(number)
            filled = 0
        filled += size
        left -= size > 0
    return (*places, len(sizes))


def stage_of(model: nn.Sequential, stage: int, stages: int) -> nn.Sequential:
    """The modules of one stage (from 0), the model's own, under the names they have there.

    Raises:
        ConfigError: as `cuts_of`.
    """
    children = list(model.named_children())
    sizes = [sum(p.numel() for p in module.parameters()) for _, module in children]
    cuts = cuts_of(sizes, stages)
    return nn.Sequential(OrderedDict(children[cuts[stage] : cuts[stage + 1]]))


class Pipeline:
    """One rank's stage of a model in training.

    Every rank of the pipeline builds the same whole model and keeps its own stage of it. Losses
    are those of one process that takes the micro-batches one after the other.

    Args:
        model: modules in a row, each a function of the one before it.
        plan: the optimizer.
        example: inputs of one micro-batch, (B, ...); only their shape is looked at. All later
            ones have it too.
        loss: of outputs in float32 and targets, the mean over a micro-batch.
        layout: of the model over ranks.
        masks: by parameter of the whole model, which entries live.
        compute: the type the model computes with.

    Raises:
        ConfigError: more stages than modules with parameters, or masks that do not fit the model.
    """

    def __init__(
        self,
        model: nn.Sequential,
        plan: OptimizerPlan,
        *,
        example: Tensor,
        loss: Loss,
        layout: Layout,
        masks: Mapping[str, Tensor] | None = None,
        compute: torch.dtype = torch.float32,
    ) -> None:
        stages = layout.stages
        self.number = dist.get_rank(layout.pipeline)
        self._layout, self._compute, self._rows = layout, compute, len(example)
        part = stage_of(model, self.number, stages)
        names = {name for name, _ in part.named_parameters()}
        own = {name: mask for name, mask in (masks or {}).items() if name in names}
        ends = self._ends(model, example, stages)
        self.state = TrainingState(part, plan, masks=own, compute=compute, group=layout.data)
        stage = PipelineStage(
            part,
            self.number,
            stages,
            example.device,
            input_args=ends[0],
            output_args=ends[1],
            group=layout.pipeline,
        )

        def share(outputs: Tensor, targets: Tensor) -> Tensor:
            # Gradients are compressed as they come, so a schedule cannot scale them afterwards.
            return loss(outputs.float(), targets) / layout.micro_batches

        self._schedule = Schedule1F1B(stage, layout.micro_batches, loss_fn=share, scale_grads=False)

    def _ends(self, model: nn.Sequential, example: Tensor, stages: int) -> tuple[Tensor, Tensor]:
        """Blank inputs and outputs of this stage: said beforehand, no rank asks another."""
        x = torch.zeros_like(example)
        with torch.no_grad():
            for number in range(self.number):
                x = stage_of(model, number, stages)(x)
            y = stage_of(model, self.number, stages)(x)
        blank = torch.zeros_like(x, dtype=self._compute if x.is_floating_point() else x.dtype)
        return (
            blank.requires_grad_(self.number > 0),
            torch.zeros_like(y, dtype=self._compute).requires_grad_(),
        )

    def step(self, x: Tensor, targets: Tensor, learning_rate: float) -> float:
        """One step on a batch; all ranks of the pipeline call this together.

        Args:
            x: inputs; only the first stage looks at them.
            targets: only the last stage looks at them.
            learning_rate: of this step.

        Returns:
            The mean loss over the batch, the same on every rank.

        Raises:
            TrainingError: a batch that is no whole number of the micro-batches agreed on.
        """
        if len(x) != self._rows * self._layout.micro_batches:
            raise TrainingError(
                f"the batch has {len(x)} samples; expected {self._layout.micro_batches} "
                f"micro-batches of {self._rows}: stages have agreed on their size"
            )
        losses: list[Tensor] = []
        inputs = (x.to(self._compute) if x.is_floating_point() else x,) if not self.number else ()
        if self.number == self._layout.stages - 1:
            self._schedule.step(*inputs, target=targets, losses=losses)
        else:
            self._schedule.step(*inputs)
        self.state.step(learning_rate)
        return self._told(losses)

    def _told(self, losses: Sequence[Tensor]) -> float:
        """The sum of these, from the last stage to all."""
        total = torch.zeros((), dtype=torch.float64)
        if losses:
            total += torch.stack([loss.detach().double().cpu() for loss in losses]).sum()
        dist.broadcast(total, group=self._layout.pipeline, group_src=self._layout.stages - 1)
        return float(total)
