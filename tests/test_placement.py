"""Placements respect slots, rows are divided exactly, and our search is near the proved best."""

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import linprog  # type: ignore[import-untyped]

from federation.errors import ConfigError
from moe_serving.placement.baselines import anti_correlated, contiguous, eplb, greedy
from moe_serving.placement.exact import best_placement
from moe_serving.placement.record import Placement, moves, place, renumber
from moe_serving.placement.search import imbalance, search
from moe_serving.placement.split import flow, split, split_evenly


@st.composite
def divisions(draw: st.DrawFn) -> tuple[list[int], Placement]:
    """A batch's rows by expert, and a placement with any copies."""
    devices = draw(st.integers(1, 5))
    holders = draw(
        st.lists(
            st.lists(st.integers(0, devices - 1), min_size=1, max_size=devices, unique=True),
            min_size=1,
            max_size=7,
        )
    )
    counts = draw(st.lists(st.integers(0, 60), min_size=len(holders), max_size=len(holders)))
    return counts, place(devices, holders)


def topics(
    experts: int, batches: int, seed: int, *, rows: int = 512, themes: int = 4
) -> NDArray[np.int64]:
    """Rows by batch and expert: mixtures of topics, each with favourites of its own."""
    rng = np.random.default_rng(seed)
    zipf = 1 / np.arange(1, experts + 1) ** 0.9
    theme = np.array([rng.permutation(zipf / zipf.sum()) for _ in range(themes)])
    mix = rng.dirichlet(np.full(themes, 0.35), size=batches)
    return np.array([rng.multinomial(rows, each) for each in mix @ theme])


def least_maximum(counts: list[int], placement: Placement) -> float:
    """The smallest possible load of the busiest device, by a linear program."""
    pairs = [(e, d) for e, holders in enumerate(placement.holders) for d in holders]
    cost = np.zeros(len(pairs) + 1)
    cost[-1] = 1.0
    loads: NDArray[Any] = np.zeros((placement.devices, len(pairs) + 1))
    whole: NDArray[Any] = np.zeros((len(counts), len(pairs) + 1))
    loads[:, -1] = -1.0
    for column, (expert, device) in enumerate(pairs):
        loads[device, column] = 1.0
        whole[expert, column] = 1.0
    found = linprog(cost, A_ub=loads, b_ub=np.zeros(len(loads)), A_eq=whole, b_eq=counts)
    return float(found.fun)


@given(divisions())
@settings(max_examples=60, deadline=None)
def test_division_keeps_all_rows_and_no_division_is_better(
    division: tuple[list[int], Placement],
) -> None:
    """Rows go to holders only, none is lost, and the maximum is the linear program's, in whole."""
    counts, placement = division

    rows = split(counts, placement)

    assert rows.min() >= 0
    assert rows.sum(axis=1).tolist() == counts
    for expert, holders in enumerate(placement.holders):
        assert set(np.flatnonzero(rows[expert])) <= set(holders)
    assert rows.sum(axis=0).max() == np.ceil(least_maximum(counts, placement) - 1e-6)


@given(divisions())
@settings(max_examples=40, deadline=None)
def test_the_flow_that_plans_are_judged_by_is_the_linear_programs(
    division: tuple[list[int], Placement],
) -> None:
    """Divided at will, the busiest device has what the linear program gives it."""
    counts, placement = division
    assume(sum(counts) > 0)

    load = flow(np.array([counts], dtype=np.float64), placement)

    assert load.sum() == pytest.approx(sum(counts))
    assert load.max() == pytest.approx(least_maximum(counts, placement), rel=0.01, abs=0.05)


@pytest.mark.parametrize("slots", [4, 5, 6])
def test_every_planner_respects_the_slots(slots: int) -> None:
    """No device holds more experts than it has slots, and every expert is held."""
    history = topics(16, 20, seed=1)

    for planned in (
        contiguous(16, 4),
        greedy(history, 4, slots),
        anti_correlated(history, 4, slots),
        anti_correlated(history, 4, slots, is_literal=True),
        eplb(history, 4, slots),
        search(history, 4, slots),
    ):
        assert len(planned.holders) == 16
        assert all(len(planned.held_by(device)) <= slots for device in range(4))


@pytest.mark.parametrize(("experts", "devices", "copies"), [(8, 2, 0), (8, 2, 2), (12, 3, 0)])
def test_our_search_is_near_the_proved_best(experts: int, devices: int, copies: int) -> None:
    """Within 4 % of the optimum of the mixed-integer program, with copies and without."""
    history = topics(experts, 6, seed=experts, rows=200)
    slots = experts // devices + copies // devices

    proven = best_placement(history, devices, slots, copies=copies)
    ours = search(history, devices, slots, copies=copies)

    assert proven.bound == pytest.approx(proven.merit, rel=1e-4)
    assert imbalance(history, proven.placement) == pytest.approx(proven.merit, rel=1e-3)
    assert proven.bound - 1e-3 <= imbalance(history, ours) <= 1.04 * proven.merit


def test_ours_is_the_best_on_batches_it_has_not_seen() -> None:
    """Planned on one half and judged on the other: before greedy, the paper's, and EPLB."""
    batches = topics(64, 160, seed=2, rows=2048, themes=8)
    seen, held_out = batches[:80], batches[80:]

    def judge(planned: Placement, divide: Any = split) -> float:
        loads = np.array([divide(counts.tolist(), planned).sum(axis=0) for counts in held_out])
        return float((loads.max(axis=1) / loads.mean(axis=1)).mean())

    ours = judge(search(seen, 4, 16))
    assert ours < judge(anti_correlated(seen, 4, 16)) < judge(greedy(seen, 4, 16))
    with_copies = judge(search(seen, 4, 17))
    assert with_copies < ours
    assert with_copies < judge(eplb(seen, 4, 17)) < judge(eplb(seen, 4, 17), split_evenly)


def test_a_new_plan_moves_as_little_as_its_device_numbers_allow() -> None:
    """The same groups under other numbers cost nothing; a swap costs two moves."""
    old = place(3, [[0], [0], [1], [1], [2], [2]])
    same = place(3, [[2], [2], [0], [0], [1], [1]])
    swapped = place(3, [[2], [0], [0], [2], [1], [1]])

    assert moves(old, renumber(old, same)) == ()
    assert len(moves(old, renumber(old, swapped))) == 2


def test_a_history_of_nothing_still_gives_a_placement() -> None:
    """Without a single row all experts count alike, and they are spread evenly."""
    planned = search(np.zeros((3, 8), dtype=np.int64), 4, 2)

    assert [len(planned.held_by(device)) for device in range(4)] == [2, 2, 2, 2]


def test_what_does_not_fit_or_make_sense_is_refused() -> None:
    """Too few slots, an expert without a holder, or a device that is not there."""
    with pytest.raises(ConfigError, match="8 experts do not fit into 1 slots on each of 4 devices"):
        search(np.ones((2, 8)), 4, 1)
    with pytest.raises(ConfigError, match="one device or several are needed"):
        place(2, [[0], []])
    with pytest.raises(ConfigError, match="of 2 devices"):
        place(2, [[0], [2]])
