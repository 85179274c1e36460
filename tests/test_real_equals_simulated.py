"""One agent, one coordinator, one training loop: a real run gives the bits of the simulated one."""

import random
from collections.abc import Mapping
from pathlib import Path

import pytest

from cloud.config import RunPlan
from federation.learning.data import LocalData
from tests import real

DEVICES, ROUNDS = 8, 5
PLAN = real.digits_plan(DEVICES, ROUNDS)


@pytest.fixture(scope="module")
def simulated() -> bytes:
    """The final model of the simulated run."""
    return real.simulate(PLAN, real.digits_shards(DEVICES))


def test_real_equals_simulated(broker_kind: str, tmp_path: Path) -> None:
    """Through random delays, and with one agent killed and resumed, the final bits are equal."""
    plan, shards = real.digits_plan(3, rounds=3), real.digits_shards(3)

    assert _rough_run(tmp_path, broker_kind, plan, shards, seed=0) == real.simulate(plan, shards)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_three_of_three_real_runs_equal_the_simulated_one(
    broker_kind: str, tmp_path: Path, simulated: bytes
) -> None:
    """Undisturbed, three runs of three give the simulated bits."""
    for attempt in range(3):
        with real.real_fleet(
            tmp_path / str(attempt), broker_kind, PLAN, real.digits_shards(DEVICES)
        ) as fleet:
            fleet.begin()
            assert fleet.finish() == simulated


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_three_of_three_rough_runs_equal_the_simulated_one(
    broker_kind: str, tmp_path: Path, simulated: bytes
) -> None:
    """Delayed and with a kill, three runs of three give the simulated bits."""
    shards = real.digits_shards(DEVICES)
    for seed in range(1, 4):
        assert _rough_run(tmp_path / str(seed), broker_kind, PLAN, shards, seed) == simulated


def _rough_run(
    folder: Path, kind: str, plan: RunPlan, shards: Mapping[str, LocalData], seed: int
) -> bytes:
    rng = random.Random(seed)
    latencies_s = {name: rng.uniform(0.0, 0.15) for name in shards}
    victim = rng.choice(sorted(shards))
    with real.real_fleet(folder, kind, plan, shards, latencies_s=latencies_s) as fleet:
        mark = folder / "killed"
        real.make_crash(fleet.agents[victim], "mid-training", mark)
        fleet.begin()
        real.restart_after_crash(fleet.agents[victim], mark, fleet.account)
        return fleet.finish()
