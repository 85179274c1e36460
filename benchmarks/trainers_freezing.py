"""Training that freezes what has learned: CPU seconds to the accuracy of training all of it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.claims import Claim, Options, claim, main
from cloud.config import ModelChoice
from cloud.trainers.freezing.chain import chain_of
from cloud.trainers.freezing.technique import Freezing
from cloud.trainers.loop import Trainer
from cloud.trainers.plans import DataPlan, FreezingPlan, OptimizerPlan, TrainPlan
from cloud.trainers.state import TrainingState
from cloud.trainers.task import Arrays, Task, judge
from cloud.trainers.tasks import open_task
from federation.datasets.cached import cache_folder, load
from moe_serving.models.config import DecoderConfig

SETTLED = FreezingPlan(is_asynchronous=False, cache_mb=1024)
WAYS: tuple[tuple[str, FreezingPlan | None], ...] = (
    ("nothing frozen", None),
    ("settled", SETTLED),
    ("the paper's rule", msgspec.structs.replace(SETTLED, rule="signed")),
    ("the paper's rule, absolute", msgspec.structs.replace(SETTLED, rule="absolute")),
    ("FreezeOut", msgspec.structs.replace(SETTLED, rule="freeze-out")),
)

SAME_TIMES = "another seed's times"
SHORTER = "nothing frozen, two thirds of the epochs"


class Residual(nn.Module):
    """Two convolutions added to what came in (arXiv:1512.03385), with group norms."""

    def __init__(self, channels: int, filters: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, filters, 3, stride, padding=1, bias=False)
        self.first_norm = nn.GroupNorm(4, filters)
        self.second = nn.Conv2d(filters, filters, 3, padding=1, bias=False)
        self.second_norm = nn.GroupNorm(4, filters)
        self.short: nn.Module = nn.Identity()
        if stride > 1 or channels != filters:
            self.short = nn.Conv2d(channels, filters, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) to (N, filters, H / stride, W / stride)."""
        y = torch.relu(self.first_norm(self.first(x)))
        return torch.relu(self.second_norm(self.second(y)) + self.short(x))


def residual_network(width: int, blocks: int) -> nn.Sequential:
    """A network like ResNet-20: three stages of `blocks` residual blocks, to 10 classes."""
    stages: list[nn.Module] = []
    channels = 1
    for stage in range(3):
        for block in range(blocks):
            filters = width * 2**stage
            stages.append(Residual(channels, filters, 2 if stage and not block else 1))
            channels = filters
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))
    return nn.Sequential(*stages, head)


@dataclass(frozen=True, slots=True)
class Run:
    """One training: what it reached and when, in CPU seconds of all its threads.

    `curve` has (CPU seconds, loss, accuracy) after each part of the training; judging is not
    in the seconds.
    """

    curve: tuple[tuple[float, float, float], ...]
    frozen_at: tuple[tuple[int, int], ...]
    steps: int
    modules: int
    active: float

    @property
    def unfrozen_s(self) -> float | None:
        """What all of it would take if each step took what those before the first freezing did.

        On a machine with other work a second of one run is not one of another; these are of one.
        """
        first = self.frozen_at[0][0] / self.steps if self.frozen_at else 1.0
        before = int(first * len(self.curve) + 1e-9)
        return self.curve[before - 1][0] * len(self.curve) / before if before else None

    @property
    def cpu_s(self) -> float:
        """What all of it took."""
        return self.curve[-1][0]


@dataclass(frozen=True, slots=True)
class Subject:
    """What is trained: a plan, and its task from the first weights of the plan's seed."""

    name: str
    plan: TrainPlan
    open: Callable[[TrainPlan], Task]
    judged: int


def images(is_quick: bool) -> Subject:
    """A residual network on a part of Fashion-MNIST."""
    train, test = (500, 200) if is_quick else (2500, 1000)
    found = load("fashion-mnist", cache=cache_folder({}))
    tests = found.test if found.test is not None else found.train[-test:]
    parts = [Arrays(found.x[p], found.y[p]) for p in (found.train[:train], tests[:test])]

    def begin(plan: TrainPlan) -> Task:
        torch.manual_seed(plan.seed)
        model = residual_network(8, 1)
        return Task(model=model, train=parts[0], test=parts[1], forward=lambda x: (model(x), None))

    plan = TrainPlan(
        name="images",
        data=DataPlan(set="fashion-mnist"),
        model=ModelChoice(name="cnn"),
        epochs=2 if is_quick else 6,
        batch_size=25,
        optimizer=OptimizerPlan(
            name="sgd", learning_rate=0.05, weight_decay=5e-4, schedule="cosine", nesterov=True
        ),
    )
    return Subject("a residual network on Fashion-MNIST", plan, begin, 10)


def texts(is_quick: bool) -> Subject:
    """A small mixture-of-experts language model on the State of the Union."""
    plan = TrainPlan(
        name="texts",
        data=DataPlan(set="sotu", length=64, at_most=320 if is_quick else 1600),
        moe=_decoder(4),
        epochs=2 if is_quick else 3,
        batch_size=16,
        optimizer=OptimizerPlan(
            learning_rate=3e-3, betas=(0.9, 0.95), schedule="cosine", warmup=10
        ),
    )

    def begin(plan: TrainPlan) -> Task:
        task = open_task(plan, cache_folder({}))
        rows = 32 if is_quick else 128
        x, y = task.test.batch(np.linspace(0, len(task.test) - 1, rows, dtype=np.int64))
        few = Arrays(x.numpy(), y.numpy())
        return Task(model=task.model, train=task.train, test=few, forward=task.forward)

    return Subject("an expert language model on the State of the Union", plan, begin, 10)


def _decoder(layers: int) -> DecoderConfig:
    return DecoderConfig(
        vocabulary_size=259,
        d_model=48,
        n_layers=layers,
        n_heads=4,
        n_kv_heads=2,
        d_head=12,
        d_expert=64,
        n_experts=4,
        top_k=2,
        max_length=64,
    )


def train(subject: Subject, seed: int, how: FreezingPlan | None, folder: Path) -> Run:
    """One training from its beginning to its end; nothing is judged in its seconds."""
    plan = msgspec.structs.replace(subject.plan, seed=seed, freezing=how)
    task = subject.open(plan)
    chain = chain_of(task.model)
    buckets = [module.parameters for module in chain.modules]
    state = TrainingState(task.model, plan.optimizer, buckets=buckets)
    trainer = Trainer(plan, task, state)
    freezing = None
    if how is not None:
        freezing = Freezing(plan, task, state, chain, folder=folder)
        trainer.technique = freezing
    curve, spent_s, active = [], 0.0, 0.0
    for part in range(1, subject.judged + 1):
        until = round(trainer.steps * part / subject.judged)
        began = time.process_time()
        trainer.run(until=until)
        spent_s += time.process_time() - began
        found = judge(task, compute=torch.float32)
        curve.append((spent_s, found.loss, found.accuracy))
    trainer.close()
    frozen_at = tuple(freezing.frozen_at) if freezing is not None else ()
    active = _active(frozen_at, trainer.steps, [len(b.master) for b in state.buckets])
    return Run(tuple(curve), frozen_at, trainer.steps, len(buckets), active)


def _active(frozen_at: Sequence[tuple[int, int]], steps: int, sizes: Sequence[int]) -> float:
    """The share of parameters times steps that were trained."""
    ends = [*(step for step, _ in frozen_at), steps][1:]
    lost = sum(
        sum(sizes[:front]) * (end - step)
        for (step, front), end in zip(frozen_at, ends, strict=True)
    )
    return 1 - lost / (steps * sum(sizes))


def at_the_times_of(run: Run) -> FreezingPlan:
    """The control: modules freeze when they did in that run, whatever they have learned here."""
    times: list[float] = []
    for step, front in run.frozen_at:
        times += [step / run.steps] * (front - len(times))
    never = times or [1.0]
    return msgspec.structs.replace(SETTLED, rule="times", times=tuple(never))


def seconds_to(run: Run, goal: Callable[[float, float], bool]) -> float | None:
    """The CPU seconds after which the run's loss and accuracy first meet a goal, and stay."""
    reached = None
    for spent_s, loss, accuracy in reversed(run.curve):
        if not goal(loss, accuracy):
            break
        reached = spent_s
    return reached


def measure(options: Options) -> list[Claim]:
    """CPU seconds, those of the reference included, to what training everything reaches.

    Its peers are the same training with nothing frozen, with modules frozen at the times another
    seed's rule gave, FreezeOut, and simply fewer epochs; runs of one seed follow each other.
    """
    torch.set_num_threads(1)
    seeds = range(1, 2 if options.is_quick else 4)
    claims = []
    for make in (images, texts):
        subject = make(options.is_quick)
        runs = [_runs(subject, seed, options) for seed in seeds]
        for number, found in enumerate(runs):
            other = runs[(number + 1) % len(runs)]["settled"]
            folder = options.folder / "control"
            found[SAME_TIMES] = train(subject, seeds[number], at_the_times_of(other), folder)
        claims += _claims(subject.name, runs)
    return claims


def _runs(subject: Subject, seed: int, options: Options) -> dict[str, Run]:
    found = {}
    for name, how in WAYS:
        options.tell(f"{subject.name}, seed {seed}: {name}")
        found[name] = train(subject, seed, how, options.folder / "activations")
    fewer = msgspec.structs.replace(subject.plan, epochs=max(1, subject.plan.epochs * 2 // 3))
    shorter = replace(subject, plan=fewer)
    found[SHORTER] = train(shorter, seed, None, options.folder / "activations")
    return found


def _claims(subject: str, runs: Sequence[dict[str, Run]]) -> list[Claim]:
    """For each way: all its seconds, those to the goal, and what it ends with, by medians."""
    plain = "nothing frozen"
    claims = []
    whole_s = median(run[plain].cpu_s for run in runs)
    for name in runs[0]:
        peer = {"peer": plain, "peer_value": whole_s} if name != plain else {}
        spent_s = median(run[name].cpu_s for run in runs)
        claims.append(claim(f"{subject}: {name}", spent_s, "CPU s", **peer))  # type: ignore[arg-type]
        own = [run[name].unfrozen_s for run in runs]
        if name != plain and all(own):
            claims.append(
                claim(
                    f"{subject}: {name}: all steps",
                    spent_s,
                    "CPU s",
                    peer="its own steps before the first freezing, as many",
                    peer_value=median(value for value in own if value is not None),
                )
            )
        claims += _to_the_goal(subject, name, runs)
        wrong = [100 * (1 - run[name].curve[-1][2]) for run in runs]
        plainly = median(100 * (1 - run[plain].curve[-1][2]) for run in runs)
        claims.append(
            claim(f"{subject}: {name}: wrong", median(wrong), "%", peer=plain, peer_value=plainly)
        )
        active = median(run[name].active for run in runs)
        claims.append(claim(f"{subject}: {name}: parameters trained", active, "of all, by steps"))
    return claims


def _to_the_goal(subject: str, name: str, runs: Sequence[dict[str, Run]]) -> list[Claim]:
    """Seconds to half a point below what all of it reaches in that seed, where all seeds do."""
    spent, whole = [], []
    for run in runs:
        bound = run["nothing frozen"].curve[-1][2] - 0.005
        own = seconds_to(run[name], lambda _, accuracy, bound=bound: accuracy >= bound)  # type: ignore[misc]
        plain = seconds_to(run["nothing frozen"], lambda _, a, bound=bound: a >= bound)  # type: ignore[misc]
        if own is None or plain is None:
            return [
                claim(f"{subject}: {name}: seeds that miss the accuracy", _missed(name, runs), "")
            ]
        spent.append(own)
        whole.append(plain)
    goal = median(whole) / 1.25 if name == "settled" else None
    return [
        claim(
            f"{subject}: {name}: to the accuracy of all, less 0.5 points",
            median(spent),
            "CPU s",
            peer="nothing frozen",
            peer_value=median(whole),
            goal=goal,
        )
    ]


def _missed(name: str, runs: Sequence[dict[str, Run]]) -> int:
    return sum(run[name].curve[-1][2] < run["nothing frozen"].curve[-1][2] - 0.005 for run in runs)


if __name__ == "__main__":
    main("trainers_freezing", measure)
