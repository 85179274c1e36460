"""SIGKILL at every phase of a round: the run completes with the undisturbed run's bits."""

from pathlib import Path

import pytest

from tests import real

DEVICES = 2
PLAN = real.digits_plan(DEVICES, rounds=2, hidden=1100, epochs=3)
"""A model of 330 kB travels as six chunks, so there is a middle of a transfer."""

# The state machines and the stores are killed at every moment elsewhere, without processes: one
# phase of each stands for all where there is no time for the slow ones.
AGENT_PHASES = [
    pytest.param("before-download", marks=pytest.mark.slow),
    pytest.param("mid-download", marks=pytest.mark.slow),
    pytest.param("mid-training", marks=pytest.mark.slow),
    pytest.param("before-upload", marks=pytest.mark.slow),
    "mid-upload",
    pytest.param("before-ack", marks=pytest.mark.slow),
]
HUB_PHASES = [
    pytest.param("round-open", marks=pytest.mark.slow),
    pytest.param("mid-gathering", marks=pytest.mark.slow),
    "commit-ack",
    pytest.param("mid-aggregation", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def undisturbed() -> bytes:
    """The final model of the run that nothing befell."""
    return real.simulate(PLAN, real.digits_shards(DEVICES))


@pytest.mark.parametrize("phase", AGENT_PHASES)
def test_an_agent_killed_at_any_phase_changes_nothing(
    phase: str, tmp_path: Path, undisturbed: bytes
) -> None:
    """An agent killed at this phase and started again: same bits, each update once."""
    _run_with_a_crash("d01", phase, tmp_path, undisturbed)


@pytest.mark.parametrize("phase", HUB_PHASES)
def test_the_hub_killed_at_any_phase_changes_nothing(
    phase: str, tmp_path: Path, undisturbed: bytes
) -> None:
    """The hub killed at this phase, its broker with it, goes on where the record ends."""
    _run_with_a_crash("hub", phase, tmp_path, undisturbed)


def _run_with_a_crash(victim: str, phase: str, folder: Path, undisturbed: bytes) -> None:
    with real.real_fleet(folder, "auto", PLAN, real.digits_shards(DEVICES)) as fleet:
        process = fleet.hub if victim == "hub" else fleet.agents[victim]
        mark = folder / "killed"
        real.make_crash(process, phase, mark)

        fleet.begin()
        real.restart_after_crash(process, mark, fleet.account)
        final = fleet.finish()

        assert final == undisturbed, fleet.account()
        assert fleet.store is not None
        accepted = [e for e in fleet.store.events(limit=10_000) if e.kind == "update-accepted"]
        counted = [(event.round, event.device) for event in accepted]
        assert len(counted) == len(set(counted)) == DEVICES * PLAN.rounds
