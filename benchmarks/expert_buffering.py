"""Expert buffering: what each policy misses, beside the optimum, and what serving then costs."""

import subprocess
import sys
from dataclasses import dataclass
from statistics import median

import msgspec
import numpy as np
import torch

from benchmarks.claims import ROOT, Claim, Options, claim, main
from benchmarks.expert_memory import Asked, Found
from benchmarks.expert_traces import PROMPTS, record, served_lm
from federation.errors import ConfigError
from moe_serving.buffering.policies import DEFAULT, POLICIES
from moe_serving.buffering.simulation import Tally, best_possible, simulate
from moe_serving.buffering.synthetic import Recipe, synthesise
from moe_serving.buffering.trace import Trace
from moe_serving.checkpoint import expert_ranges, save
from moe_serving.kernels.registry import best_kernel
from moe_serving.models.config import DecoderConfig
from moe_serving.models.decoder import DecoderLM

BUDGETS = (0.12, 0.25, 0.5)
HALF_A_POINT = 0.005
WARM_UP = 1 / 8
WHOLE, HALF = "whole", "half"

BIG = DecoderConfig(
    vocabulary_size=259, d_model=256, n_layers=4, n_heads=4, n_kv_heads=2, d_head=64,
    d_expert=512, n_experts=16, top_k=2, max_length=512,
)  # fmt: skip
"""64 experts of 1.6 MB: 100 MB, so that other memory is small beside it."""

NOT_EXPERTS_BYTES = 32 << 20
"""Allowed beside the budget, whatever its size: the dense part, the cache of keys, modules that
are imported with the first model. About 24 MiB were measured with each budget."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A trace, and how many experts a layer's visit needs on average."""

    name: str
    trace: Trace
    active: float


def measure(options: Options) -> list[Claim]:
    """Miss rates by policy and budget, and a model of twice the budget served within it.

    Traces are recorded from a served byte-level language model reading held-out speeches and
    Spanish verses, token by token in 1, 4 and 16 streams (HEADWATER_MOE_LM names another model),
    and made by the recipes of moe_serving.buffering.synthetic. One pool of slots holds 12, 25 or
    50 % of all experts; the first eighth of a trace warms up; a pass is one token a stream.
    Belady's MIN, which knows the future and may let misses pass, is the bound.
    """
    settings = _recorded(options) + _synthetic(options)
    claims, gaps = [], []
    for setting in settings:
        options.tell(setting.name)
        for budget in (0.25,) if options.is_quick else BUDGETS:
            found, gap = _miss_claims(setting, budget)
            claims += found
            gaps.append(gap)
    worst = claim(
        f"{DEFAULT} behind the first policy, at worst of {len(gaps)} settings",
        max(0.0, 100 * max(gaps)),
        "points",
        goal=100 * HALF_A_POINT,
    )
    return [worst, *claims, *_serving_claims(options)]


def _recorded(options: Options) -> list[Setting]:
    folder = served_lm(options)
    sizes = ((4, 200),) if options.is_quick else ((1, 500), (4, 350), (16, 200))
    return [
        _setting(
            f"recorded, {prompts}, {streams} streams", record(folder, prompts, streams, passes)
        )
        for prompts in PROMPTS
        for streams, passes in sizes
    ]


def _synthetic(options: Options) -> list[Setting]:
    recipes = {
        "synthetic, 8 streams": Recipe(streams=8, passes=200 if options.is_quick else 600),
    }
    if not options.is_quick:
        recipes["synthetic, 1 stream"] = Recipe(streams=1, passes=1500)
        recipes["synthetic, 32 streams, top-1"] = Recipe(streams=32, top_k=1, passes=400)
    return [
        _setting(name, synthesise(recipe, np.random.default_rng(0)))
        for name, recipe in recipes.items()
    ]


def _setting(name: str, trace: Trace) -> Setting:
    return Setting(name, trace, float((trace.counts_VE > 0).sum(axis=1).mean()))


def _miss_claims(setting: Setting, budget: float) -> tuple[list[Claim], float]:
    """A row for each policy, and how far the default's miss rate is above the least."""
    trace = setting.trace
    capacity = int(budget * trace.shape.layers * trace.shape.experts)
    skip = int(WARM_UP * len(trace))
    missed = {name: _missed(simulate(trace, name, capacity, skip=skip)) for name in POLICIES}
    least = _missed(best_possible(trace, capacity, skip=skip))
    first = min(missed.values())
    goals = {DEFAULT: first + HALF_A_POINT}
    if setting.active * trace.shape.layers > capacity:
        goals["paper"] = missed["lru"]
    where = f"{setting.name} ({setting.active:.1f} active), {budget:.0%}"
    rows = [
        claim(
            f"{where}: {name}", rate, "missed",
            peer="Belady's MIN", peer_value=least, goal=goals.get(name),
        )
        for name, rate in missed.items()
    ]  # fmt: skip
    return rows, missed[DEFAULT] - first


def _missed(tally: Tally) -> float:
    return 1 - tally.hit_rate


def _serving_claims(options: Options) -> list[Claim]:
    """A model of 100 MB of experts, whole and within budgets, each in a process of its own."""
    folder = options.folder / "big"
    torch.manual_seed(0)
    save(DecoderLM(BIG), folder)
    ranges = expert_ranges(folder)
    total = ranges.size_bytes * BIG.n_layers * BIG.n_experts
    passes, rounds = (40, 1) if options.is_quick else (60, 2)
    best = best_kernel(is_single=True).name
    cases = {
        WHOLE: Asked(folder=str(folder), passes=passes),
        HALF: Asked(folder=str(folder), passes=passes, budget_bytes=total // 2),
    }
    if not options.is_quick:
        whole, half = cases[WHOLE], cases[HALF]
        cases |= {
            f"whole, {best} kernel": msgspec.structs.replace(whole, kernel=best),
            f"half, {best} kernel": msgspec.structs.replace(half, kernel=best),
            "half, next gate asked": msgspec.structs.replace(half, foreseen_most=4),
            "half, lru": msgspec.structs.replace(half, policy="lru"),
            "half, paper": msgspec.structs.replace(half, policy="paper"),
            "quarter": msgspec.structs.replace(half, budget_bytes=total // 4),
        }
    found: dict[str, list[Found]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, asked in cases.items():
            options.tell(f"serving {total >> 20} MiB of experts: {name}")
            found[name].append(_serve(asked))
    return [
        row
        for name, asked in cases.items()
        for row in _rows(name, asked, found[name], found[WHOLE])
    ]


def _serve(asked: Asked) -> Found:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.expert_memory", msgspec.json.encode(asked).decode()],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    if done.returncode:
        raise ConfigError(f"serving a model failed: {done.stderr[-2000:]}")
    return msgspec.json.decode(done.stdout, type=Found)


def _rows(case: str, asked: Asked, found: list[Found], whole: list[Found]) -> list[Claim]:
    name, budget = f"serving, {case}", asked.budget_bytes
    cpu_ms = median(1e3 * each.cpu_s / each.tokens for each in found)
    whole_ms = median(1e3 * each.cpu_s / each.tokens for each in whole)
    rows = [claim(f"{name}: CPU a token", cpu_ms, "ms", peer=WHOLE, peer_value=whole_ms)]
    mib = 1 / (1 << 20)
    grown = max(each.grown_bytes for each in found) * mib
    whole_grown = max(each.grown_bytes for each in whole) * mib
    allowed = (budget + NOT_EXPERTS_BYTES) * mib if budget else None
    rows.append(
        claim(
            f"{name}: own memory of the process grew by", grown, "MiB",
            peer=WHOLE, peer_value=whole_grown, goal=allowed,
        )
    )  # fmt: skip
    if not budget:
        return rows
    if asked.kernel == "plain":
        differing = sum(each.digest != whole[0].digest for each in found)
        rows.append(claim(f"{name}: runs whose logits differ in a bit", differing, "", goal=0))
    last = found[-1]
    peak = max(each.peak_bytes for each in found)
    return [
        *rows,
        claim(f"{name}: experts held at most", peak * mib, "MiB", goal=budget * mib),
        claim(f"{name}: missed", 1 - last.hit_rate, ""),
        claim(f"{name}: misses not foreseen", 1 - last.foreseen_share, ""),
        claim(f"{name}: waiting for reads, a token", 1e3 * last.stall_s / last.tokens, "ms"),
    ]


if __name__ == "__main__":
    main("expert_buffering", measure)
