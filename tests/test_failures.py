"""Devices fail as often as asked for, at the phases that were named, by seed alone."""

from collections import Counter

import numpy as np
import pytest

from simulations.draws import key_of, uniform, uniforms
from simulations.failures import Failures
from simulations.tables import PHASES, FailurePlan


def drawn(seed=0, **plan):
    failures = Failures(FailurePlan(**plan), seed)
    return [failures.failure_of(place, number) for place in range(200) for number in range(1, 51)]


def test_failures_come_as_often_as_they_should_and_at_every_phase():
    """With a chance of 0.2 one in five, every phase alike, away between the two times."""
    found = drawn(chance=0.2, away_s=(3.0, 5.0))

    struck = [failure for failure in found if failure is not None]

    assert len(struck) == pytest.approx(2000, abs=4 * (10_000 * 0.16) ** 0.5)
    counts = Counter(failure.phase for failure in struck)
    assert set(counts) == set(PHASES)
    assert max(counts.values()) - min(counts.values()) < 8 * (len(struck) / 6) ** 0.5
    assert 3.0 <= min(f.away_s for f in struck) < 3.1
    assert 4.9 < max(f.away_s for f in struck) <= 5.0


def test_phases_come_by_their_weights():
    """Three to one, and never one that was not named or has no weight."""
    phases = {"mid-training": 3.0, "before-ack": 1.0, "mid-upload": 0.0}

    counts = Counter(failure.phase for failure in drawn(chance=1.0, phases=phases) if failure)

    assert set(counts) == {"mid-training", "before-ack"}
    assert counts["mid-training"] / 10_000 == pytest.approx(0.75, abs=0.02)


def test_a_failure_is_the_same_however_often_it_is_asked_for():
    """By seed, device and round alone; another seed is another world; chance 0 is none."""
    assert drawn(chance=0.3) == drawn(chance=0.3)
    assert drawn(chance=0.3) != drawn(chance=0.3, seed=1)
    failures = Failures(FailurePlan(chance=0.3), 0)
    alone = [failures.failure_of(place, 7) for place in reversed(range(200))]
    assert alone[::-1] == drawn(chance=0.3)[6::50]
    assert set(drawn(chance=0.0)) == {None}


def test_arrays_draw_what_single_devices_draw():
    """One address, one number, whether asked for alone or among a fleet; and uniform."""
    key = key_of(3, "what")
    places = np.array([0, 1, 5, 999_999, 2**32])

    assert uniforms(key, places, 9).tolist() == [uniform(key, int(p), 9) for p in places]
    many = uniforms(key, np.arange(100_000))
    assert 0.0 < many.min() < 1e-4
    assert 1 - 1e-4 < many.max() < 1.0
    assert np.histogram(many, 20, (0, 1))[0] == pytest.approx(5000, abs=6 * 5000**0.5)
    by_number = uniforms(key, np.zeros(100_000, np.int64), np.arange(100_000))
    assert abs(np.corrcoef(many, by_number)[0, 1]) < 0.02
    assert abs(np.corrcoef(many[1:], many[:-1])[0, 1]) < 0.02
