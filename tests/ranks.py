"""Several processes that train together, on this machine, over gloo."""

import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor

Work = Callable[[int, int], Mapping[str, Tensor]]
"""(rank, ranks) -> what this rank found out; a function of a module, so that it can be called."""

PATIENCE = timedelta(seconds=60)


def on_ranks(work: Work, ranks: int, folder: Path) -> list[dict[str, Tensor]]:
    """What `work` gives on each rank; a rank that fails fails the test with its traceback."""
    mp.spawn(_run, args=(work, ranks, str(folder)), nprocs=ranks)
    return [load_file(folder / f"rank-{rank}.safetensors") for rank in range(ranks)]


def _run(rank: int, work: Work, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=PATIENCE)
    try:
        found = {name: tensor.contiguous() for name, tensor in work(rank, ranks).items()}
        save_file(found, f"{folder}/rank-{rank}.safetensors")
    finally:
        dist.destroy_process_group()
