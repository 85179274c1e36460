"""SAMO beside dense mixed precision: state, bytes exchanged, peak memory, CPU time."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.profiler import ProfilerActivity, profile

from benchmarks.claims import Claim, Options, claim, main
from cloud.trainers.plans import OptimizerPlan
from cloud.trainers.sparse.masks import kept_share, magnitude_masks
from cloud.trainers.state import TrainingState

PLAN = OptimizerPlan(learning_rate=1e-3, weight_decay=0.01)
SPARSITIES = (0.0, 0.25, 0.5, 0.8, 0.9)
COMPUTE = torch.bfloat16
MB = 1e6

Step = Callable[[Tensor], object]


@dataclass(frozen=True, slots=True)
class Size:
    """A network of `layers` square matrices, trained on batches of so many rows."""

    width: int
    layers: int
    rows: int

    @property
    def parameters(self) -> int:
        """The network's entries, phi in the paper."""
        return self.layers * self.width**2

    def network(self) -> nn.Sequential:
        """The network, always with the same weights."""
        torch.manual_seed(0)
        made = [nn.Linear(self.width, self.width, bias=False) for _ in range(self.layers)]
        return nn.Sequential(*(part for layer in made for part in (layer, nn.ReLU())))

    def batch(self) -> Tensor:
        """Inputs, which are the targets too."""
        return torch.randn(self.rows, self.width, generator=torch.Generator().manual_seed(1))


FULL = Size(width=1024, layers=8, rows=128)
QUICK = Size(width=512, layers=8, rows=128)
FEW = 8
"""With so few rows activations count for little beside state."""


class Sparse:
    """Training with compressed state."""

    def __init__(self, size: Size, sparsity: float, group: dist.ProcessGroup | None = None) -> None:
        self.model = size.network()
        self.masks = magnitude_masks(self.model, sparsity)
        self.state = TrainingState(self.model, PLAN, masks=self.masks, compute=COMPUTE, group=group)

    def step(self, x: Tensor) -> None:
        """Forward, backward with compression, update with expansion."""
        _backward(self.model, x)
        self.state.step(PLAN.learning_rate)

    def state_bytes(self) -> int:
        """All that is kept between steps, and the copy a step makes of a tensor's entries."""
        return sum(self.state.sizes().values())


class Dense:
    """Mixed-precision AdamW as it is mostly done: 20 bytes a parameter."""

    def __init__(self, size: Size, group: dist.ProcessGroup | None = None) -> None:
        self.model = size.network()
        self.master = [nn.Parameter(p.detach().clone()) for p in self.model.parameters()]
        self.model.to(COMPUTE)
        for master in self.master:
            master.grad = torch.zeros_like(master)
        self.optimizer = torch.optim.AdamW(
            self.master, lr=PLAN.learning_rate, weight_decay=PLAN.weight_decay, foreach=False
        )
        self._group = group
        self.reduced_bytes = 0

    def step(self, x: Tensor) -> None:
        """Forward, backward, update."""
        _backward(self.model, x)
        self.update()

    def update(self) -> None:
        """Make a step of the 16-bit gradients, which live until here; and drop them."""
        for parameter, master in zip(self.model.parameters(), self.master, strict=True):
            if parameter.grad is None or master.grad is None:
                continue
            if self._group is not None:
                dist.all_reduce(parameter.grad, group=self._group)
                self.reduced_bytes += _bytes(parameter.grad)
            master.grad.copy_(parameter.grad)
        self.optimizer.step()
        with torch.no_grad():
            for parameter, master in zip(self.model.parameters(), self.master, strict=True):
                parameter.copy_(master)
        self.model.zero_grad(set_to_none=True)

    def state_bytes(self) -> int:
        """Parameters and gradients of both precisions, and moments."""
        moments = [m for kept in self.optimizer.state.values() for m in kept.values()]
        both = [*self.model.parameters(), *self.master]
        return 2 * sum(map(_bytes, both)) + sum(map(_bytes, moments))


def measure(options: Options) -> list[Claim]:
    """Training of a pruned network beside a dense one of the same size, in bfloat16.

    Bytes are those of the tensors there are; peak memory is what torch's allocator gave out and
    took back within one step, added up. Times are CPU time of one thread, the least of
    interleaved rounds. What SAMO takes is by its paper 24 f phi + 2 phi bytes, dense 20 phi.
    """
    size = QUICK if options.is_quick else FULL
    with _one_thread():
        options.tell("state")
        claims = state_claims(size)
        options.tell("all-reduce")
        claims += exchange_claims(size, options.folder)
        options.tell("peak memory")
        claims += peak_claims(size, options.folder)
        options.tell("time")
        return claims + time_claims(size, rounds=3 if options.is_quick else 5)


def state_claims(size: Size) -> list[Claim]:
    """The bytes of a training's state, against the paper's count and against dense training."""
    claims, phi, x = [], size.parameters, size.batch()[:FEW]
    dense = Dense(size)
    dense.step(x)
    for sparsity in SPARSITIES:
        sparse = Sparse(size, sparsity)
        sparse.step(x)
        taken, kept = sparse.state_bytes() / MB, kept_share(sparse.masks)
        counted = (24 * kept + 2) * phi / MB
        name = f"state, {sparsity:.0%} sparse"
        claims += [
            claim(
                name,
                taken,
                "MB",
                peer="24 f phi + 2 phi",
                peer_value=counted,
                goal=1.01 * counted,
            ),
            claim(
                name,
                taken,
                "MB",
                peer="dense AdamW, 20 phi",
                peer_value=dense.state_bytes() / MB,
                goal=0.26 * dense.state_bytes() / MB if sparsity == SPARSITIES[-1] else None,
            ),
        ]
    return claims


def exchange_claims(size: Size, folder: Path) -> list[Claim]:
    """What goes into all-reduces in a step; the collectives run, on a group of this process."""
    address = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    try:
        group = dist.group.WORLD
        sparse, dense = Sparse(size, SPARSITIES[-1], group), Dense(size, group)
        for training in (sparse, dense):
            training.step(size.batch()[:FEW])
    finally:
        dist.destroy_process_group()
    bound = 1.01 * kept_share(sparse.masks) * dense.reduced_bytes / MB
    return [
        claim(
            "all-reduce a step, 90% sparse",
            sparse.state.reduced_bytes / MB,
            "MB",
            peer="dense gradients, 16 bits",
            peer_value=dense.reduced_bytes / MB,
            goal=bound,
        )
    ]


def peak_claims(size: Size, folder: Path) -> list[Claim]:
    """The most that lives at a time within a step, beyond what lives between steps."""
    x = size.batch()[:FEW]
    sparse, dense = Sparse(size, SPARSITIES[-1]), Dense(size)
    for training in (sparse, dense):
        training.step(x)
    trainings: Mapping[str, tuple[Step, int]] = {
        "sparse": (sparse.step, sparse.state_bytes()),
        "dense": (dense.step, dense.state_bytes() - 2 * size.parameters),
    }
    beyond = {n: peak_bytes(step, x, folder / n) for n, (step, _) in trainings.items()}
    whole = {n: (beyond[n] + kept) / MB for n, (_, kept) in trainings.items()}
    gradients = 2 * size.parameters / MB
    return [
        claim(
            "peak beyond state, 90% sparse",
            beyond["sparse"] / MB,
            "MB",
            peer="dense gradients of the whole model, 16 bits",
            peer_value=gradients,
            goal=gradients,
        ),
        claim(
            "peak with state, 90% sparse",
            whole["sparse"],
            "MB",
            peer="dense AdamW",
            peer_value=whole["dense"],
            goal=0.26 * whole["dense"],
        ),
    ]


def peak_bytes(step: Step, x: Tensor, trace: Path) -> int:
    """How far torch's allocations rise in this step above where they stand."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step(x)
    seen.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted(
        (event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"
    )
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def time_claims(size: Size, rounds: int) -> list[Claim]:
    """A step beside dense AdamW's, and what of it compression and expansion take."""
    x = size.batch()
    sparse, dense = Sparse(size, SPARSITIES[-1]), Dense(size)
    plain = size.network()
    names = list(sparse.state.parameters)
    kept = [sparse.state.kept[name] for name in names]
    gradients = [torch.randn(k.shape).to(COMPUTE) for k in kept]
    held = [gradient.clone() for gradient in gradients]

    def compress_and_expand() -> None:
        for each, gradient, dense_copy in zip(kept, gradients, held, strict=True):
            each.expand_into(dense_copy, each.compress(gradient))

    def sparse_update() -> None:
        for each, gradient in zip(kept, gradients, strict=True):
            each.compress(gradient)
        sparse.state.step(PLAN.learning_rate)

    def dense_update() -> None:
        for parameter, gradient in zip(dense.model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        dense.update()

    spent = _least(
        {
            "sparse": lambda: sparse.step(x),
            "dense": lambda: dense.step(x),
            "sparse update": sparse_update,
            "dense update": dense_update,
            "codec": compress_and_expand,
            "float32": lambda: _backward(plain, x, torch.float32),
        },
        rounds,
    )
    return [
        _time("a step, 90% sparse", spent["sparse"], "dense AdamW", spent["dense"], 1.12),
        _time(
            "compress, update and expand, 90% sparse",
            spent["sparse update"],
            "dense update",
            spent["dense update"],
            1.0,
        ),
        _time(
            "compress and expand, 90% sparse",
            spent["codec"],
            "forward and backward in float32",
            spent["float32"],
            0.12,
        ),
    ]


def _time(name: str, spent_s: float, peer: str, peer_s: float, share: float) -> Claim:
    """Milliseconds beside the peer's, of which this share is the goal."""
    theirs = 1e3 * peer_s
    return claim(name, 1e3 * spent_s, "ms", peer=peer, peer_value=theirs, goal=share * theirs)


def _least(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The least CPU seconds of each, all in turn, after one round that is not counted."""
    least: dict[str, float] = {}
    for number in range(rounds + 1):
        for name, call in calls.items():
            before = time.thread_time()
            call()
            if number:
                spent_s = time.thread_time() - before
                least[name] = min(spent_s, least.get(name, spent_s))
    return least


def _backward(model: nn.Module, x: Tensor, compute: torch.dtype = COMPUTE) -> None:
    mse_loss(model(x.to(compute)).float(), x).backward()  # type: ignore[no-untyped-call]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    main("trainers_samo", measure)
