"""A process that serves one language model whole, or within a byte budget, and says its cost.

Run by `benchmarks.expert_buffering` in a process of its own, so that memory is that of one model.
"""

import gc
import sys
import time
from pathlib import Path

import msgspec
import psutil
import torch

from federation.errors import ConfigError
from moe_serving.buffering.gates import watch_next_gates
from moe_serving.buffering.policies import DEFAULT
from moe_serving.buffering.store import BufferedStore, Settings, open_store
from moe_serving.checkpoint import load
from moe_serving.kernels.registry import kernel_named, serve_resident
from moe_serving.models.decoder import DecoderLM

STREAMS = 4


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What to serve: with a budget of 0 the whole model is in memory."""

    folder: str
    passes: int
    budget_bytes: int = 0
    kernel: str = "plain"
    policy: str = DEFAULT
    foreseen_most: int = 0


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """What it took. `grown_bytes`: its own resident memory over that before the model was opened.

    Own memory is all but pages of files, which the system may take back: libraries, mapped
    checkpoints. `digest` is of the logits: the sum of their bits.
    """

    cpu_s: float
    wall_s: float
    tokens: int
    grown_bytes: int
    peak_bytes: int
    hit_rate: float
    foreseen_share: float
    stall_s: float
    digest: int


def serve(asked: Asked) -> Found:
    """Serves random tokens: half of the passes unmeasured, to warm up, then the other half."""
    torch.set_num_threads(1)
    _use_torch(asked.kernel)
    process = psutil.Process()
    before = _own_bytes(process)
    model, store = _open(asked)
    rows = torch.randint(
        model.config.vocabulary_size, (2, asked.passes, STREAMS),
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    _run(model, rows[0])
    counted = store.counters() if store else None
    began_s, cpu_s = time.perf_counter(), time.process_time()
    digest = _run(model, rows[1])
    cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - began_s
    gc.collect()
    grown = _own_bytes(process) - before
    after = store.counters() if store else None
    uses, hits, foreseen, stall_s = 1, 1, 0, 0.0
    if counted and after:
        hits = after.hits - counted.hits
        uses = hits + after.misses - counted.misses
        foreseen = after.foreseen - counted.foreseen
        stall_s = after.stall_s - counted.stall_s
    if store:
        store.close()
    return Found(
        cpu_s=cpu_s,
        wall_s=wall_s,
        tokens=asked.passes * STREAMS,
        grown_bytes=grown,
        peak_bytes=after.peak_bytes if after else 0,
        hit_rate=hits / uses,
        foreseen_share=foreseen / max(1, uses - hits),
        stall_s=stall_s,
        digest=digest,
    )


def _open(asked: Asked) -> tuple[DecoderLM, BufferedStore | None]:
    folder, store = Path(asked.folder), None
    if asked.budget_bytes:
        settings = Settings(asked.budget_bytes, asked.policy, asked.foreseen_most)
        pack = kernel_named(asked.kernel).pack
        if pack is None:
            raise ConfigError(
                f"kernel {asked.kernel} runs whole layers; a store needs single experts"
            )
        store = open_store(folder, settings, pack=pack)
    model = load(folder, store=store)
    if not isinstance(model, DecoderLM):
        raise ConfigError(f"{folder} holds no language model")
    if store is None:
        serve_resident(model.moe_layers(), kernel_named(asked.kernel))
    elif asked.foreseen_most:
        watch_next_gates(list(model.moe_layers()), store.expect)
    return model, store


def _run(model: DecoderLM, rows: torch.Tensor) -> int:
    cache, slots = model.new_cache(STREAMS), torch.arange(STREAMS)
    digest = 0
    for step, tokens in enumerate(rows):
        logits = model.step(tokens, torch.full((STREAMS,), step), slots, cache)
        digest += int(logits.view(torch.int32).sum(dtype=torch.int64))
    return digest


def _own_bytes(process: psutil.Process) -> int:
    memory = process.memory_info()
    return int(memory.rss - memory.shared)


def _use_torch(kernel: str) -> None:
    """Lets torch load what it loads at the first product, before memory is looked at."""
    torch.nn.functional.linear(torch.ones(64, 64), torch.ones(64, 64))
    kernel_named(kernel)


if __name__ == "__main__":
    asked = msgspec.json.decode(sys.argv[1], type=Asked)
    sys.stdout.write(msgspec.json.encode(serve(asked)).decode())
