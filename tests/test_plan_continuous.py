"""Whole units, given modes and server units cost little beside shares of any size."""

import numpy as np
import pytest

from optimizer.allocation import plan
from optimizer.continuous import relax
from optimizer.fleets import Setting, draw, goodput_law


@pytest.mark.parametrize("seed", range(2))
def test_whole_units_cost_little(seed: int) -> None:
    """Freely divided resources gain less than 3 %, and never lose."""
    problem = draw(Setting(users=6), np.random.default_rng(seed))
    planned = plan(problem, tolerance=0.0, time_limit_s=60.0)

    relaxed = relax(problem, planned, goodput_law(problem))

    assert relaxed.objective <= planned.objective < 1.03 * relaxed.objective
    assert 0.5 * planned.makespan_s < relaxed.makespan_s <= 1.1 * planned.makespan_s


def test_the_law_is_that_of_the_table() -> None:
    """The law behind a drawn fleet gives the goodput of its table at whole blocks."""
    problem = draw(Setting(users=30), np.random.default_rng(5))

    rates = goodput_law(problem)(np.array(problem.uplink_choices, float))

    table = [user.goodput_bytes_per_s for user in problem.users]
    np.testing.assert_allclose(rates, table, rtol=1e-9)
