"""Estimates, forecasts and their calibration: against arithmetic, and against simulated devices."""

import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud.config import ModelChoice, RunPlan
from cloud.coordination.rounds import RoundPolicy
from cloud.twins.judging import Part, settle, work_of
from cloud.twins.selecting import barred_by, select_by_forecast
from federation.protocol.wishes import DesiredState
from twin.availability import (
    HOUR_S,
    Availability,
    chance_stays,
    chance_there,
    hour_of_week,
    observed,
    rates,
)
from twin.calibration import Calibration, corrected, judged_chance, judged_time
from twin.estimates import Chance, Estimate, LogNormal, beyond, learned, total
from twin.forecast import Power, completes, forecast, power_of
from twin.model import Trial, TwinModel, Work, is_cold, learn
from twin.shadow import Shadow

FAMILY = "mlp(hidden=64)"
WORK = Work(family=FAMILY, epochs=2, deadline_s=30.0, down_bytes=100_000, up_bytes=100_000)
POSITIVE = st.floats(1e-3, 1e3)


def estimate_of(values):
    known = None
    for value in values:
        known = learned(known, value)
    return known


def trial(*, rng, at, scale=1.0, cold=False):
    """A part of a device whose physics are known: 2 ms a sample, 10 ms letters, 1 MB/s."""
    noise = float(rng.lognormal(0.0, 0.05))
    training_at = at + 0.02 + 0.02 + 0.1
    seconds = 0.002 * 100 * scale * noise
    opened_at = training_at + seconds + (2.0 if cold else 0.05)
    return Trial(
        work=WORK,
        asked_at=at,
        is_cold=cold,
        accepted_at=at + 0.02,
        training_at=training_at,
        opened_at=opened_at,
        received_at=opened_at + 0.02 + 0.1,
        up_bytes=100_000,
        samples=50,
        seconds=seconds,
        status="received",
    )


@given(st.lists(POSITIVE, min_size=2, max_size=20))
@settings(deadline=None, max_examples=50)
def test_an_estimate_stays_among_what_was_seen(values) -> None:
    """The median lies between the least and the largest, and the count is of all."""
    known = estimate_of(values)

    assert min(values) / 1.0001 <= known.figure.median <= max(values) * 1.0001
    assert known.count == len(values)
    assert known.figure.variance >= 0.0


def test_an_estimate_finds_mean_and_spread() -> None:
    """Of lognormal observations it finds both parameters, and is surer than after the first."""
    rng = np.random.default_rng(1)
    values = rng.lognormal(math.log(3.0), 0.2, 30)

    known = estimate_of(values)

    assert known.next().mu == pytest.approx(statistics.fmean(np.log(values)), abs=0.02)
    assert known.next().sigma == pytest.approx(0.2, abs=0.06)
    assert known.figure.mean == pytest.approx(3.0 * math.exp(0.02), rel=0.1)


def test_an_outlier_moves_little_and_a_change_is_followed() -> None:
    """One hiccup moves the median by less than a tenth; a device slower from now on is known."""
    rng = np.random.default_rng(2)
    usual = estimate_of(rng.lognormal(0.0, 0.1, 20))

    assert usual.after(100.0).figure.median < 1.1 * usual.figure.median
    slower = usual
    for value in rng.lognormal(math.log(4.0), 0.1, 40):
        slower = slower.after(float(value))
    assert slower.figure.median == pytest.approx(4.0, rel=0.25)


@given(st.lists(st.tuples(POSITIVE, st.floats(0.0, 1.0)), min_size=1, max_size=5))
@settings(deadline=None, max_examples=50)
def test_a_sum_has_the_mean_and_variance_of_its_parts(parts) -> None:
    """The lognormal of a sum keeps both moments exactly."""
    laws = [LogNormal(mu=math.log(median), sigma=sigma) for median, sigma in parts]

    summed = total(laws)

    assert summed.mean == pytest.approx(sum(law.mean for law in laws), rel=1e-6)
    assert summed.variance == pytest.approx(sum(law.variance for law in laws), rel=1e-5, abs=1e-12)


@given(st.floats(0.1, 10.0), st.floats(0.05, 1.0), st.floats(0.05, 0.95))
@settings(deadline=None, max_examples=50)
def test_quantiles_and_probabilities_agree(median, sigma, share) -> None:
    """What it stays below with a probability is below with that probability."""
    law = LogNormal(mu=math.log(median), sigma=sigma)

    assert law.below(law.quantile(share)) == pytest.approx(share, abs=1e-6)
    assert law.below(0.0) == 0.0
    assert beyond(law, law.quantile(share)) >= law.quantile(share)


def test_beyond_is_the_mean_of_a_cut_off_distribution() -> None:
    """What is known to exceed a value is expected where simulated draws above it lie."""
    rng = np.random.default_rng(3)
    law, draws = LogNormal(mu=0.5, sigma=0.4), rng.lognormal(0.5, 0.4, 200_000)

    kept = np.log(draws[draws > 2.5])

    assert math.log(beyond(law, 2.5)) == pytest.approx(kept.mean(), abs=0.01)
    assert beyond(law, 1e9) > 1e9


def test_a_device_is_learned_from_its_rounds() -> None:
    """After five rounds every leg of the way is known within a few per cent."""
    rng = np.random.default_rng(4)
    model = TwinModel()
    for number in range(5):
        model = learn(model, trial(rng=rng, at=10.0 * number, cold=number == 0))

    assert model.seconds_per_sample[FAMILY].figure.median == pytest.approx(0.002, rel=0.1)
    assert model.delay_s.figure.median == pytest.approx(0.01, rel=0.01)
    assert model.up_bytes_per_s.figure.median == pytest.approx(1e6, rel=0.05)
    assert model.down_bytes_per_s.figure.median == pytest.approx(1e6, rel=0.05)
    assert model.beside_s.figure.median == pytest.approx(0.05, rel=0.05)
    assert model.start_s.figure.median == pytest.approx(2.0, rel=0.05)
    said = forecast(model, TwinModel(), WORK, 50.0)
    usual = statistics.median(trial(rng=rng, at=0.0).took_s for _ in range(50))
    assert said.finish_s.median == pytest.approx(usual, rel=0.1)
    assert said.finishes_before(10 * usual) > 0.75
    cold = forecast(model, TwinModel(), WORK, 50.0, is_cold=True)
    assert cold.finish_s.median > said.finish_s.median + 1.5


def test_what_cannot_be_true_is_not_learned() -> None:
    """A device that says it trained longer than it was at work teaches nothing."""
    liar = trial(rng=np.random.default_rng(5), at=0.0)
    liar = Trial(**{name: getattr(liar, name) for name in liar.__struct_fields__} | {"seconds": 99})

    assert learn(TwinModel(), liar) == TwinModel()


def test_a_new_device_is_taken_for_an_average_one() -> None:
    """What was never seen of a device is the fleet's; where nobody knows, nothing is said."""
    rng, fleet = np.random.default_rng(6), TwinModel()
    for number in range(10):
        fleet = learn(fleet, trial(rng=rng, at=10.0 * number))

    said = forecast(TwinModel(), fleet, WORK, 0.0)

    assert said.finish_s.median == pytest.approx(0.51, rel=0.1)
    assert forecast(TwinModel(), TwinModel(), WORK, 0.0) is None
    other = Work(family="cnn()", epochs=1, deadline_s=9.0)
    assert forecast(TwinModel(), fleet, other, 0.0) is None


def test_joules_are_said_where_somebody_knows_them() -> None:
    """Energy is watts times time and joules by megabyte, as its owner said; else it is unknown."""
    model = learn(TwinModel(), trial(rng=np.random.default_rng(7), at=0.0))
    power = power_of({"energy": {"training_w": 4.0, "up_j_per_mb": 10.0}})

    known = forecast(model, TwinModel(), WORK, 0.0, power=power)

    assert power == Power(training_w=4.0, up_j_per_mb=10.0)
    assert known.energy_j == pytest.approx(4.0 * known.training_s.mean + 1.0)
    assert forecast(model, TwinModel(), WORK, 0.0).energy_j is None
    assert power_of({"energy": {"training_w": "a lot"}}) is None
    assert power_of({"energy": {"training_w": -1.0}}) is None
    assert power_of({"energy": {"training_w": 1e308}}) is None


def test_a_trainer_is_cold_after_a_goodbye_or_a_long_pause() -> None:
    """A start is expected at first, after a restart, and when the trainer has gone idle."""
    warm = learn(TwinModel(), trial(rng=np.random.default_rng(8), at=0.0))

    assert is_cold(TwinModel(), 5.0) is True
    assert is_cold(warm, 5.0) is False
    assert is_cold(warm, 500.0) is True


def test_availability_follows_the_hours_of_the_week() -> None:
    """A device that is there by day is known to be away at night; rates lean on all hours."""
    monday = 4 * 24 * HOUR_S
    assert hour_of_week(monday) == 0
    seen = Availability()
    for day in range(28):
        seen = observed(seen, monday + (24 * day + 8) * HOUR_S, is_there=True)
        seen = observed(seen, monday + (24 * day + 18) * HOUR_S, is_there=False)
    now = monday + 28 * 24 * HOUR_S

    noon = chance_there(seen, now, now + 12 * HOUR_S, is_there=False)
    evening = chance_there(seen, now, now + 22 * HOUR_S, is_there=False)

    assert noon > 0.5 > 0.3 > evening
    assert chance_stays(seen, now + 9 * HOUR_S, now + 9 * HOUR_S + 60) > 0.99
    assert rates(seen, 18)[0] > 3 * rates(seen, 12)[0]
    whole = sum(hour.there_s + hour.away_s for hour in seen.hours.values())
    assert whole == pytest.approx((28 * 24 - 14) * HOUR_S)


@given(st.floats(0, 1e6), st.floats(0, 1e6), st.booleans())
@settings(deadline=None, max_examples=30)
def test_chances_are_chances(now, later_s, is_there) -> None:
    """Whatever the times, a probability is one, and now is certain."""
    seen = observed(observed(Availability(), 0.0, is_there=True), 5000.0, is_there=False)

    assert 0.0 <= chance_there(seen, now, now + later_s, is_there=is_there) <= 1.0
    assert chance_there(seen, now, now, is_there=is_there) == float(is_there)


def test_calibration_corrects_and_weighs() -> None:
    """A twin that is off by half is corrected in a few rounds; until then it weighs little."""
    raw, known = LogNormal(mu=0.0, sigma=0.1), Calibration()
    said = []
    for _ in range(12):
        ahead = corrected(raw, known)
        said.append(ahead.median)
        known = judged_time(known, raw_s=1.0, said_s=ahead.median, observed_s=2.0)
        known = judged_chance(known, chance=0.9, came=True, base_rate=0.5)

    assert said[0] == pytest.approx(1.0)
    assert said[-1] == pytest.approx(2.0, rel=0.15)
    assert known.errors[0] == pytest.approx(0.5)
    assert known.brier < known.base_brier
    worse = Calibration()
    for came in (False, True) * 6:
        worse = judged_chance(worse, chance=0.95, came=came, base_rate=0.5)
    honest = Calibration()
    for came in (False, True) * 6:
        honest = judged_chance(honest, chance=0.5, came=came, base_rate=0.5)
    assert Calibration().weight == 0.0 < worse.weight < 0.5 * honest.weight


def test_a_device_cut_off_at_every_deadline_is_known_as_slow() -> None:
    """Parts that were given up teach that they take longer than that: its chance falls."""
    rng, fleet = np.random.default_rng(9), TwinModel()
    for number in range(5):
        fleet = learn(fleet, trial(rng=rng, at=10.0 * number))
    work = Work(family=FAMILY, epochs=2, deadline_s=2.0, down_bytes=100_000)
    model, chances = TwinModel(), []
    for number in range(8):
        at = 100.0 * number
        said = forecast(model, fleet, work, at)
        chances.append(said.finishes_before(work.deadline_s))
        seen = Trial(work=work, asked_at=at, training_at=at + 0.2, status="training")
        part = Part(trial=seen, forecast=said, outcome="late")
        model, fleet = settle(model, fleet, part, at + 2.0)

    assert chances[0] > 0.8
    assert chances[-1] < 0.35
    assert model.outcomes == {"late": 8}
    assert completes(model, fleet, 0.0, 1.0) > 0.5


def test_who_is_surer_to_finish_is_drawn_more_often() -> None:
    """Over many rounds the surer device is asked more, the others now and then, with a reason."""
    rng, drawn = np.random.default_rng(10), []
    scores = {"good": 0.9, "fair": 0.5, "poor": 0.1}
    for _ in range(2000):
        selection = select_by_forecast(scores, 1, rng)
        drawn += selection.chosen
        assert selection.excluded.keys() == scores.keys() - set(selection.chosen)

    shares = [drawn.count(name) / 2000 for name in scores]

    weights = [score**2 for score in scores.values()]
    assert shares == pytest.approx([each / sum(weights) for each in weights], abs=0.04)
    assert len(select_by_forecast(scores, 5, rng).chosen) == 3


def test_wishes_bar_a_device_from_being_asked() -> None:
    """A device that shall not train now is not asked; a wish that cannot be obeyed bars nobody."""
    noon = 12 * HOUR_S

    assert "enabled" in barred_by(DesiredState(version=1, document={"enabled": False}), noon)
    night = DesiredState(version=1, document={"allowed_hours": [22, 6]})
    assert "22 to 6 h" in barred_by(night, noon)
    assert not barred_by(night, 23 * HOUR_S)
    assert not barred_by(DesiredState(version=1, document={"enabled": "never"}), noon)


def test_work_is_what_the_plan_asks() -> None:
    """Small models ride in their letters; a cap of steps bounds the samples; levels differ."""
    plan = RunPlan(
        name="r", rounds=1, model=ModelChoice(name="mlp"), policy=RoundPolicy(devices_per_round=1)
    )
    shadow = Shadow(device="d", created_at=0.0, modified_at=0.0)

    assert work_of(plan, 1000, 9.0, shadow).down_bytes == 0
    assert work_of(plan, 100_000, 9.0, shadow).down_bytes == 100_000
    assert Work(family="f", epochs=3, deadline_s=1.0, max_samples=64).seen(50) == 64
    assert Work(family="f", epochs=3, deadline_s=1.0).seen(50) == 150


@given(st.lists(st.booleans(), max_size=60))
@settings(deadline=None, max_examples=30)
def test_a_chance_is_never_certain(seen) -> None:
    """However often something happened, its probability lies between 0 and 1."""
    chance = Chance()
    for each in seen:
        chance = chance.after(each)

    assert 0.0 < chance.mean() < 1.0
    assert chance.count == len(seen)
    assert Estimate.first(2.0).figure.count == 1
