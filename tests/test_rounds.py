"""Rounds: whatever devices do and however long it takes, a round ends once and by its rule."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud.coordination.rounds import OPEN, Attempt, Round, RoundPolicy
from federation.errors import ConfigError
from federation.protocol.messages import Report

FATES = ["accepted", "training", "declined", "failed", "lost", "refused", "cancelled", "assigned"]
DEADLINE_S = 100.0


@st.composite
def histories(draw):
    """A policy, a number of devices, and a sequence of (seconds later, device, what it does)."""
    count = draw(st.integers(1, 6))
    wanted = draw(st.integers(1, count))
    policy = RoundPolicy(
        devices_per_round=wanted,
        quorum=draw(st.integers(1, wanted)),
        deadline_s=DEADLINE_S,
        lost_grace_s=draw(st.sampled_from([0.0, 5.0, 40.0])),
    )
    step = st.tuples(
        st.floats(0.0, 30.0), st.integers(0, count - 1), st.sampled_from([*FATES, "received"])
    )
    return policy, count, draw(st.lists(step, max_size=30))


def open_round(policy, count):
    attempts = [Attempt(f"r_1_d{n}", f"d{n}") for n in range(count)]
    return Round(1, policy, DEADLINE_S, attempts)


def play(policy, count, steps):
    """Yields the round and the time after each step, until it is settled."""
    opened, now = open_round(policy, count), 0.0
    yield opened, now
    for later_s, device, fate in steps:
        look = min(now + later_s, opened.next_look(now))
        while look < now + later_s and opened.outcome(look) == "wait":
            look = min(now + later_s, opened.next_look(look))
        if opened.outcome(look) != "wait":
            yield opened, look
            return
        now += later_s
        if fate == "received":
            opened.receive(f"r_1_d{device}", Report(samples=1))
        else:
            opened.mark(f"r_1_d{device}", fate, "", now)
        yield opened, now
        if opened.outcome(now) != "wait":
            return
    while opened.outcome(now) == "wait":
        now = opened.next_look(now)
        yield opened, now


@given(histories())
def test_every_history_ends_in_one_outcome_by_the_deadline(history):
    """Any sequence of fates ends, at its deadline at the latest, in closing or abandoning."""
    policy, count, steps = history

    *_, (opened, now) = play(policy, count, steps)

    assert opened.outcome(now) in ("close", "abandon")
    assert opened.outcome(max(now, DEADLINE_S)) != "wait"
    assert now <= DEADLINE_S


@given(histories())
def test_a_round_closes_exactly_when_its_quorum_is_in(history):
    """A settled round is closed with a quorum of updates, and abandoned without one."""
    policy, count, steps = history

    *_, (opened, now) = play(policy, count, steps)

    enough = len(opened.received) >= policy.quorum
    assert opened.outcome(now) == ("close" if enough else "abandon")


@given(histories())
def test_received_stays_received(history):
    """An update that is in is never taken back by what is said of its device later."""
    policy, count, steps = history
    seen = set()

    for opened, _ in play(policy, count, steps):
        received = {entry.device for entry in opened.received}
        assert seen <= received
        seen = received


@given(histories())
def test_waiting_always_has_somebody_to_wait_for_and_an_end(history):
    """A round that waits names whom it waits for, and looks again at a time to come."""
    policy, count, steps = history

    for opened, now in play(policy, count, steps):
        if opened.outcome(now) == "wait":
            missing = opened.missing(now)
            assert missing
            assert all(entry.status in OPEN or entry.status == "lost" for entry in missing)
            assert now < opened.next_look(now) <= DEADLINE_S
            assert missing[0].device in opened.wait(now, lambda _: 0.0).reason
            assert opened.wait(now, lambda _: 0.0).until <= DEADLINE_S


@given(histories(), st.integers(0, 30), st.floats(0.0, 50.0))
def test_a_restart_never_lengthens_a_round(history, after, away_s):
    """A restart of the hub keeps what was received and lets no round last longer than planned."""
    policy, count, steps = history
    played = list(play(policy, count, steps[:after]))
    opened, now = played[-1]
    received = {entry.device for entry in opened.received}
    restored = Round(1, policy, opened.deadline, opened.attempts.values())

    restored.restart(now + away_s)

    assert {entry.device for entry in restored.received} == received
    assert restored.deadline <= min(opened.deadline, now + away_s + policy.deadline_s)
    assert restored.outcome(now + away_s + policy.lost_grace_s) != "wait"


def test_a_clock_set_back_does_not_stretch_the_deadline():
    """A hub restarted with its clock an hour back waits for its deadline_s and no longer."""
    policy = RoundPolicy(devices_per_round=1, deadline_s=DEADLINE_S)
    opened = Round(1, policy, deadline=10_000.0, attempts=[Attempt("r_1_d0", "d0")])

    opened.restart(now=6_400.0)

    assert opened.deadline == 6_400.0 + DEADLINE_S


def test_a_device_that_comes_back_within_its_grace_is_waited_for_again():
    """Lost is not lost for good: a sign of life within the grace reopens the wait."""
    policy = RoundPolicy(devices_per_round=1, deadline_s=DEADLINE_S, lost_grace_s=10.0)
    opened = open_round(policy, 1)
    opened.mark("r_1_d0", "lost", "its link was lost", now=5.0)

    assert opened.outcome(14.9) == "wait"
    opened.mark("r_1_d0", "training", now=14.9)
    assert opened.outcome(90.0) == "wait"


def test_a_round_closes_at_its_target_though_others_still_train():
    """Over-selection: the round closes with the first K of those asked."""
    policy = RoundPolicy(devices_per_round=2, over_selection=1.5, deadline_s=DEADLINE_S)
    opened = open_round(policy, policy.wanted)

    opened.receive("r_1_d2", Report(samples=1))
    assert opened.outcome(1.0) == "wait"
    opened.receive("r_1_d0", Report(samples=1))
    assert opened.outcome(1.0) == "close"
    assert [entry.device for entry in opened.missing(1.0)] == ["d1"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quorum": 0}, "quorum"),
        ({"quorum": 5}, "quorum"),
        ({"over_selection": 0.5}, "over_selection"),
        ({"deadline_s": 0.0}, "deadline_s"),
        ({"gather_s": -1.0}, "not negative"),
    ],
)
def test_a_policy_that_cannot_work_is_refused(changes, said):
    """A policy out of range is refused by name before anything runs."""
    with pytest.raises(ConfigError, match=said):
        RoundPolicy(**({"devices_per_round": 4} | changes))
