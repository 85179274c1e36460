"""A pruned network trains in the memory of what is kept, with the bits of a masked dense one."""

from collections.abc import Mapping
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cloud.config import ModelChoice
from cloud.trainers.checkpoints import digest_of
from cloud.trainers.plans import DataPlan, OptimizerPlan, SparsePlan, TrainPlan
from cloud.trainers.sparse.compression import kept_of
from cloud.trainers.sparse.masks import (
    EarlyBird,
    apply_masks,
    distance,
    kept_share,
    load_masks,
    magnitude_masks,
    prunable,
    save_masks,
)
from cloud.trainers.state import TrainingState
from federation.errors import ConfigError, TrainingError
from tests.ranks import on_ranks

STEPS = 6
PLAN = OptimizerPlan(learning_rate=1e-3, weight_decay=0.01)


def _network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(60, 131), nn.ReLU(), nn.Linear(131, 67), nn.ReLU(), nn.Linear(67, 10)
    )


def _batch(step: int, rank: int, compute: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    x = torch.randn(32, 60, generator=generator)
    return x.to(compute), torch.randint(0, 10, (32,), generator=generator)


def _sparse(rank: int, ranks: int, compute: torch.dtype, sparsity: float) -> TrainingState:
    """SAMO's training: the state after some steps."""
    model = _network()
    masks = magnitude_masks(model, sparsity)
    group = dist.group.WORLD if ranks > 1 else None
    state = TrainingState(model, PLAN, masks=masks, compute=compute, group=group)
    for step in range(STEPS):
        x, y = _batch(step, rank, compute)
        cross_entropy(model(x).float(), y).backward()
        state.step(PLAN.learning_rate)
    return state


def _masked_dense(rank: int, ranks: int, compute: torch.dtype, sparsity: float) -> list[Tensor]:
    """The same with plain dense tensors: gradients reduced whole, then masked; torch's AdamW."""
    model = _network()
    masks = magnitude_masks(model, sparsity)
    apply_masks(model, masks)
    names = [name for name, _ in model.named_parameters()]
    master = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
    model = model.to(compute)
    optimizer = torch.optim.AdamW(
        master, lr=PLAN.learning_rate, weight_decay=PLAN.weight_decay, foreach=False
    )
    for step in range(STEPS):
        x, y = _batch(step, rank, compute)
        model.zero_grad()
        cross_entropy(model(x).float(), y).backward()
        for name, parameter, kept in zip(names, model.parameters(), master, strict=True):
            gradient = parameter.grad
            assert gradient is not None
            if ranks > 1:
                dist.all_reduce(gradient)
                gradient /= ranks
            kept.grad = gradient.float() * masks.get(name, torch.ones(()))
        optimizer.step()
        for name, parameter, kept in zip(names, model.parameters(), master, strict=True):
            parameter.data.copy_(kept.detach() * masks.get(name, torch.ones(())))
    return [p.detach() for p in model.parameters()]


def _both(rank: int, ranks: int) -> Mapping[str, Tensor]:
    found: dict[str, Tensor] = {}
    for compute in (torch.float32, torch.bfloat16):
        state = _sparse(rank, ranks, compute, 0.9)
        dense = _masked_dense(rank, ranks, compute, 0.9)
        for (name, parameter), expected in zip(state.parameters.items(), dense, strict=True):
            found[f"{compute}/{name}/ours"] = parameter.detach()
            found[f"{compute}/{name}/dense"] = expected
        found[f"{compute}/reduced"] = torch.tensor(state.reduced_bytes)
    return found


def _assert_equal(found: Mapping[str, Tensor]) -> None:
    pairs = [name.removesuffix("/ours") for name in found if name.endswith("/ours")]
    assert len(pairs) == 12
    for name in pairs:
        assert torch.equal(found[f"{name}/ours"], found[f"{name}/dense"]), name


def test_compressed_training_has_the_bits_of_masked_dense_training() -> None:
    """On one process every parameter is bit for bit that of AdamW on dense, masked tensors."""
    _assert_equal(_both(0, 1))


def test_two_ranks_agree_and_exchange_kept_entries_only(tmp_path: Path) -> None:
    """Two ranks end with the dense run's bits, and reduce the kept share of its bytes."""
    first, second = on_ranks(_both, 2, tmp_path)

    _assert_equal(first)
    assert all(torch.equal(first[name], second[name]) for name in first if "ours" in name)
    model = _network()
    masks = magnitude_masks(model, 0.9)
    dense = sum(p.numel() for p in model.parameters())
    alive = sum(int(mask.sum()) for mask in masks.values())
    alive += sum(p.numel() for name, p in model.named_parameters() if name not in masks)
    assert int(first["torch.float32/reduced"]) == STEPS * 4 * alive
    assert int(first["torch.bfloat16/reduced"]) == STEPS * 2 * alive
    assert alive / dense == pytest.approx(0.1, abs=0.015)


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.8, 0.9])
def test_state_takes_the_bytes_of_the_papers_formula(sparsity: float) -> None:
    """State is 22 f phi + 2 phi bytes, and what a step needs beside stays below 2 f phi."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 400, bias=False), nn.Linear(400, 400, bias=False))
    masks = magnitude_masks(model, sparsity)
    state = TrainingState(model, OptimizerPlan(), masks=masks, compute=torch.bfloat16)
    model(torch.randn(4, 400).bfloat16()).float().sum().backward()
    state.step(1e-3)

    size = 2 * 400 * 400
    kept = kept_share(masks)
    sizes = state.sizes()
    temporary = sizes.pop("temporary")
    assert sum(sizes.values()) == pytest.approx((22 * kept + 2) * size, rel=0.001)
    assert 0 < temporary <= 2 * kept * size


def test_no_two_dense_gradients_live_at_a_time() -> None:
    """Whenever a gradient is handed over, no other parameter has a dense one."""
    model = _network()
    state = TrainingState(model, PLAN, masks=magnitude_masks(model, 0.9), compute=torch.float32)
    alive: list[int] = []

    def look(_: Tensor) -> None:
        alive.append(sum(p.grad is not None for p in model.parameters()))

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(look)
    cross_entropy(model(torch.randn(8, 60)), torch.zeros(8, dtype=torch.long)).backward()

    assert alive == [0] * 6
    assert all(bucket.gradient.abs().sum() > 0 for bucket in state.buckets)


@given(st.integers(1, 300), st.data())
@settings(max_examples=40, deadline=None)
def test_what_is_compressed_comes_back(size: int, data: st.DataObject) -> None:
    """Living entries come back at their places, and dead ones as zero."""
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    kept = kept_of(mask, mask.shape)
    dense = torch.randn(size)
    back = torch.full((size,), 7.0)
    kept.expand_into(back, kept.compress(dense))

    assert torch.equal(back, dense * mask)
    assert kept.index_bytes == 4 * int(mask.sum())


@given(sparsity=st.floats(0, 0.999), scope=st.sampled_from(["layer", "model"]))
@settings(max_examples=20, deadline=None)
def test_pruning_leaves_every_tensor_something(sparsity: float, scope: str) -> None:
    """The largest entries live, in every tensor at least one, and vectors are left alone."""
    model = _network()
    masks = magnitude_masks(model, sparsity, scope=scope)  # type: ignore[arg-type]

    assert set(masks) == set(prunable(model)) == {"0.weight", "2.weight", "4.weight"}
    for name, mask in masks.items():
        weight = model.get_parameter(name).abs()
        assert mask.any()
        if scope == "layer" and not mask.all():
            assert weight[mask].min() >= weight[~mask].max()


def test_a_ticket_is_drawn_when_five_masks_agree() -> None:
    """Masks that keep changing draw no ticket; five in a row within a tenth do."""
    watch = EarlyBird()
    for seed in range(6):
        watch = watch.after(magnitude_masks(_network(seed), 0.9))
        assert not watch.has_settled
    settled = magnitude_masks(_network(9), 0.9)
    for _ in range(4):
        watch = watch.after(settled)
        assert not watch.has_settled
    assert watch.after(settled).has_settled


def test_masks_survive_the_disk_and_others_are_refused(tmp_path: Path) -> None:
    """Masks come back as they were; those of another model, or of none, are refused."""
    model = _network()
    masks = magnitude_masks(model, 0.8)
    path = tmp_path / "masks.safetensors"
    save_masks(masks, path)

    assert distance(masks, load_masks(path, model)) == 0.0
    with pytest.raises(ConfigError, match="masks of this model"):
        load_masks(path, nn.Linear(3, 4))
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ConfigError, match="no file of masks"):
        load_masks(path, model)


def test_a_plan_with_a_file_of_masks_is_told_from_others() -> None:
    """The plan's digest, by which checkpoints are found again, depends on the file of masks."""
    digests = {
        digest_of(
            TrainPlan(
                name="pruned",
                data=DataPlan(set="digits"),
                model=ModelChoice(name="mlp"),
                sparse=SparsePlan(rule="file", file=Path(file)),
            )
        )
        for file in ("one.masks", "one.masks", "two.masks")
    }
    assert len(digests) == 2


def test_state_goes_on_from_what_was_kept() -> None:
    """A state that is loaded into a fresh model goes on with the bits of the first."""
    whole = _sparse(0, 1, torch.float32, 0.8)
    model = _network()
    fresh = TrainingState(model, PLAN, masks=magnitude_masks(model, 0.8))
    fresh.load(whole.tensors())
    assert all(
        torch.equal(one, two)
        for one, two in zip(whole.tensors().values(), fresh.tensors().values(), strict=True)
    )
    other = TrainingState(_network(), PLAN)
    with pytest.raises(TrainingError, match="same model and masks"):
        other.load(whole.tensors())
