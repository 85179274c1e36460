"""A pruned model trains over the ranks of a pipeline as it would on one."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cloud.trainers.plans import OptimizerPlan
from cloud.trainers.sparse.masks import magnitude_masks
from cloud.trainers.sparse.pipeline import Layout, Pipeline, cuts_of, stage_of
from cloud.trainers.state import TrainingState
from federation.errors import ConfigError, TrainingError
from tests.ranks import on_ranks

STEPS, ROWS, PARTS = 5, 8, 4
PLAN = OptimizerPlan(learning_rate=1e-2, weight_decay=0.01)


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(60, 90), nn.ReLU(), nn.Linear(90, 67), nn.GELU(), nn.Linear(67, 10)
    )


def _batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(ROWS * PARTS, 60, generator=generator)
    return x, torch.randint(0, 10, (ROWS * PARTS,), generator=generator)


def _alone() -> tuple[list[float], dict[str, Tensor], int]:
    """One process that takes the same micro-batches in turn: losses, weights, bytes of state."""
    model = _network()
    state = TrainingState(model, PLAN, masks=magnitude_masks(model, 0.9))
    losses = []
    for number in range(STEPS):
        x, y = _batch(number)
        total = torch.zeros((), dtype=torch.float64)
        for part, targets in zip(x.chunk(PARTS), y.chunk(PARTS), strict=True):
            loss = cross_entropy(model(part), targets) / PARTS
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach().double()
        state.step(PLAN.learning_rate)
        losses.append(float(total))
    return losses, state.weights(), sum(state.sizes().values())


def _piped(_: int, ranks: int) -> Mapping[str, Tensor]:
    model = _network()
    pipeline = Pipeline(
        model,
        PLAN,
        example=torch.zeros(ROWS, 60),
        loss=cross_entropy,
        layout=Layout(stages=ranks, micro_batches=PARTS),
        masks=magnitude_masks(model, 0.9),
    )
    losses = [pipeline.step(*_batch(n), PLAN.learning_rate) for n in range(STEPS)]
    with pytest.raises(TrainingError, match="micro-batches"):
        pipeline.step(torch.zeros(3, 60), torch.zeros(3), 0.1)
    found = {f"weights/{name}": tensor for name, tensor in pipeline.state.weights().items()}
    found["losses"] = torch.tensor(losses, dtype=torch.float64)
    found["bytes"] = torch.tensor(sum(pipeline.state.sizes().values()))
    return found


@pytest.mark.slow
def test_two_stages_have_the_losses_of_one_process(tmp_path: Path) -> None:
    """Both ranks report the losses of one process, and hold its weights, each its own part."""
    first, second = on_ranks(_piped, 2, tmp_path)
    losses, weights, size = _alone()

    for found in (first, second):
        assert found["losses"].tolist() == pytest.approx(losses, abs=1e-6)
        assert int(found["bytes"]) < 0.8 * size
    assert losses[-1] != losses[0]
    held = {n.removeprefix("weights/"): t for n, t in {**first, **second}.items() if "/" in n}
    assert held.keys() == weights.keys()
    for name, expected in weights.items():
        torch.testing.assert_close(held[name], expected, rtol=0, atol=1e-6)
        assert torch.equal(held[name] == 0, expected == 0)
    assert not {n for n in first if "/" in n} & {n for n in second if "/" in n}


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=12), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_stages_are_as_even_as_whole_modules_allow(sizes: list[int], stages: int) -> None:
    """Every stage has parameters, and no other cuts would make the largest one smaller."""
    if sum(size > 0 for size in sizes) < stages:
        with pytest.raises(ConfigError, match="take fewer"):
            cuts_of(sizes, stages)
        return
    with pytest.raises(ConfigError, match="raise micro_batches"):
        Layout(stages=stages + 1, micro_batches=stages)
    cuts = cuts_of(sizes, stages)
    parts = [sum(sizes[a:b]) for a, b in pairwise(cuts)]

    assert len(parts) == stages
    assert (cuts[0], cuts[-1]) == (0, len(sizes))
    assert all(parts)
    assert max(parts) == _least_largest(tuple(sizes), stages)


def _least_largest(sizes: tuple[int, ...], stages: int) -> int:
    if stages == 1:
        return sum(sizes)
    return min(
        max(sum(sizes[:cut]), _least_largest(sizes[cut:], stages - 1))
        for cut in range(1, len(sizes))
        if len(sizes) - cut >= stages - 1
    )


def test_a_stage_keeps_the_names_of_the_whole_model() -> None:
    """The parameters of all stages together are the model's, by name and order."""
    model = _network()
    names = [n for stage in range(3) for n, _ in stage_of(model, stage, 3).named_parameters()]

    assert names == [name for name, _ in model.named_parameters()]
