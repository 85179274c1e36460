"""What training keeps of a model: parameters, gradients and moments, as few long vectors.

A *bucket* is a part of the model, by default all of it: its master parameters, gradients and
moments are one vector each, reduced over ranks and stepped together; a frozen bucket does neither.
With masks the vectors hold living entries only, while the model computes with dense tensors
whose dead entries are zero (SAMO, arXiv:2302.05045, section III). A tensor's dense gradient is
compressed and freed as soon as it is there, so that no two of them need to live at a time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cloud.trainers.plans import OptimizerPlan
from cloud.trainers.sparse.compression import Kept, kept_in
from federation.errors import TrainingError

Named: TypeAlias = Mapping[str, Tensor]


def make_optimizer(vector: Tensor, plan: OptimizerPlan) -> torch.optim.Optimizer:
    """The optimizer of one vector; its kernels are the same for short and long vectors."""
    if plan.name == "sgd":
        return torch.optim.SGD(
            [vector],
            lr=plan.learning_rate,
            momentum=plan.momentum,
            weight_decay=plan.weight_decay,
            nesterov=plan.nesterov,
            foreach=False,
        )
    return torch.optim.AdamW(
        [vector],
        lr=plan.learning_rate,
        betas=plan.betas,
        weight_decay=plan.weight_decay,
        foreach=False,
    )


@dataclass(slots=True, eq=False)
class Bucket:
    """A part of the model in training. `gradient` has the type the model computes with.

    The rate of a step is multiplied by `rate_scale`.
    """

    spans: dict[str, slice]
    master: Tensor
    gradient: Tensor
    optimizer: torch.optim.Optimizer
    is_frozen: bool = False
    rate_scale: float = 1.0


class TrainingState:
    """The state of a model in training, on this rank.

    The model's parameters are converted to `compute` and, where masks are given, made sparse;
    its gradients never stay in `.grad`.

    Args:
        model: on the device it shall train on.
        plan: the optimizer.
        masks: by parameter, which entries live; a parameter without one lives entirely.
        buckets: names of parameters, a list for each bucket (none: one bucket of all).
        compute: the type the model computes with; the master parameters are float32.
        group: ranks that train the same parameters on other samples (None: this one alone).

    Raises:
        ConfigError: masks that do not fit the model.
        TrainingError: a parameter that is in no bucket, or in two.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: OptimizerPlan,
        *,
        masks: Named | None = None,
        buckets: Sequence[Sequence[str]] = (),
        compute: torch.dtype = torch.float32,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.parameters = dict(model.named_parameters())
        self.kept = kept_in(self.parameters, masks or {})
        self._group, self._compute = group, compute
        named = [list(names) for names in buckets] or [list(self.parameters)]
        if sorted(chain.from_iterable(named)) != sorted(self.parameters):
            raise TrainingError(
                "the buckets do not hold every parameter of the model once: rebuild them from it"
            )
        self.buckets = [self._bucket(names, plan) for names in named]
        self.reduced_bytes = 0

    def _bucket(self, names: Sequence[str], plan: OptimizerPlan) -> Bucket:
        spans, start = {}, 0
        for name in names:
            spans[name] = slice(start, start + self.kept[name].count)
            start = spans[name].stop
        living = [self.kept[n].compress(self.parameters[n].detach()).float() for n in names]
        master = torch.cat(living)
        gradient = torch.zeros_like(master, dtype=self._compute)
        master.grad = gradient if gradient.dtype == master.dtype else torch.zeros_like(master)
        bucket = Bucket(spans, master, gradient, make_optimizer(master, plan))
        for name in names:
            self._adopt(name, bucket)
        return bucket

    def _adopt(self, name: str, bucket: Bucket) -> None:
        """Have the model compute with this bucket's entries, and hand over its gradient."""
        parameter, kept = self.parameters[name], self.kept[name]
        span = bucket.spans[name]
        if kept.index is None and self._compute == bucket.master.dtype:
            parameter.data = bucket.master[span].view(kept.shape)
        else:
            parameter.data = torch.empty(
                kept.shape, dtype=self._compute, device=bucket.master.device
            )
            kept.expand_into(parameter.data, bucket.master[span].to(self._compute))
        parameter.grad = None
        take = partial(self._take, kept, bucket, span)
        parameter.register_post_accumulate_grad_hook(take)  # type: ignore[no-untyped-call]

    @staticmethod
    def _take(kept: Kept, bucket: Bucket, span: slice, parameter: Tensor) -> None:
        """Compress a gradient that has just been computed, and free it."""
        if parameter.grad is not None:
            bucket.gradient[span].add_(kept.compress(parameter.grad))
            parameter.grad = None

    def step(self, learning_rate: float) -> None:
        """Reduce over ranks, step, and write the new parameters back into the model."""
        for bucket in self.buckets:
            if bucket.is_frozen:
                continue
            self._reduce(bucket.gradient)
            if bucket.master.grad is not bucket.gradient and bucket.master.grad is not None:
                bucket.master.grad.copy_(bucket.gradient)
            for settings in bucket.optimizer.param_groups:
                settings["lr"] = learning_rate * bucket.rate_scale
            bucket.optimizer.step()
            bucket.gradient.zero_()
            self._write_back(bucket)

    def _reduce(self, gradient: Tensor) -> None:
        """The mean over the group. Every rank has the same index, so no index travels."""
        if self._group is None:
            return
        dist.all_reduce(gradient, group=self._group)
        gradient.div_(dist.get_world_size(self._group))
        self.reduced_bytes += gradient.numel() * gradient.element_size()

    def _write_back(self, bucket: Bucket) -> None:
        for name, span in bucket.spans.items():
            parameter, kept = self.parameters[name], self.kept[name]
            if parameter.data.data_ptr() != bucket.master[span].data_ptr():
                kept.expand_into(parameter.data, bucket.master[span].to(self._compute))

    def freeze(self, bucket: int) -> None:
        """Take a bucket out of backward, reduction and step; its parameters stay as they are."""
        self._set_frozen(bucket, frozen=True)

    def unfreeze(self, bucket: int) -> None:
        """Let a bucket train again, with the moments it had."""
        self._set_frozen(bucket, frozen=False)

    def _set_frozen(self, number: int, *, frozen: bool) -> None:
        bucket = self.buckets[number]
        bucket.is_frozen = frozen
        for name in bucket.spans:
            self.parameters[name].requires_grad_(not frozen)

    def sizes(self) -> dict[str, int]:
        """The bytes of each kind of state on this rank, as it lies in memory now.

        `temporary` is what the step needs beside: one more copy of a tensor's living entries.
        The paper's count takes a copy of all of them at once.
        """
        sizes = dict.fromkeys(("parameters", "master", "gradients", "moments", "index"), 0)
        sizes["parameters"] = sum(_bytes(p) for p in self.parameters.values())
        sizes["index"] = sum(kept.index_bytes for kept in self.kept.values())
        for bucket in self.buckets:
            if self._is_apart(bucket):
                sizes["master"] += _bytes(bucket.master)
            sizes["gradients"] += _bytes(bucket.gradient)
            if bucket.master.grad is not bucket.gradient and bucket.master.grad is not None:
                sizes["gradients"] += _bytes(bucket.master.grad)
            for moments in bucket.optimizer.state.values():
                sizes["moments"] += sum(_bytes(m) for m in moments.values() if m is not None)
        largest = max(kept.count for kept in self.kept.values())
        sizes["temporary"] = largest * torch.empty(0, dtype=self._compute).element_size()
        return sizes

    def _is_apart(self, bucket: Bucket) -> bool:
        """Whether the master parameters lie beside those the model computes with."""
        start = bucket.master.data_ptr()
        stop = start + _bytes(bucket.master)
        return not all(start <= self.parameters[n].data_ptr() < stop for n in bucket.spans)

    def weights(self) -> dict[str, Tensor]:
        """The master parameters by name, dense float32 on the CPU; dead entries are zero."""
        found: dict[str, Tensor] = {}
        for bucket in self.buckets:
            for name, span in bucket.spans.items():
                found[name] = torch.empty(self.kept[name].shape)
                self.kept[name].expand_into(found[name], bucket.master[span].cpu())
        return found

    def tensors(self) -> dict[str, Tensor]:
        """All state by name, on the CPU: what a checkpoint keeps. Entries that died are absent."""
        kept: dict[str, Tensor] = {}
        for number, bucket in enumerate(self.buckets):
            kept[f"{number}/master"] = bucket.master.detach().cpu().clone()
            for key, moment in bucket.optimizer.state.get(bucket.master, {}).items():
                if moment is not None:
                    kept[f"{number}/{key}"] = moment.detach().cpu().clone()
        return kept

    def load(self, tensors: Named) -> None:
        """Go on from `tensors` of a state with the same model, masks and buckets.

        Raises:
            TrainingError: tensors of another model.
        """
        for number, bucket in enumerate(self.buckets):
            mine = {
                k.partition("/")[2]: t for k, t in tensors.items() if k.startswith(f"{number}/")
            }
            master = mine.pop("master", torch.empty(0))
            if master.shape != bucket.master.shape:
                raise TrainingError(
                    f"the checkpoint's part {number} has {master.numel()} entries and the model's "
                    f"{bucket.master.numel()}: resume with the same model and masks, or start over"
                )
            with torch.no_grad():
                bucket.master.copy_(master)
            device = bucket.master.device
            bucket.optimizer.state[bucket.master] = {
                key: value.clone() if key == "step" else value.clone().to(device)
                for key, value in mine.items()
            }
            self._write_back(bucket)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
