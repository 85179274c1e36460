"""The cascade: what it asks, what it learns, and what it does when nobody answers."""

import random
from dataclasses import dataclass, field
from itertools import pairwise

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from edge_agent.agreement import SLACK, Agreement, AgreementState
from edge_agent.calibration import fit_temperature, probabilities
from edge_agent.cascade import Advice, Cascade, CascadeState, NoAdvice, Student
from edge_agent.cascade_config import CascadeConfig
from edge_agent.correction import Correction, Example
from federation.errors import ConfigError, DataError

LABELS = ("bent", "straight", "turned")
W = np.random.default_rng(1).standard_normal((2, 3)).astype(np.float32)
"""The device's model: logits are a window's mean over time, times this."""


def windows(count, seed=0):
    return np.random.default_rng(seed).standard_normal((count, 8, 2)).astype(np.float32)


def predict(x):
    return 3.0 * x.mean(axis=1) @ W


@dataclass
class Clock:
    """Time that the test moves."""

    now: float = 1000.0

    def __call__(self):
        return self.now


@dataclass
class Hub:
    """A better model, as the cascade sees it: it knows a window's class by its sum."""

    clock: Clock
    is_up: bool = True
    version: int = 1
    asked: list = field(default_factory=list)

    def __call__(self, x, deadline_s):
        self.asked.append(x)
        if not self.is_up:
            self.clock.now += deadline_s
            return NoAdvice("no answer by the deadline", x.size * 2)
        return Advice(better(x), LABELS, self.version, x.size * 2, len(x) * 20)


def better(x):
    return predict(x) + np.where(np.abs(x.sum(axis=(1, 2)))[:, None] < 3, [[9, 0, 0]], 0)


def build(hub, *, state=None, predict=predict, **options):
    config = CascadeConfig(model="watch", **({"corrects": False} | options))
    return Cascade(
        Student(predict, LABELS),
        hub,
        config,
        state=state or CascadeState(),
        clock=hub.clock,
        rng=random.Random(0),
    )


@pytest.fixture
def hub():
    return Hub(Clock())


def test_no_more_than_the_share_goes_up(hub):
    """Whatever the windows, at most the share is asked about, but for a few at the start."""
    cascade = build(hub, share=0.2, explore=0.5)

    answers = cascade.answer(windows(400))
    report = cascade.report()

    assert sum(each.source == "hub" for each in answers) == report.asked == report.heard
    assert 0.15 * 400 < report.asked <= 0.2 * (400 + SLACK)


def test_it_asks_about_its_doubts(hub):
    """With no exploring, what goes up is less certain than what stays; the hub's answer stands."""
    cascade, x = build(hub, explore=0.0), windows(600)
    confidence = probabilities(predict(x), 1.0).max(axis=1)

    answers = cascade.answer(x)

    went = np.array([each.source == "hub" for each in answers])
    told = [LABELS[place] for place in np.where(went, better(x).argmax(1), predict(x).argmax(1))]
    assert [each.label for each in answers] == told
    assert np.median(confidence[went]) < np.median(confidence[~went])


def test_a_device_whose_hub_always_agrees_hardly_asks(hub):
    """Doubt that never changed an answer is no reason to ask; where it did, it stays one."""
    same, other = build(Hub(hub.clock), explore=0.02), build(hub, explore=0.02)
    same._ask = lambda x, _: Advice(predict(x), LABELS, 1, 1, 1)

    for at in range(30):
        same.answer(windows(50, at))
        other.answer(windows(50, at))

    assert same.report().agreement == 1.0
    assert same.report().asked < 0.5 * other.report().asked
    assert same.report().threshold < other.report().threshold


def test_what_was_learned_outlives_a_restart(hub):
    """State as bytes and back gives the same decisions as going on."""
    cascade = build(hub)
    cascade.answer(windows(300))
    kept = msgspec.msgpack.decode(msgspec.msgpack.encode(cascade.state), type=CascadeState)

    again = build(hub, state=kept)

    assert again.state == cascade.state
    assert again.report().threshold == cascade.report().threshold != build(hub).report().threshold


def test_a_known_window_is_not_asked_again_until_the_model_is_new(hub):
    """A cached answer costs nothing; a newer version of the hub's model empties the cache."""
    cascade, x = build(hub, share=1.0, cost=0.0, explore=1.0), windows(4)

    first, second = cascade.answer(x), cascade.answer(x)
    hub.version = 2
    cascade.answer(windows(1, seed=5))
    third = cascade.answer(x)

    assert [each.label for each in first] == [each.label for each in second]
    assert [
        (f.source, s.source, t.source) for f, s, t in zip(first, second, third, strict=True)
    ] == [("hub", "cache", "hub")] * 4
    assert cascade.report().cached == 4


def test_a_silent_hub_costs_one_deadline_and_then_ever_fewer(hub):
    """The device answers alone, and the pause between questions grows until one is answered."""
    hub.is_up = False
    cascade, x = build(hub, share=1.0, cost=0.0, explore=1.0, deadline_s=0.5), windows(1)
    began, times = hub.clock.now, []
    for second in range(100):
        hub.clock.now = max(hub.clock.now, began + second)
        times.append(len(hub.asked))
        assert cascade.answer(windows(1, second))[0].source == "local"
    silent = len(hub.asked)
    hub.is_up = True
    hub.clock.now += 400
    answered = cascade.answer(x)

    assert 3 <= silent <= 7
    assert cascade.report().unanswered == silent
    assert answered[0].source == "hub"


def test_no_price_is_paid_down_while_the_hub_is_away(hub):
    """After silence the device does not ask more than it would have."""
    cascade = build(hub)
    cascade.answer(windows(200))
    price = cascade.state.agreement.price
    hub.is_up = False
    cascade.answer(windows(3000, 1))

    assert cascade.state.agreement.price == pytest.approx(price, abs=0.05)


def test_bytes_are_bounded_by_the_hour(hub):
    """Only so many bytes go up in an hour, and at most a quarter of them at once."""
    each = windows(1).size * 2
    cascade = build(hub, share=1.0, cost=0.0, explore=1.0, bytes_per_hour=40 * each)
    cascade.answer(windows(100))
    at_once = cascade.report().up_bytes
    hub.clock.now += 360.0
    cascade.answer(windows(100, 1))

    assert at_once == 10 * each
    assert cascade.report().up_bytes == 14 * each


@given(
    draws=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 0.999), st.booleans()), max_size=200),
    share=st.floats(0, 1),
)
@settings(max_examples=50, deadline=None)
def test_gain_falls_with_confidence_and_the_share_holds(draws, share):
    """For any history: surer is never worth more, and no more than the share was sent."""
    agreement = Agreement(AgreementState(), share=share, cost=0.01, explore=0.1)
    for confidence, draw, agreed in draws:
        if agreement.choose(confidence, draw) != "stay":
            agreement.hear(confidence, agreed=agreed)
    gains = [agreement.gain(step / 500) for step in range(501)]

    assert all(0 <= after <= before + 1e-12 for before, after in pairwise(gains))
    assert agreement.state.sent <= share * (len(draws) + SLACK)


def biased(x):
    """Somebody who wears the device so that all looks a little like the first class."""
    return predict(x) + np.array([[2.5, 0.0, 0.0]], np.float32)


def test_the_hubs_answers_teach_the_device(hub):
    """A wearer whom the device's model misjudges is known better for what was asked."""
    hub_says = lambda x, _: Advice(4 * predict(x), LABELS, 1, 1, 1)  # noqa: E731
    learning, fixed = (
        build(hub, predict=biased, corrects=corrects, share=0.2) for corrects in (True, False)
    )
    wrong = []
    for cascade in (learning, fixed):
        cascade._ask = hub_says
        said = cascade.answer(windows(600))[200:]
        right = predict(windows(600)).argmax(1)[200:]
        wrong.append(sum(a.label != LABELS[c] for a, c in zip(said, right, strict=True)))

    assert wrong[0] < 0.5 * wrong[1]
    assert learning.report().agreement > fixed.report().agreement


def test_a_correction_outlives_a_restart_but_not_its_model():
    """Examples as bytes and back correct alike; what does not fit them is left out."""
    taught, x = Correction(), windows(60)
    logits = biased(x).astype(np.float64)
    for window, row, answer in zip(x, logits, predict(x).argmax(1), strict=True):
        taught.learn(window, row, int(answer))
    broken = Example(figures=b"123", logits=b"", answer=0)

    again = Correction((*taught.examples, broken))

    np.testing.assert_allclose(again.apply(x, logits), taught.apply(x, logits), atol=1e-4)
    assert len(again.examples) == 60
    assert np.array_equal(Correction().apply(x, logits), logits)


def test_the_temperature_is_the_one_of_least_loss():
    """The fit equals a general minimiser's, and makes confidence what it says."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((3000, 4))
    labels = np.array([rng.choice(4, p=p) for p in probabilities(logits, 1.0)])
    sharp = (2.5 * logits).astype(np.float32)

    def loss(t):
        return -np.log(probabilities(sharp, t)[np.arange(3000), labels]).mean()

    found = fit_temperature(sharp, labels)

    assert found == pytest.approx(
        minimize_scalar(loss, bounds=(0.2, 9), method="bounded").x, rel=1e-3
    )
    assert found == pytest.approx(2.5, rel=0.1)


def test_calibration_samples_must_fit():
    """None at all, or classes the model does not have, are refused in words."""
    for labels in (np.empty(0, np.int64), np.array([7])):
        with pytest.raises(DataError, match="expected one sample or more"):
            fit_temperature(np.zeros((len(labels), 3), np.float32), labels)


@pytest.mark.parametrize("field", ["share", "cost", "explore", "deadline_s", "together"])
def test_a_value_out_of_range_is_refused(field):
    """The configuration names the key and its range."""
    with pytest.raises(ConfigError, match=rf"cascade\.{field} is -1; it lies between"):
        CascadeConfig(model="watch", **{field: -1})
