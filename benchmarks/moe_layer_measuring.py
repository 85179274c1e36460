"""Measuring one expert layer beside its peers: CPU time, temporary memory and the roofline."""

import ctypes
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.moe_layer_peers import (
    Run,
    mixtral_block,
    padded_bmm,
    runtime_moe,
    static_einsum,
    switch_block,
    zipf_tokens,
)
from moe_serving.kernels.registry import best_kernel, kernel_named, kernels, serve_resident
from moe_serving.layers.experts import Activation, ExpertShape, GroupedExperts
from moe_serving.layers.gating import route
from moe_serving.layers.moe import MoELayer

OURS, PLAIN, EINSUM, PADDED = "ours, f32", "argsort + F.linear", "static einsum", "static padded"
MIXTRAL, SWITCH, RUNTIME = "transformers' Mixtral block", "transformers' Switch block", "ORT MoE"
EIGHT_BIT = "8 bit"

_SLOW_S = 0.4
_PROBE_ROWS = 1024
_PROBE_FLOATS = 2**26
_FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True)
class Case:
    """A layer, a batch, and what its figures must be.

    Attributes:
        share: of the per-expert roofline, at least.
        is_static: whether static gating takes part; it is slow.
    """

    tokens: int
    n_experts: int
    d_model: int
    d_expert: int
    activation: Activation
    top_k: int = 2
    zipf: float = 1.0
    share: float | None = None
    is_static: bool = False

    @property
    def name(self) -> str:
        """What tables call it."""
        return (
            f"{self.activation} top-{self.top_k} D{self.d_model} F{self.d_expert} "
            f"E{self.n_experts} T{self.tokens}"
        )

    @property
    def is_decode(self) -> bool:
        """Whether weights and not arithmetic rule."""
        return self.tokens < 256


@dataclass(frozen=True, slots=True)
class Found:
    """What one case gave: seconds of CPU by contestant, and the rest.

    Attributes:
        seconds: the least of all rounds.
        errors: relative to our f32 answer.
        roofline_s: what reading and computing must take at the rates found beside.
        waste: rows that static gating computes over rows that there are.
        temporary_mb: peak of temporary memory, where it was asked for.
    """

    case: Case
    seconds: dict[str, float]
    errors: dict[str, float]
    roofline_s: float
    waste: float
    temporary_mb: dict[str, float]


def measure_case(case: Case, budget_s: float) -> Found:
    """Run the contestants of a case in turn, round after round, for about `budget_s` each round."""
    layer, grouped = _layer(case)
    x_TD = zipf_tokens(case.tokens, case.d_model, case.n_experts, case.zipf, seed=1)
    counts = route(x_TD, layer.router).counts_E.tolist()
    contestants = _contestants(case, layer, grouped, max(counts))
    answers = {name: run(x_TD) for name, run in contestants.items()}
    exact = answers[PLAIN]
    errors = {name: float((y - exact).norm() / exact.norm()) for name, y in answers.items()}
    del answers
    calls = {name: _call(run, x_TD) for name, run in contestants.items()}
    seconds = _interleaved(calls | _probes(grouped), budget_s)
    roofline_s = _roofline_s(grouped.shape, counts, seconds)
    temporary = {}
    if case.is_static and not case.is_decode:
        temporary = {n: _temporary_mb(calls[n]) for n in (OURS, EINSUM, PADDED)}
    waste = case.n_experts * max(counts) / sum(counts)
    return Found(case, seconds, errors, roofline_s, waste, temporary)


@contextmanager
def one_thread() -> Iterator[None]:
    """One core for torch, without gradients."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(threads)


def _call(run: Run, x_TD: torch.Tensor) -> Callable[[], object]:
    return lambda: run(x_TD)


def _layer(case: Case) -> tuple[MoELayer, GroupedExperts]:
    torch.manual_seed(0)
    shape = ExpertShape(case.d_model, case.d_expert, case.activation)
    layer = MoELayer(0, case.n_experts, case.top_k, shape, is_normalised=case.top_k > 1)
    layer.requires_grad_(requires_grad=False)
    layer.router.weight.copy_(torch.eye(case.n_experts, case.d_model))
    grouped = layer.experts
    if not isinstance(grouped, GroupedExperts):
        raise TypeError("a fresh layer has experts of its own")
    return layer, grouped


def _served(layer: MoELayer, grouped: GroupedExperts, kernel: str) -> MoELayer:
    """The same layer from a kernel; the weights stay with the first."""
    with torch.device("meta"):
        other = MoELayer(0, layer.n_experts, layer.router.top_k, grouped.shape)
    other.router = layer.router
    other.experts = grouped
    serve_resident([other], kernel_named(kernel))
    return other


def _contestants(
    case: Case, layer: MoELayer, grouped: GroupedExperts, capacity: int
) -> dict[str, Run]:
    router = layer.router
    runs: dict[str, Run] = {
        OURS: _served(layer, grouped, best_kernel().name),
        PLAIN: _served(layer, grouped, "plain"),
        RUNTIME: runtime_moe(router, grouped),
    }
    if case.activation == "swiglu":
        runs[f"{MIXTRAL}, eager"] = mixtral_block(router, grouped, "eager")
        runs[f"{MIXTRAL}, grouped_mm"] = mixtral_block(router, grouped, "grouped_mm")
    elif case.top_k == 1:
        runs[SWITCH] = switch_block(router, grouped)
    if case.is_static:
        runs[EINSUM] = static_einsum(router, grouped, capacity)
        runs[PADDED] = padded_bmm(router, grouped, capacity)
    for kernel in kernels().values():
        if kernel.precision == "8bit" and kernel.device == "cpu" and kernel.is_usable():
            runs[f"{EIGHT_BIT}, {kernel.name}"] = _served(layer, grouped, kernel.name)
    return runs


def _probes(grouped: GroupedExperts) -> dict[str, Callable[[], object]]:
    """What finds the rates: a long read, and one expert on many rows by both kernels."""
    long = torch.ones(_PROBE_FLOATS)
    rows = torch.randn(_PROBE_ROWS, grouped.shape.d_model)
    probes: dict[str, Callable[[], object]] = {"probe stream": long.sum}
    for name in ("plain", best_kernel(is_single=True).name):
        pack = kernel_named(name).pack
        if pack is not None:
            expert = pack(grouped.weights_of(0), "relu" if _is_ungated(grouped) else "swiglu")
            probes[f"probe {name}"] = _call(expert, rows)
    return probes


def _is_ungated(grouped: GroupedExperts) -> bool:
    return grouped.shape.activation != "swiglu"


def _roofline_s(shape: ExpertShape, counts: Sequence[int], seconds: dict[str, float]) -> float:
    """The least time of these loads; takes the probes out of `seconds`."""
    stream_s = seconds.pop("probe stream") / (_PROBE_FLOATS * _FLOAT_BYTES)
    probes = [name for name in seconds if name.startswith("probe")]
    row_s = min(seconds.pop(name) for name in probes) / _PROBE_ROWS
    read_s = shape.parameters * _FLOAT_BYTES * stream_s
    return sum(max(read_s, count * row_s) for count in counts if count)


def _interleaved(calls: Mapping[str, Callable[[], object]], budget_s: float) -> dict[str, float]:
    """The least CPU time of each, all in turn; the slow ones stand back after two rounds."""
    least: dict[str, float] = {}
    began = time.thread_time()
    rounds = 0
    while rounds < 4 or time.thread_time() - began < budget_s:
        for name, call in calls.items():
            if rounds >= 2 and least[name] > _SLOW_S:
                continue
            before = time.thread_time()
            call()
            spent_s = time.thread_time() - before
            least[name] = min(spent_s, least.get(name, spent_s))
        rounds += 1
    return least


def _temporary_mb(call: Callable[[], object]) -> float:
    """How far resident memory rises above where it stands, in one call (Linux)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before_kb = _status_kb("VmRSS")
    call()
    return (_status_kb("VmHWM") - before_kb) / 1e3


def _status_kb(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))
