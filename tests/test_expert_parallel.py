"""Processes that share a model's experts answer as one process does."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_serving.checkpoint import load, save
from moe_serving.kernels.registry import kernel_named, serve_resident
from moe_serving.layers.experts import GroupedExperts, run_expert
from moe_serving.models.config import DecoderConfig
from moe_serving.models.decoder import DecoderLM
from moe_serving.models.families import build
from moe_serving.placement.dispatch import dispatch, divide
from moe_serving.placement.record import place
from moe_serving.placement.split import split
from tests.expert_ranks import (
    EXPERTS,
    LAYERS,
    STREAMS,
    answer,
    both_serve,
    one_fails,
    one_leads,
)

CONFIG = DecoderConfig(
    vocabulary_size=64, d_model=32, n_layers=LAYERS, n_heads=2, n_kv_heads=2, d_head=16,
    d_expert=32, n_experts=EXPERTS, top_k=2, max_length=32,
)  # fmt: skip


PATIENCE_S = 100.0
MODEL = "model"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads inside small products only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a saved model, and what two ranks found in each of their roles."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.manual_seed(11)
    save(build(CONFIG), folder / MODEL)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.expert_ranks", str(rank), str(folder)],
            cwd=Path(__file__).resolve().parents[1],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=PATIENCE_S)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)[-4000:]
    return folder


def found_by(folder: Path, role: Callable[..., object]) -> list[torch.Tensor]:
    return [torch.from_numpy(np.load(folder / f"{role.__name__}.{rank}.npy")) for rank in range(2)]


def alone(folder: Path) -> torch.Tensor:
    """What one process with all experts answers to all streams."""
    model = load(folder / MODEL)
    assert isinstance(model, DecoderLM)
    serve_resident(model.moe_layers(), kernel_named("plain"))
    return answer(model, slice(0, STREAMS))


def test_two_ranks_answer_as_one_while_experts_move(played: Path) -> None:
    """Both serve streams of their own; a placement changes between them, and no answer with it."""
    together, expected = torch.cat(found_by(played, both_serve), dim=1), alone(played)

    assert torch.equal(together.argmax(-1), expected.argmax(-1))
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-5)


def test_a_leader_uses_the_experts_of_its_follower(played: Path) -> None:
    """One serves, the other follows within a byte budget, and they balance anew on the way."""
    found = found_by(played, one_leads)

    torch.testing.assert_close(found[0], alone(played), rtol=1e-4, atol=1e-5)


def test_a_rank_that_cannot_read_its_experts_hangs_nobody(played: Path) -> None:
    """All ranks raise the same step's error, none answers wrongly, and the next step runs."""
    experts = list(load(played / MODEL).moe_layers())[1].experts
    assert isinstance(experts, GroupedExperts)
    expected = [
        run_expert(torch.ones(1, 32), experts.weights_of(expert), experts.shape.activation)
        for expert in range(EXPERTS)
    ]

    for mine in found_by(played, one_fails):
        torch.testing.assert_close(mine, torch.cat(expected).detach(), rtol=1e-4, atol=1e-5)


@st.composite
def exchanges(draw: st.DrawFn) -> tuple[list[list[int]], list[list[int]]]:
    """Rows of each rank and expert, and a placement with any copies."""
    ranks, experts = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    some = st.lists(st.integers(0, 9), min_size=experts, max_size=experts)
    counts = draw(st.lists(some, min_size=ranks, max_size=ranks))
    held = st.lists(st.integers(0, ranks - 1), min_size=1, max_size=ranks, unique=True)
    return counts, draw(st.lists(held, min_size=experts, max_size=experts))


@given(exchanges())
@settings(max_examples=80, deadline=None)
def test_every_row_reaches_a_holder_of_its_expert_once(
    exchange: tuple[list[list[int]], list[list[int]]],
) -> None:
    """What ranks send is what devices receive, in the order both expect."""
    counts, placement = np.array(exchange[0]), place(len(exchange[0]), exchange[1])
    rows = split(counts.sum(axis=0).tolist(), placement)
    part = divide(counts, rows)
    mine = [dispatch(part, rank) for rank in range(len(counts))]

    assert (part >= 0).all()
    assert (part.sum(axis=2) == counts).all()
    assert (part.sum(axis=0) == rows).all()
    expert_of = [np.repeat(np.arange(counts.shape[1]), row) for row in counts]
    for device, here in enumerate(mine):
        boxes = []
        for rank, there in enumerate(mine):
            leaving = np.split(expert_of[rank][there.send_order], np.cumsum(there.send_sizes))[
                device
            ]
            assert len(leaving) == here.receive_sizes[rank]
            boxes.append(leaving)
        received = np.concatenate(boxes)[here.expert_order]
        assert received.tolist() == np.repeat(np.arange(counts.shape[1]), here.counts_E).tolist()
