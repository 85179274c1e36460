"""A model served within a byte budget answers as one that is held whole."""

import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from federation.errors import ConfigError, StoreError
from moe_serving.buffering.gates import foresee, watch_next_gates
from moe_serving.buffering.policies import POLICIES
from moe_serving.buffering.simulation import simulate
from moe_serving.buffering.source import Buffer, FileSource, HostSource
from moe_serving.buffering.store import IN_FLIGHT, BufferedStore, Settings, open_store
from moe_serving.buffering.trace import TraceRecorder
from moe_serving.checkpoint import expert_ranges, load, save
from moe_serving.kernels.plain import pack_plain
from moe_serving.kernels.registry import kernel_named, kernels, serve_resident
from moe_serving.layers.experts import GroupedExperts
from moe_serving.layers.gating import Plan
from moe_serving.models.config import DecoderConfig, TranslationConfig
from moe_serving.models.decoder import DecoderLM
from moe_serving.models.families import build

CONFIG = DecoderConfig(
    vocabulary_size=64, d_model=32, n_layers=2, n_heads=2, n_kv_heads=2, d_head=16,
    d_expert=32, n_experts=8, top_k=2, max_length=32,
)  # fmt: skip
EXPERTS = CONFIG.n_layers * CONFIG.n_experts
STEPS, STREAMS = 6, 3

KERNELS = [
    kernel.name
    for kernel in kernels().values()
    if kernel.device == "cpu" and kernel.pack is not None and kernel.is_usable()
]
"""Plain, packed, and 8-bit ones: all that run single experts here."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads inside small products only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with random weights."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(7)
    save(build(CONFIG), folder)
    return folder


@pytest.fixture(scope="module")
def whole(checkpoint: Path) -> Tensor:
    """What the model answers when all experts are in memory."""
    return answer(held_whole(checkpoint, "plain"))


def held_whole(folder: Path, kernel: str) -> DecoderLM:
    model = load(folder)
    assert isinstance(model, DecoderLM)
    serve_resident(model.moe_layers(), kernel_named(kernel))
    return model


def answer(model: object, steps: int = STEPS) -> Tensor:
    """The logits of a few sequences, token by token."""
    assert isinstance(model, DecoderLM)
    tokens = torch.randint(64, (STEPS, STREAMS), generator=torch.Generator().manual_seed(3))
    cache, slots = model.new_cache(STREAMS), torch.arange(STREAMS)
    logits = [
        model.step(tokens[step], torch.full((STREAMS,), step), slots, cache)
        for step in range(steps)
    ]
    return torch.stack(logits)


def expert_bytes(folder: Path) -> int:
    return expert_ranges(folder).size_bytes


@given(
    experts=st.integers(IN_FLIGHT + 3, EXPERTS + 8),
    policy=st.sampled_from(sorted(POLICIES)),
    foreseen=st.integers(0, 2),
)
@settings(max_examples=12, deadline=None)
def test_answers_depend_on_no_budget_or_policy(
    checkpoint: Path,
    whole: Tensor,
    experts: int,
    policy: str,
    foreseen: int,
) -> None:
    """Bits are the whole model's, bytes within the budget, and hits those of the simulator."""
    budget = experts * expert_bytes(checkpoint)
    store = open_store(checkpoint, Settings(budget, policy, foreseen))
    recorder = TraceRecorder(store.shape)
    store.listener = recorder.record
    model = load(checkpoint, store=store)
    watch_next_gates(list(model.moe_layers()), store.expect)

    answers = answer(model)
    counters = store.counters()
    store.close()

    assert torch.equal(answers, whole)
    assert counters.resident_bytes <= counters.peak_bytes <= budget
    replayed = simulate(recorder.trace(), policy, store.capacity)
    assert (replayed.hits, replayed.misses) == (counters.hits, counters.misses)


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_answers_alike_within_a_budget(checkpoint: Path, kernel: str) -> None:
    """What a kernel packs does not live in the buffer that the next expert is read into."""
    pack = kernel_named(kernel).pack
    assert pack is not None
    experts = next(iter(load(checkpoint).moe_layers())).experts
    assert isinstance(experts, GroupedExperts)
    packed = pack(experts.weights_of(0), experts.shape.activation)
    budget = 2 * expert_bytes(checkpoint) + 5 * packed.size_bytes
    store = open_store(checkpoint, Settings(budget, "paper"), pack=pack)

    answers = answer(load(checkpoint, store=store), steps=2)

    assert torch.equal(answers, answer(held_whole(checkpoint, kernel), steps=2))
    assert store.counters().misses > store.capacity
    assert store.counters().peak_bytes <= budget
    store.close()


def test_a_budget_for_all_reads_each_expert_once(checkpoint: Path) -> None:
    """When everything fits nothing is read twice, and the second pass hits throughout."""
    size = expert_bytes(checkpoint)
    store = open_store(checkpoint, Settings((EXPERTS + IN_FLIGHT + 1) * size))
    model = load(checkpoint, store=store)
    answer(model)
    first = store.counters()

    answer(model)

    after = store.counters()
    store.close()
    assert after.misses == first.misses <= EXPERTS
    assert after.bytes_read == first.bytes_read == first.misses * size


def test_hot_experts_are_resident_before_the_first_request(checkpoint: Path) -> None:
    """A store opened with a heat map holds the hottest already."""
    heat = np.zeros((CONFIG.n_layers, CONFIG.n_experts))
    heat[1, [2, 5]] = 0.9, 0.4
    size = expert_bytes(checkpoint)

    store = open_store(checkpoint, Settings(5 * size), heat_LE=heat)
    ran = [expert for expert, _ in store.visit(1, [0, 1, 1, 0, 0, 1, 0, 0])]

    assert store.counters().hits == 2
    assert ran == [2, 5, 1]
    store.close()


def test_foreseen_experts_are_here_when_they_are_asked_for(checkpoint: Path) -> None:
    """Experts that were expected count as foreseen, and are not read a second time."""
    size = expert_bytes(checkpoint)
    store = open_store(checkpoint, Settings(8 * size, "lru", foreseen_most=2))
    store.expect(1, [6, 7, 5])
    list(store.visit(0, [1, 1, 0, 0, 0, 0, 0, 0]))
    deadline_s = time.monotonic() + 20
    while store.counters().bytes_read < 4 * size and time.monotonic() < deadline_s:
        time.sleep(0.001)

    list(store.visit(1, [0, 0, 0, 0, 0, 1, 1, 1]))

    counters = store.counters()
    store.close()
    assert counters.foreseen == 2
    assert counters.bytes_read == 5 * size


def test_the_next_gate_foresees_better_than_chance(checkpoint: Path) -> None:
    """The next router on this layer's input names most of its later choice."""
    model = load(checkpoint)
    layers = list(model.moe_layers())
    seen: dict[int, tuple[Tensor, set[int]]] = {}

    def watch(number: int, rows: Tensor, plan: Plan) -> None:
        seen[number] = (rows, set(torch.nonzero(plan.counts_E).flatten().tolist()))

    for layer in layers:
        layer.watch = watch
    answer(model)

    shares = [
        len(set(foresee(seen[here.number][0], following)[:4]) & seen[following.number][1])
        / min(4, len(seen[following.number][1]))
        for here, following in pairwise(layers)
    ]
    assert sum(shares) / len(shares) > 0.5


def test_a_visit_given_up_half_way_harms_no_later_one(checkpoint: Path, whole: Tensor) -> None:
    """Whoever stops running experts in the middle leaves a store that still answers rightly."""
    size = expert_bytes(checkpoint)
    store = open_store(checkpoint, Settings(9 * size, "lru"))
    for taken in (1, 2, 5):
        visit = store.visit(0, [1] * CONFIG.n_experts)
        for _ in range(taken):
            next(visit)
        visit.close()

    answers = answer(load(checkpoint, store=store))

    assert torch.equal(answers, whole)
    assert store.counters().peak_bytes <= 9 * size
    store.close()


def test_a_file_cut_short_while_it_serves_is_one_clear_error(
    checkpoint: Path, tmp_path: Path
) -> None:
    """A read beyond the end of the file names the expert; put back, the store goes on."""
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    ranges = expert_ranges(tmp_path)
    store = open_store(tmp_path, Settings(4 * ranges.size_bytes))
    weights.write_bytes(content[: ranges.offsets[1][3] + 10])

    with pytest.raises(StoreError, match="truncated while in use"):
        list(store.visit(1, [0, 0, 0, 1, 0, 0, 0, 0]))
    weights.write_bytes(content)
    ran = [expert for expert, _ in store.visit(1, [0, 0, 0, 1, 0, 0, 0, 0])]

    assert ran == [3]
    store.close()


def test_a_source_that_fails_unforeseen_keeps_nobody_waiting(checkpoint: Path) -> None:
    """Whatever goes wrong in the reading thread is an error of the visit, and the thread lives."""

    class Failing(FileSource):
        fails = False

        def read(self, key: int, buffer: Buffer) -> None:
            if self.fails:
                raise RuntimeError("no such luck")
            super().read(key, buffer)

    source = Failing(expert_ranges(checkpoint))
    store = BufferedStore(source, pack_plain, Settings(4 * source.size_bytes))
    source.fails = True
    with pytest.raises(StoreError, match="no such luck"):
        list(store.visit(0, [1, 0, 0, 0, 0, 0, 0, 0]))
    source.fails = False

    assert [expert for expert, _ in store.visit(0, [1, 0, 0, 0, 0, 0, 0, 0])] == [0]
    store.close()


def test_weights_that_are_no_numbers_are_refused_when_read(
    checkpoint: Path, tmp_path: Path
) -> None:
    """NaN in one expert is found the first time it is needed, and named."""
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    ranges = expert_ranges(tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as weights:
        weights.seek(ranges.offsets[0][1])
        weights.write(np.array([np.nan], dtype=np.float32).tobytes())
    store = open_store(tmp_path, Settings(4 * ranges.size_bytes))

    with pytest.raises(StoreError, match=r"expert 1 of layer 0 .* NaN"):
        list(store.visit(0, [0, 1, 0, 0, 0, 0, 0, 0]))
    store.close()


def test_what_cannot_be_is_refused_before_a_thread_is_started(checkpoint: Path) -> None:
    """A budget too small for the experts in flight, or an unknown policy, says what to do."""
    size = expert_bytes(checkpoint)
    before = threading.active_count()

    with pytest.raises(ConfigError, match=f"give at least {2 * size}"):
        open_store(checkpoint, Settings(2 * size - 1))
    with pytest.raises(ConfigError, match="choose one of"):
        open_store(checkpoint, Settings(8 * size, "fifo"))

    assert threading.active_count() == before


def test_slots_over_host_memory_answer_alike(checkpoint: Path, whole: Tensor) -> None:
    """With all experts in host memory and slots elsewhere, answers and hits stay the same."""
    ranges = expert_ranges(checkpoint)
    settings_ = Settings(9 * ranges.size_bytes)
    source = HostSource(ranges, torch.device("cpu"))

    answers, hits = [], []
    for store in (
        BufferedStore(source, pack_plain, settings_),
        open_store(checkpoint, settings_),
    ):
        answers.append(answer(load(checkpoint, store=store)))
        hits.append(store.counters().hits)
        store.close()

    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], whole)
    assert hits[0] == hits[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_slots_on_a_gpu_answer_alike_for_every_budget(checkpoint: Path) -> None:
    """On a GPU over pinned host memory, every number of slots gives the same bits."""
    device = torch.device("cuda")
    size = expert_bytes(checkpoint)
    rows = torch.randn(16, CONFIG.d_model, generator=torch.Generator().manual_seed(1)).to(device)
    sums = []
    for slots in (2, 5, EXPERTS + IN_FLIGHT):
        store = open_store(checkpoint, Settings(slots * size), device=device)
        sums.append([_run_all(store, layer, rows) for layer in (0, 1, 0, 1)])
        assert store.counters().peak_bytes <= slots * size
        store.close()
    assert sums[0] == sums[1] == sums[2]


def _run_all(store: BufferedStore, layer: int, rows: Tensor) -> list[float]:
    found = {e: float(run(rows).sum()) for e, run in store.visit(layer, [1] * CONFIG.n_experts)}
    return [found[expert] for expert in sorted(found)]


def test_a_dense_model_needs_no_store(tmp_path: Path) -> None:
    """A checkpoint whose layers are all dense is refused, with the way out."""
    torch.manual_seed(0)
    dense = TranslationConfig(
        vocabulary_size=16, d_model=8, n_heads=1, d_head=8, d_expert=8, n_encoder_layers=1,
        n_decoder_layers=1, encoder_moe=(), decoder_moe=(), n_experts=2, top_k=1, max_length=8,
    )  # fmt: skip
    save(build(dense), tmp_path)

    with pytest.raises(ConfigError, match="load it without a store"):
        open_store(tmp_path, Settings(10**9))
