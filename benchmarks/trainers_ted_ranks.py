"""What `benchmarks.trainers_ted` has each rank do, and one process alone for comparison."""

import os
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.testing._internal.distributed.fake_pg import FakeStore

from cloud.trainers.parallel.mesh import Mesh, open_mesh, shape_for
from cloud.trainers.parallel.metering import Meter
from cloud.trainers.parallel.parallelize import parallelize
from cloud.trainers.parallel.shards import cuts_of, whole_weights
from cloud.trainers.parallel.state import ShardedState
from cloud.trainers.plans import OptimizerPlan
from cloud.trainers.state import TrainingState
from moe_serving.models.classifier import WindowClassifier
from moe_serving.models.config import ClassifierConfig

RANKS = 4
ADAM = OptimizerPlan(learning_rate=2e-3, weight_decay=0.01)
KINDS = ("all-reduce", "all-to-all", "all-gather")
WAYS = {"neither": (False, False), "keeping": (False, True), "dropping": (True, False)}
WAYS |= {"both": (True, True)}
TILE = 1000
BATCH = 16
MEMORY_WIDTH = 128
"""Of the model whose bytes are counted: what is not split, norms and ends, is under 1 % of it."""

Found = dict[str, Tensor]
Work = Callable[[int], Mapping[str, Tensor]]


def network(n_experts: int = 4, d_model: int = 32, n_layers: int = 1) -> WindowClassifier:
    """A classifier whose experts are four times as wide as it; the same on every call."""
    torch.manual_seed(0)
    config = ClassifierConfig(
        n_channels=3,
        window_length=16,
        patch_length=4,
        n_classes=4,
        d_model=d_model,
        n_layers=n_layers,
        n_heads=4,
        d_expert=4 * d_model,
        n_experts=n_experts,
        top_k=1,
    )
    return WindowClassifier(config)


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Windows, and the quarter in which their first axis is the largest on the whole."""
    x = torch.randn(BATCH, 16, 3, generator=torch.Generator().manual_seed(step))
    return x, x[:, :, 0].view(BATCH, 4, 4).sum(2).argmax(1)


def on_ranks(work: Work, folder: Path) -> list[Found]:
    """What `work` finds on each rank, each a process of its own with one thread."""
    mp.spawn(_run, args=(work, str(folder)), nprocs=RANKS)  # type: ignore[attr-defined, no-untyped-call]
    return [load_file(folder / f"rank-{rank}.safetensors") for rank in range(RANKS)]


def _run(rank: int, work: Work, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(f"{folder}/store", RANKS),  # type: ignore[attr-defined]
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=120),
    )
    try:
        found = {name: tensor.contiguous() for name, tensor in work(rank).items()}
        save_file(found, f"{folder}/rank-{rank}.safetensors")
    finally:
        dist.destroy_process_group()


def alone(steps: int) -> Found:
    """Outputs, gradients and losses of the model on one device, and the steps' CPU seconds."""
    found: Found = {}
    model = network()
    x, y = batch(0)
    outputs = model(x)
    cross_entropy(outputs, y).backward()  # type: ignore[no-untyped-call]
    found["out"] = outputs.detach()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[f"gradient/{name}"] = parameter.grad.clone()
    model = network()
    state, losses, began = TrainingState(model, ADAM), [], time.process_time()
    for step in range(steps):
        x, y = batch(step)
        loss = cross_entropy(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        state.step(ADAM.learning_rate)
        losses.append(loss.detach())
    found["cpu_s"] = torch.tensor(time.process_time() - began)
    return found | {"losses": torch.stack(losses)}


def everything(_rank: int, *, steps: int) -> Found:
    """All that is found out on four ranks, in one start of the processes."""
    found: Found = {}
    meshes = {"2x2": open_on(2, 2, 8), "2x1x2": open_on(2, 1, 8)}
    for name, mesh in meshes.items():
        for way, (drops, keeps) in WAYS.items():
            of_pass = _pass(mesh, drops=drops, keeps=keeps)
            found |= {f"{name}/{way}/{key}": tensor for key, tensor in of_pass.items()}
    found["losses"], found["cpu_s"] = _losses(meshes["2x2"], steps)
    for n_experts in (2, 4, 8):
        of_tiles = _tiles(meshes["2x2"], n_experts)
        found |= {f"tiles/{n_experts}/{key}": tensor for key, tensor in of_tiles.items()}
    found["kept_bytes"] = torch.tensor(kept_bytes(open_on(2, 2, 2), 2, MEMORY_WIDTH))
    return found


def open_on(tensor: int, expert: int, n_experts: int) -> Mesh:
    """A mesh of all ranks there are."""
    ranks = dist.get_world_size()
    return open_mesh(shape_for(ranks, tensor=tensor, expert=expert, n_experts=n_experts))


def _share(whole: Tensor, mesh: Mesh) -> Tensor:
    return whole.chunk(mesh.shape.data)[mesh.data_rank]


def _pass(mesh: Mesh, *, drops: bool, keeps: bool) -> Found:
    """One forward and backward: outputs, gradients of the mean loss, and what travelled."""
    model = parallelize(network(), mesh, drops_duplicates=drops, keeps_collectives=keeps)
    x, y = (_share(part, mesh) for part in batch(0))
    with Meter() as meter:
        outputs = model(x)
        cross_entropy(outputs, y).backward()  # type: ignore[no-untyped-call]
    parts = [torch.empty_like(outputs) for _ in range(mesh.shape.data)]
    dist.all_gather(parts, outputs.detach(), group=mesh.data)
    sent = torch.tensor([meter.sent_bytes[kind] for kind in KINDS])
    dist.all_reduce(sent)
    found = {
        "calls": torch.tensor([meter.calls[kind] for kind in KINDS]),
        "sent": sent,
        "out": torch.cat(parts),
    }
    for name, gradient in whole_weights(model, mesh, gradients=True).items():
        group = mesh.expert_data if cuts_of(model)[name].is_expert else mesh.data
        dist.all_reduce(gradient, group=group)
        found[f"gradient/{name}"] = gradient / mesh.shape.data
    return found


def _losses(mesh: Mesh, steps: int) -> tuple[Tensor, Tensor]:
    """The mean loss of each step, and the CPU seconds that this rank took for all."""
    model = parallelize(network(), mesh)
    state, losses, began = ShardedState(model, mesh, ADAM), [], time.process_time()
    for step in range(steps):
        x, y = (_share(part, mesh) for part in batch(step))
        loss = cross_entropy(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        state.step(ADAM.learning_rate)
        losses.append(loss.detach())
    spent = torch.tensor(time.process_time() - began)
    mean = torch.stack(losses)
    dist.all_reduce(mean, group=mesh.data)
    return mean / mesh.shape.data, spent


def _tiles(mesh: Mesh, n_experts: int) -> Found:
    """Two steps in bfloat16 in tiles, and two at once: their buffers, and whether bits agree."""
    kept, buffers = [], []
    for tile in (TILE, 10**9):
        model = parallelize(network(n_experts), mesh, recomputes=False)
        state = ShardedState(model, mesh, ADAM, compute=torch.bfloat16, tile=tile)
        for step in range(2):
            x, y = (_share(part, mesh) for part in batch(step))
            cross_entropy(model(x.bfloat16()).float(), y).backward()  # type: ignore[no-untyped-call]
            state.step(ADAM.learning_rate)
        kept.append(state.tensors())
        buffers.append(state.peak_buffer_bytes)
    same = all(torch.equal(tensor, kept[1][name]) for name, tensor in kept[0].items())
    return {"buffer": torch.tensor(buffers), "differ": torch.tensor(int(not same))}


def state_bytes(ranks: int, tensor: int, n_experts: int) -> tuple[int, int]:
    """What rank 0 of so many keeps, in bfloat16 with AdamW, and the parameters of the base model.

    The other ranks are not there: collectives of this one's process group move nothing, and the
    bytes of its tensors are what they are. One expert lies on a rank of the expert group, as in
    the paper. The base model has one expert in every layer.
    """
    base = sum(parameter.numel() for parameter in network(1, MEMORY_WIDTH).parameters())
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        return kept_bytes(open_on(tensor, n_experts, n_experts), n_experts, MEMORY_WIDTH), base
    finally:
        dist.destroy_process_group()


def kept_bytes(mesh: Mesh, n_experts: int, d_model: int) -> int:
    """What this rank keeps between steps: parameters, gradients, master and moments."""
    model = parallelize(network(n_experts, d_model), mesh, recomputes=False)
    state = ShardedState(model, mesh, ADAM, compute=torch.bfloat16, tile=2**20)
    state.step(ADAM.learning_rate)
    return sum(size for kind, size in state.sizes().items() if kind != "temporary")
