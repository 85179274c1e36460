"""A mixture of experts trains over ranks as on one device, and no message is sent twice."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cloud.trainers.parallel.mesh import Shape, open_mesh, rank_tables, shape_for
from cloud.trainers.parallel.metering import Meter
from cloud.trainers.parallel.parallelize import parallelize
from cloud.trainers.parallel.shards import cuts_of, whole_weights
from cloud.trainers.parallel.state import ShardedState
from cloud.trainers.plans import OptimizerPlan
from cloud.trainers.state import TrainingState
from federation.errors import ConfigError
from moe_serving.models.classifier import WindowClassifier
from moe_serving.models.config import ClassifierConfig
from tests.ranks import on_ranks

CONFIG = ClassifierConfig(
    n_channels=6,
    window_length=40,
    patch_length=10,
    n_classes=5,
    d_model=32,
    n_layers=1,
    n_heads=4,
    d_expert=24,
    n_experts=4,
    top_k=2,
)
ADAM = OptimizerPlan(learning_rate=1e-2, weight_decay=0.01)
PLAN = OptimizerPlan(name="sgd", learning_rate=1e-2, weight_decay=0.01)
WAYS = ((False, False), (False, True), (True, False), (True, True))
STEPS = 3


def _model() -> WindowClassifier:
    torch.manual_seed(0)
    return WindowClassifier(CONFIG)


def _batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(12, 40, 6, generator=generator)
    return x, torch.randint(0, 5, (12,), generator=generator)


def _pass(ranks: int, shape: tuple[int, int], way: tuple[bool, bool]) -> Mapping[str, Tensor]:
    """One forward and backward, and three steps: outputs, gradients, weights, what travelled."""
    mesh = open_mesh(shape_for(ranks, tensor=shape[0], expert=shape[1], n_experts=4))
    model = parallelize(_model(), mesh, drops_duplicates=way[0], keeps_collectives=way[1])
    assert isinstance(model, nn.Module)
    found: dict[str, Tensor] = {}
    share = partial(_share, place=mesh.data_rank, of=mesh.shape.data)
    x, y = (share(t) for t in _batch(0))
    with Meter() as meter:
        outputs = model(x)
        cross_entropy(outputs, y).backward()
    calls = torch.tensor([meter.calls[k] for k in ("all-reduce", "all-to-all")])
    sent = torch.tensor([meter.sent_bytes[k] for k in ("all-reduce", "all-to-all")])
    dist.all_reduce(sent)
    found |= {"calls": calls, "sent": sent, "out": _joined(outputs.detach(), mesh.data)}
    for name, gradient in whole_weights(model, mesh, gradients=True).items():
        group = mesh.expert_data if cuts_of(model)[name].is_expert else mesh.data
        dist.all_reduce(gradient, group=group)
        found[f"gradient/{name}"] = gradient / mesh.shape.data
    state = ShardedState(model, mesh, PLAN, tile=500)
    for step in range(STEPS):
        x, y = (share(t) for t in _batch(step))
        cross_entropy(model(x), y).backward()
        state.step(PLAN.learning_rate)
    found |= {f"weight/{name}": tensor for name, tensor in state.weights().items()}
    return found


def _share(whole: Tensor, place: int, of: int) -> Tensor:
    return whole.chunk(of)[place]


def _joined(mine: Tensor, group: dist.ProcessGroup) -> Tensor:
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mine, group=group)
    return torch.cat(parts)


def _all_ways(_rank: int, ranks: int) -> Mapping[str, Tensor]:
    found: dict[str, Tensor] = {}
    for number, way in enumerate(WAYS):
        found |= {f"{number}/{k}": t for k, t in _pass(ranks, (2, 2), way).items()}
    found |= {f"4/{k}": t for k, t in _pass(ranks, (2, 1), (True, True)).items()}
    return found


def _alone() -> dict[str, Tensor]:
    model = _model()
    x, y = _batch(0)
    outputs = model(x)
    cross_entropy(outputs, y).backward()
    found = {"out": outputs.detach()}
    found |= {
        f"gradient/{name}": p.grad for name, p in model.named_parameters() if p.grad is not None
    }
    model = _model()
    state = TrainingState(model, PLAN)
    for step in range(STEPS):
        x, y = _batch(step)
        cross_entropy(model(x), y).backward()
        state.step(PLAN.learning_rate)
    return found | {f"weight/{name}": tensor for name, tensor in state.weights().items()}


@pytest.mark.slow
def test_four_ranks_answer_as_one_and_send_what_the_paper_says(tmp_path: Path) -> None:
    """Outputs, gradients and steps are one device's; collectives 6 to 4, all-to-all to a third.

    Each way of sending on two by two ranks, and two by one by two with all of it.
    """
    first = on_ranks(_all_ways, 4, tmp_path)[0]
    alone = _alone()

    for number in range(5):
        for name, expected in alone.items():
            error = (first[f"{number}/{name}"] - expected).abs().max()
            assert error <= 1e-5, (number, name, float(error))
    calls = [first[f"{number}/calls"].tolist() for number in range(4)]
    assert calls == [[6, 6], [4, 4], [6, 6], [4, 4]]
    sent = [first[f"{number}/sent"][1].item() for number in range(4)]
    assert [bytes_ / sent[0] for bytes_ in sent] == pytest.approx([1, 2 / 3, 1 / 2, 1 / 3])
    reduced = [first[f"{number}/sent"][0].item() for number in range(4)]
    assert reduced[1] / reduced[0] == pytest.approx(2 / 3)


def _two_ranks(_rank: int, ranks: int) -> Mapping[str, Tensor]:
    found = dict(_pass(ranks, (2, 1), (True, True)))
    mesh = open_mesh(shape_for(ranks, tensor=1, expert=2, n_experts=4))
    model = parallelize(_model(), mesh, recomputes=False)
    x, y = (_share(t, mesh.data_rank, mesh.shape.data) for t in _batch(0))
    whole = ShardedState(model, mesh, ADAM, tile=10**9)
    cross_entropy(model(x), y).backward()
    whole.step(ADAM.learning_rate)
    kept = whole.tensors()
    other = parallelize(_model(), mesh, recomputes=False)
    tiled = ShardedState(other, mesh, ADAM, tile=100)
    cross_entropy(other(x), y).backward()
    tiled.step(ADAM.learning_rate)
    found["tiles/buffer"] = torch.tensor([whole.peak_buffer_bytes, tiled.peak_buffer_bytes])
    same = [torch.equal(kept[name], tensor) for name, tensor in tiled.tensors().items()]
    found["tiles/same"] = torch.tensor(all(same) and len(same) == len(kept))
    again = parallelize(_model(), mesh, recomputes=False)
    resumed = ShardedState(again, mesh, ADAM, tile=300)
    resumed.load(kept)
    for each, network in ((tiled, other), (resumed, again)):
        cross_entropy(network(x), y).backward()
        each.step(ADAM.learning_rate)
    pairs = zip(tiled.tensors().values(), resumed.tensors().values(), strict=True)
    found["resumed/same"] = torch.tensor(all(torch.equal(one, two) for one, two in pairs))
    return found


def test_two_ranks_step_in_tiles_and_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    """A tiled step is bit for bit an untiled one in a buffer of one tile; so is a resumed one."""
    first, _ = on_ranks(_two_ranks, 2, tmp_path)
    alone = _alone()

    assert first["tiles/same"]
    assert first["resumed/same"]
    whole, tile = first["tiles/buffer"].tolist()
    assert tile == 400 < whole
    for name, expected in alone.items():
        assert (first[name] - expected).abs().max() <= 1e-5, name
    assert first["calls"].tolist() == [4, 0]


def test_groups_are_deepspeeds() -> None:
    """16 ranks with tensor 2 and expert 4 fall into the groups that DeepSpeed documents."""
    tables = rank_tables(Shape(tensor=2, expert=4, expert_data=2))

    assert tables["tensor"] == tuple((n, n + 1) for n in range(0, 16, 2))
    assert set(tables["expert"]) == {
        (0, 2, 4, 6), (8, 10, 12, 14), (1, 3, 5, 7), (9, 11, 13, 15)
    }  # fmt: skip
    assert tables["data"] == (tuple(range(0, 16, 2)), tuple(range(1, 16, 2)))
    assert {(0, 8), (2, 10), (4, 12), (6, 14), (1, 9)} <= set(tables["expert_data"])


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((6, 2, 2, 4), r"2 \* 2 \* 1\.5 = 6"),
        ((4, 1, 4, 6), r"E / G_expert = 6 / 4"),
        ((4, 0, 1, 4), "1 or more of each"),
    ],
)
def test_sizes_that_do_not_come_out_even_name_the_equation(
    sizes: tuple[int, int, int, int], words: str
) -> None:
    """The equation that fails is in the error, with its numbers."""
    ranks, tensor, expert, experts = sizes
    with pytest.raises(ConfigError, match=words):
        shape_for(ranks, tensor=tensor, expert=expert, n_experts=experts)
