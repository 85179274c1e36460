"""What `train.toml` says: data, model, optimizer, and the techniques that make it cheaper."""

from pathlib import Path
from typing import Literal

import msgspec

from cloud.config import ModelChoice
from federation.errors import ConfigError
from moe_serving.models.config import ModelConfig


def _above(field: str, value: float, bound: float) -> None:
    if not value > bound:
        raise ConfigError(f"{field} is {value}; expected more than {bound:g}: correct it")


def _in_range(field: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise ConfigError(f"{field} is {value}; expected {least:g} to {most:g}: correct it")


class OptimizerPlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a step is made of a gradient, and the learning rate over time.

    The rate rises over `warmup` steps and then stays, falls as a cosine to zero, or is divided
    by `factor` at each of `milestones` (shares of the training, 0 to 1).
    """

    name: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.9
    nesterov: bool = False
    schedule: Literal["constant", "cosine", "steps"] = "constant"
    warmup: int = 0
    milestones: tuple[float, ...] = (0.5, 0.75)
    factor: float = 10.0

    def __post_init__(self) -> None:
        _above("optimizer.learning_rate", self.learning_rate, 0.0)
        _above("optimizer.factor", self.factor, 1.0)
        _in_range("optimizer.momentum", self.momentum, 0.0, 0.9999)
        for beta in self.betas:
            _in_range("optimizer.betas", beta, 0.0, 0.99999)
        for place in self.milestones:
            _in_range("optimizer.milestones", place, 0.0, 1.0)


class SparsePlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which entries live (SAMO, arXiv:2302.05045).

    `rule` says when the mask is drawn: at the start by the magnitude of the weights there
    (`magnitude`, for a model that was trained before), once it has settled over epochs of dense
    training (`early-bird`), or it is read from `file`. `scope` says whether all tensors lose the
    share together, or each does.

    Departs from the paper: its count of memory takes every layer alike; we begin with all
    together, since a small network's first layers are too few to lose nine tenths.
    """

    sparsity: float = 0.9
    rule: Literal["early-bird", "magnitude", "file"] = "early-bird"
    scope: Literal["layer", "model"] = "model"
    at_most: int = 10
    file: Path | None = None

    def __post_init__(self) -> None:
        _in_range("sparse.sparsity", self.sparsity, 0.0, 0.9999)
        if (self.rule == "file") != (self.file is not None):
            raise ConfigError(
                'sparse.file goes with sparse.rule = "file", and only with it: give both or neither'
            )
        if self.at_most < 1:
            raise ConfigError(
                f"sparse.at_most is {self.at_most}; dense training before the ticket lasts an "
                "epoch or more: correct it"
            )


class ParallelPlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a mixture of experts lies over processes (TED, arXiv:2303.06318).

    `tensor` and `expert` are the sizes of those groups; the other processes are data parallel.
    `drops_duplicates` has the ranks of a tensor group send a share of the tokens each, and
    `keeps_collectives` keeps what collectives gave for the recomputation. The optimizer steps
    `tile` parameters at a time.
    """

    tensor: int = 1
    expert: int = 1
    drops_duplicates: bool = True
    keeps_collectives: bool = True
    recomputes: bool = True
    tile: int = 178_956_971

    def __post_init__(self) -> None:
        for name in ("tensor", "expert", "tile"):
            _in_range(f"parallel.{name}", getattr(self, name), 1, 2**40)


class FreezingPlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which modules stop training, from the front (Egeria, arXiv:2201.06227), and when.

    `rule` is `settled` (ours), `signed` or `absolute` (the paper's, two readings of it), `times`
    (each module at its share of the training, whatever it has learned) or `freeze-out` (rates of
    their own, arXiv:1706.04983). A reading is taken of `samples` samples every `every` steps (0:
    the paper's guideline); `window`, `tolerance`, `share` and `patience` are the rule's. Nothing
    freezes while the loss still changes by more than `critical` (a share) from one reading to the
    next. Where the rate falls in steps, a fall to 1 / `unfreeze` lets all train again.

    Under `settled` and `freeze-out` no module freezes before the share `first` of the training.

    The model is cut into `modules` (0: as many as it has). What frozen ones say is kept on disk
    in up to `cache_mb`. The reference is asked beside the training, or (`is_asynchronous` false)
    in it, so that a second run gives the same.
    """

    rule: Literal["settled", "signed", "absolute", "times", "freeze-out"] = "settled"
    modules: int = 0
    every: int = 0
    window: int = 10
    tolerance: float = 0.2
    share: float = 0.3
    patience: int = 2
    critical: float = 0.1
    unfreeze: float = 10.0
    samples: int = 32
    reference: Literal["int8", "float32"] = "int8"
    is_asynchronous: bool = True
    cache_mb: int = 2048
    times: tuple[float, ...] = ()
    first: float = 0.4

    def __post_init__(self) -> None:
        for field in ("tolerance", "share", "critical"):
            _in_range(f"freezing.{field}", getattr(self, field), 0.0, 1.0)
        _in_range("freezing.modules", self.modules, 0, 10_000)
        _in_range("freezing.every", self.every, 0, 2**31)
        _in_range("freezing.window", self.window, 2, 1000)
        _in_range("freezing.patience", self.patience, 1, 1000)
        _in_range("freezing.samples", self.samples, 2, 4096)
        _in_range("freezing.cache_mb", self.cache_mb, 0, 2**31)
        _in_range("freezing.first", self.first, 0.01, 1.0)
        _above("freezing.unfreeze", self.unfreeze, 1.0)
        if (self.rule == "times") != bool(self.times):
            raise ConfigError(
                'freezing.times goes with freezing.rule = "times", and only with it: give both or '
                "neither"
            )
        if list(self.times) != sorted(self.times):
            raise ConfigError(
                f"freezing.times is {list(self.times)}; modules freeze from the front, so they "
                "must rise: sort them"
            )


class DataPlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is learned from: a data set by name, and who is kept for testing.

    Where a set has clients, `held_out` names the clients that are tested on; where it has a split
    of its own, that is used; else the last `test_share` of the samples. Of a text, windows of
    `length` tokens are the samples. `at_most` bounds the training samples (0: all).

    Sensor windows can be learned from `copies` times in an epoch, each copy turned in space by up
    to `turn_deg` degrees and its strength varied by a share of up to `scale`: a device is worn
    otherwise by each.
    """

    set: str
    held_out: tuple[str, ...] = ()
    test_share: float = 0.2
    length: int = 128
    at_most: int = 0
    copies: int = 1
    turn_deg: float = 0.0
    scale: float = 0.0

    def __post_init__(self) -> None:
        _in_range("data.test_share", self.test_share, 0.01, 0.99)
        _in_range("data.length", self.length, 2, 65536)
        _in_range("data.at_most", self.at_most, 0, 2**31)
        _in_range("data.copies", self.copies, 1, 10_000)
        _in_range("data.turn_deg", self.turn_deg, 0.0, 180.0)
        _in_range("data.scale", self.scale, 0.0, 0.9)


class CheckpointPlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How often training is kept, in steps; it goes on from the newest after any end."""

    every_steps: int = 100

    def __post_init__(self) -> None:
        _in_range("checkpoint.every_steps", self.every_steps, 1, 2**31)


class TrainPlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One training at the hub, as `train.toml` says it.

    The model is either one of the zoo (`model`) or a mixture of experts (`moe`), whose balance
    loss counts `balance`. `batch_size` is that of all processes together, cut into `accumulate`
    parts on each. `precision` is what the model computes with; parameters and moments are
    float32. `seed` decides the initial weights and the order of samples: with the same seed the
    same batches are seen on any number of processes.
    """

    name: str
    data: DataPlan
    model: ModelChoice | None = None
    moe: ModelConfig | None = None
    balance: float = 0.01
    epochs: int = 1
    batch_size: int = 64
    accumulate: int = 1
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    optimizer: OptimizerPlan = OptimizerPlan()
    checkpoint: CheckpointPlan = CheckpointPlan()
    sparse: SparsePlan | None = None
    parallel: ParallelPlan | None = None
    freezing: FreezingPlan | None = None

    def __post_init__(self) -> None:
        if (self.model is None) == (self.moe is None):
            raise ConfigError(
                "a training has a [model] of the zoo or a mixture of experts in [moe]; expected "
                "one of them: give one"
            )
        if self.parallel is not None and self.moe is None:
            raise ConfigError(
                "[parallel] splits the experts of a mixture, and the plan has a [model] of the "
                "zoo; that trains data parallel on any number of processes: leave [parallel] out"
            )
        if self.parallel is not None and self.sparse is not None:
            raise ConfigError(
                "[parallel] and [sparse] are both given; expected one: a mask is of whole tensors, "
                "and shards would each need their own part of it: leave one out"
            )
        if self.parallel is not None and self.freezing is not None:
            raise ConfigError(
                "[parallel] and [freezing] are both given; expected one: shards of tensors from "
                "all over the model step together, so no module can leave: leave one out"
            )
        _in_range("balance", self.balance, 0.0, 100.0)
        _in_range("epochs", self.epochs, 1, 100_000)
        _in_range("batch_size", self.batch_size, 1, 2**20)
        _in_range("accumulate", self.accumulate, 1, self.batch_size)
