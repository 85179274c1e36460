"""Policies decide which experts stay; the simulator replays them beside the optimum."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from federation.errors import ConfigError, StoreError
from moe_serving.buffering.heat import HeatMeter, load_heat, save_heat
from moe_serving.buffering.policies import POLICIES, make_policy
from moe_serving.buffering.residency import Residency
from moe_serving.buffering.simulation import best_possible, simulate
from moe_serving.buffering.synthetic import Recipe, synthesise
from moe_serving.buffering.trace import (
    Shape,
    Trace,
    TraceRecorder,
    load_trace,
    make_trace,
    save_trace,
)

SHAPE = Shape(layers=2, experts=4)

visits = st.lists(
    st.tuples(
        st.integers(0, SHAPE.layers - 1),
        st.lists(st.integers(0, 3), min_size=SHAPE.experts, max_size=SHAPE.experts),
    ),
    max_size=24,
)


def most_hits(trace: Trace, capacity: int) -> int:
    """What the best of all sequences of residents hits: every choice tried."""
    reached: dict[frozenset[int], int] = {frozenset(): 0}
    for layer, active in trace.visits():
        wanted = {trace.shape.key(layer, expert) for expert in active}
        following: dict[frozenset[int], int] = {}
        for residents, hits in reached.items():
            found = hits + len(residents & wanted)
            known = sorted(residents | wanted)
            for kept in combinations(known, min(capacity, len(known))):
                key = frozenset(kept)
                following[key] = max(following.get(key, -1), found)
        reached = following
    return max(reached.values())


def test_the_papers_example_keeps_the_first_expert_for_the_next_batch() -> None:
    """With two slots and experts 1, 2, 3 needed in turn, the last that came makes room."""
    residency = Residency(Shape(1, 4), 2, make_policy("paper", Shape(1, 4), 2))

    residency.visit(0, [1, 2, 3])

    assert residency.residents == {1, 3}


def test_the_paper_evicts_the_inactive_first() -> None:
    """An expert that this batch does not use goes before one that it does."""
    residency = Residency(Shape(1, 4), 2, make_policy("paper", Shape(1, 4), 2))
    residency.visit(0, [0, 1])

    residency.visit(0, [1, 2])

    assert residency.residents == {1, 2}


def test_lru_hits_nothing_when_a_pass_needs_more_than_fits() -> None:
    """A cycle through more experts than slots: LRU never hits, the paper's policy and ours do."""
    shape = Shape(3, 2)
    cycle = make_trace(shape, [(layer, [1, 1]) for layer in range(3)] * 50)

    assert simulate(cycle, "lru", 4).hits == 0
    assert simulate(cycle, "paper", 3).hit_rate > 0.4
    assert simulate(cycle, "reuse", 4).hit_rate > 0.6


def test_hits_of_a_visit_run_before_its_misses() -> None:
    """A resident that is needed is a hit, whatever the misses beside it push out."""
    residency = Residency(Shape(1, 4), 2, make_policy("lru", Shape(1, 4), 2))
    residency.visit(0, [2, 3])

    plan = residency.visit(0, [0, 1, 2, 3])

    assert plan.hits == (2, 3)
    assert [fetch.expert for fetch in plan.fetches] == [0, 1]


@pytest.mark.parametrize("policy", POLICIES)
@given(visits=visits, capacity=st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_no_policy_betters_the_optimum_or_its_capacity(
    policy: str, visits: list[tuple[int, list[int]]], capacity: int
) -> None:
    """Hits and misses add up to the uses, residents to the capacity, foresight is not beaten."""
    trace = make_trace(SHAPE, visits)
    residency = Residency(SHAPE, capacity, make_policy(policy, SHAPE, capacity))

    for layer, active in trace.visits():
        residency.visit(layer, active)
        assert len(residency.residents) <= capacity

    uses = int((trace.counts_VE > 0).sum())
    best = best_possible(trace, capacity)
    assert residency.hits + residency.misses == uses == best.hits + best.misses
    assert residency.hits <= best.hits
    assert simulate(trace, policy, capacity).hits == residency.hits


@given(
    visits=st.lists(st.lists(st.integers(0, 1), min_size=4, max_size=4), max_size=6),
    capacity=st.integers(0, 3),
)
@settings(max_examples=25, deadline=None)
def test_the_optimum_is_what_trying_everything_finds(
    visits: list[list[int]], capacity: int
) -> None:
    """Keeping whoever is used soonest hits as often as the best of all choices."""
    trace = make_trace(Shape(1, 4), [(0, counts) for counts in visits])

    assert best_possible(trace, capacity).hits == most_hits(trace, capacity)


@pytest.mark.parametrize("streams", [1, 16])
def test_ours_is_first_on_traces_with_topics_and_echoes(streams: int) -> None:
    """Alone or in batches, below and above the active set, no other policy hits more."""
    recipe = Recipe(layers=2, experts=32, streams=streams, passes=300)
    trace = synthesise(recipe, np.random.default_rng(5))

    for share in (0.25, 0.5):
        capacity = int(2 * 32 * share)
        rate = {name: simulate(trace, name, capacity, skip=80).hit_rate for name in POLICIES}
        assert rate["reuse"] >= max(rate.values()) - 0.005


def test_ours_learns_that_layers_come_round_at_different_paces() -> None:
    """A layer visited for each token keeps its experts from one visited once a request."""
    shape = Shape(2, 8)
    rng = np.random.default_rng(0)
    seen = []
    for _ in range(60):
        seen.append((0, rng.permutation([1] * 6 + [0] * 2).tolist()))
        seen += [(1, [1, 1, 1, 0, 0, 0, 0, 0])] * 12
    trace = make_trace(shape, seen)

    tally = simulate(trace, "reuse", 3, skip=200)

    assert tally.hit_rate > 0.8
    assert tally.hit_rate >= best_possible(trace, 3, skip=200).hit_rate - 0.02


def test_a_heat_map_fills_the_residents_before_the_first_visit(tmp_path: Path) -> None:
    """What was hot when it was measured is resident at the next start, to the capacity."""
    meter = HeatMeter(SHAPE)
    for layer, counts in [(0, [3, 0, 0, 1]), (0, [1, 0, 0, 0]), (1, [0, 2, 0, 0])]:
        meter.record(layer, counts)
    save_heat(meter.heat(), tmp_path / "heat")

    heat = load_heat(tmp_path / "heat", SHAPE)
    residency = Residency(SHAPE, 3, make_policy("reuse", SHAPE, 3, heat))
    residency.warm_up(heat)

    assert residency.residents == {0, 3, 5}


def test_a_trace_is_read_back_as_it_was_recorded(tmp_path: Path) -> None:
    """Recording, writing and reading give the same visits; the oldest go first."""
    recorder = TraceRecorder(SHAPE, most=5)
    for number in range(12):
        recorder.record(number % 2, [number, 0, 1, 0])

    save_trace(recorder.trace(), tmp_path / "trace")
    trace = load_trace(tmp_path / "trace")

    assert trace.layer_V.tolist() == [1, 0, 1, 0, 1]
    assert trace.counts_VE[:, 0].tolist() == [7, 8, 9, 10, 11]
    assert trace.loads(0)[:, 0].tolist() == [8, 10]
    assert trace.heat()[1].tolist() == [1.0, 0.0, 1.0, 0.0]


def test_bad_files_and_names_are_refused_with_a_remedy(tmp_path: Path) -> None:
    """A file that is no trace or heat map, and a policy that nobody knows, are told apart."""
    garbage = tmp_path / "garbage"
    garbage.write_bytes(b"\x08\x00\x00\x00nothing")
    save_heat(np.zeros((3, 3)), tmp_path / "heat")

    with pytest.raises(StoreError, match="record it again"):
        load_trace(garbage)
    with pytest.raises(StoreError, match="not a trace"):
        load_trace(tmp_path / "heat")
    with pytest.raises(StoreError, match="record one with this model"):
        load_heat(tmp_path / "heat", SHAPE)
    with pytest.raises(ConfigError, match="choose one of reuse, paper"):
        make_policy("fifo", SHAPE, 1)
