"""What the two processes of test_expert_parallel do, one role after the other."""

import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from federation.errors import StoreError
from moe_serving.buffering.source import FileSource
from moe_serving.buffering.store import Settings, open_store
from moe_serving.buffering.trace import Shape, TraceRecorder
from moe_serving.checkpoint import expert_ranges, load
from moe_serving.kernels.plain import pack_plain
from moe_serving.models.decoder import DecoderLM
from moe_serving.parallel import BufferedShare, ExpertParallel, HeldShare, Share
from moe_serving.placement.record import Placement, place
from moe_serving.placement.replan import replan

LAYERS, EXPERTS, STEPS, STREAMS = 2, 8, 12, 4
PATIENCE_S = 30.0


def tokens() -> Tensor:
    """The same sequences for whoever asks, [STEPS, STREAMS]."""
    return torch.randint(64, (STEPS, STREAMS), generator=torch.Generator().manual_seed(5))


def answer(
    model: DecoderLM, mine: slice, *, before_step: dict[int, object] | None = None
) -> Tensor:
    """Logits of some of the streams, step by step; calls what is to be done before a step."""
    wanted = tokens()[:, mine]
    count = wanted.shape[1]
    cache, slots = model.new_cache(count), torch.arange(count)
    found = []
    for step in range(STEPS):
        action = (before_step or {}).get(step)
        if callable(action):
            action()
        found.append(model.step(wanted[step], torch.full((count,), step), slots, cache))
    return torch.stack(found)


def halves() -> list[Placement]:
    """The first half of the experts on device 0, the rest on device 1."""
    return [place(2, [[e // 4] for e in range(EXPERTS)])] * LAYERS


def mixed() -> list[Placement]:
    """Another placement for each layer, with experts on both devices."""
    copied = [[0, 1], [1], [0], [1], [0], [1], [0, 1], [0]]
    turned = [[1], [0], [1], [0], [0], [1], [1], [0, 1]]
    return [place(2, copied), place(2, turned)]


def parallel(folder: Path, share: Share | None = None) -> tuple[DecoderLM, ExpertParallel, Share]:
    """A model whose experts are spread over the group."""
    share = share or HeldShare(FileSource(expert_ranges(folder)), pack_plain)
    group = ExpertParallel(share, halves(), d_model=32)
    # No expert of the model itself is read: the layers ask the group.
    store = open_store(folder, Settings(expert_ranges(folder).size_bytes * 2), pack=pack_plain)
    model = load(folder, store=store)
    store.close()
    assert isinstance(model, DecoderLM)
    group.attach(model.moe_layers())
    return model, group, share


def both_serve(rank: int, folder: Path) -> Tensor:
    """Each rank serves half of the streams; placements change twice on the way."""
    model, group, share = parallel(folder)
    recorder = TraceRecorder(expert_shape(folder))
    group.listener = recorder.record

    def propose() -> None:
        group.propose(mixed() if rank == 0 else None)

    def meet_until_moved() -> None:
        wait_for_version(group, 1)

    found = answer(
        model, slice(2 * rank, 2 * rank + 2), before_step={3: propose, 7: meet_until_moved}
    )
    assert isinstance(share, HeldShare)
    held = sum(len(placement.held_by(rank)) for placement in mixed())
    assert share.size_bytes == held * expert_ranges(folder).size_bytes
    assert int(recorder.trace().counts_VE.sum()) == LAYERS * STEPS * STREAMS * 2
    group.close()
    return found


def expert_shape(folder: Path) -> Shape:
    """Layers and experts of the saved model."""
    return Shape(LAYERS, len(expert_ranges(folder).offsets[0]))


def wait_for_version(group: ExpertParallel, version: int) -> None:
    """Meets the others until all have changed; each rank counts the same meetings."""
    deadline_s = time.monotonic() + PATIENCE_S
    while group.version < version and time.monotonic() < deadline_s:
        group.beat()
    assert group.version == version


def one_leads(rank: int, folder: Path) -> Tensor:
    """Rank 0 serves all streams, rank 1 follows with a budget; it is balanced anew on the way."""
    size = expert_ranges(folder).size_bytes
    budget = open_store(folder, Settings(5 * size), pack=pack_plain)
    model, group, _ = parallel(folder, BufferedShare(budget) if rank else None)
    if rank:
        group.follow()
        assert budget.counters().misses > 0
        assert budget.counters().peak_bytes <= 5 * size
        budget.close()
        return torch.empty(0)
    recorder = TraceRecorder(expert_shape(folder))
    group.listener = recorder.record

    def balance() -> None:
        recorded = recorder.trace()
        planned = replan(recorded, group.placements, EXPERTS // 2 + 1, least_gain=-1.0)
        group.propose(mixed() if planned == group.placements else planned)
        wait_for_version(group, 1)

    found = answer(model, slice(0, STREAMS), before_step={6: balance})
    group.stop()
    group.close()
    return found


def one_fails(rank: int, folder: Path) -> Tensor:
    """Rank 1's experts cannot be read for a while: all learn of it, and go on after."""
    source = FileSource(expert_ranges(folder))
    group = ExpertParallel(HeldShare(source, pack_plain), halves(), d_model=32)
    weights = folder / "model.safetensors"
    share = group._share
    assert isinstance(share, HeldShare)
    dist.barrier()  # Both have read their experts; only now the file is damaged.
    if rank:
        broken = open_store(folder, Settings(source.size_bytes * 2), pack=pack_plain)
        group._share = BufferedShare(broken)
        content = weights.read_bytes()
        weights.write_bytes(content[: len(content) // 8])
    rows = torch.ones(EXPERTS, 32)
    dist.barrier()
    try:
        group.run(1, rows, [1] * EXPERTS)
    except StoreError:
        failed = True
    else:
        failed = False
    dist.barrier()
    if rank:
        weights.write_bytes(content)
    dist.barrier()
    found = group.run(1, rows, [1] * EXPERTS)
    assert failed
    assert (group.failure is not None) == (rank == 1)
    group.close()
    return found


ROLES = (both_serve, one_leads, one_fails)


def main() -> None:
    """Joins the group, plays all roles, and writes what each found."""
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    try:
        for role in ROLES:
            found = role(rank, folder / "model")
            np.save(folder / f"{role.__name__}.{rank}.npy", found.numpy())
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
