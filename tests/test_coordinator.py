"""The coordinator: whoever comes, goes or is late, a run goes on by its rule and ends."""

import numpy as np
import pytest

from cloud.coordination.facts import (
    AttemptChanged,
    RoundAbandoned,
    RoundClosed,
    RoundOpened,
    RunEnded,
    UpdateAccepted,
    Waiting,
)
from federation.protocol import codec
from federation.protocol import messages as m
from federation.protocol.effects import Link
from federation.protocol.transfer import content_of
from tests.rooms import Room, chunks, encoded, run_plan, value
from tests.simulated import on_disk

# The rule ---------------------------------------------------------------------------------


def test_a_round_closes_with_the_mean_by_samples_in_whatever_order_updates_come():
    """The new model is the mean weighted by samples; the order of arrival has no say."""
    models = []
    for order in (("a", "b"), ("b", "a")):
        room = Room(run_plan(2))
        room.born("a", "b")
        for device in order:
            room.send(
                device, encoded({"a": 1.0, "b": 4.0}[device]), samples={"a": 2, "b": 1}[device]
            )
        models.append(room.of(RoundClosed)[0].model)
        assert room.of(RunEnded)[0].status == "finished"

    assert value(codec.decode(models[0])) == 2.0
    assert models[0] == models[1]


def test_over_selection_closes_with_the_first_k_and_calls_the_others_off():
    """Three are asked, two are enough: the third is cancelled and told so."""
    room = Room(run_plan(2, over_selection=1.5))
    room.born("a", "b", "c")
    assert len(room.of(RoundOpened)[0].attempts) == 3

    room.send("c", encoded(1.0))
    room.send("a", encoded(3.0))

    assert room.of(RoundClosed)[0].devices == ("a", "c")
    assert value(room.model()) == 2.0
    (cancel,) = room.told("b", m.Cancel)
    assert cancel.attempt == "run_1_b"
    assert room.of(AttemptChanged)[-1].status == "cancelled"


def test_an_update_whose_round_closes_between_its_chunks_is_too_late():
    """The verdict falls at the chunk that comes after the round has closed, and nothing counts."""
    room = Room(run_plan(1, rounds=2, over_selection=2.0))
    room.born("a", "b")
    data = encoded(4.0)
    content = content_of(data, 1024)
    opening = m.UpdateOpen(attempt="run_1_b", content=content, report=m.Report(samples=1))
    room.hear("b", opening)
    *most, last = chunks("run_1_b", data, content)
    for chunk in most:
        room.hear("b", chunk)
    room.send("a", encoded(1.0))

    room.hear("b", last)

    assert room.verdicts("b")[-1] == "too-late"
    assert [fact.attempt for fact in room.of(UpdateAccepted)] == ["run_1_a"]


def test_an_update_that_comes_again_counts_once():
    """A duplicate is told so, and has no second effect."""
    room = Room(run_plan(2))
    room.born("a", "b")
    room.send("a", encoded(1.0))
    room.send("a", encoded(1.0))
    room.send("b", encoded(3.0))
    room.send("b", encoded(3.0))

    assert room.verdicts("a") == ["stored", "duplicate"]
    assert len(room.of(UpdateAccepted)) == 2
    assert value(room.model()) == 2.0


# Waiting ----------------------------------------------------------------------------------


def test_every_wait_has_a_name_a_reason_and_an_end():
    """Whatever is waited for is recorded in words, with the latest time it may take."""
    room = Room(run_plan(2, gather_s=20.0, deadline_s=50.0))
    room.born("a")
    first = room.of(Waiting)[0]
    room.now = 2.0
    room.born("b")

    second = room.of(Waiting)[-1]

    assert (first.name, first.until) == ("devices", 20.0)
    assert "of 2 devices are there, quorum is 2" in first.reason
    assert (second.name, second.round, second.until) == ("updates", 1, 52.0)
    assert second.reason == "0 of 2 updates are in; waiting for a (assigned), b (assigned)"


def test_a_run_makes_do_with_its_quorum_when_gathering_has_taken_long_enough():
    """Two of four are there: the round waits `gather_s` for more, and then asks the two."""
    room = Room(run_plan(4, quorum=2, gather_s=20.0))
    room.born("a", "b")

    room.wait(19.9)
    assert room.of(RoundOpened) == []
    room.wait(20.0)

    assert [entry.device for entry in room.of(RoundOpened)[0].attempts] == ["a", "b"]


def test_a_run_without_devices_fails_after_its_last_chance_and_says_why():
    """Gathering fails `max_abandoned` + 1 times in a row: the run ends with the reason."""
    room = Room(run_plan(2, gather_s=20.0, max_abandoned=2))
    room.born("a")

    room.wait(1000.0)

    (ended,) = room.of(RunEnded)
    assert (ended.status, ended.at) == ("failed", 60.0)
    assert ended.reason == "1 devices after 20 s, quorum is 2: 3 times in a row"
    assert room.of(RoundOpened) == []


def test_rounds_without_a_quorum_are_abandoned_and_at_last_the_run():
    """Silence to the deadline, twice: the model stays, and the reason counts who did what."""
    room = Room(run_plan(2, rounds=5, deadline_s=30.0, max_abandoned=1))
    room.born("a", "b")
    room.hear("a", m.TaskEvent(attempt="run_1_a", event="declined", reason="battery is low"))

    room.wait(1000.0)

    first, second = room.of(RoundAbandoned)
    assert first.at == 30.0
    assert first.reason == "0 updates at the deadline, quorum is 2 (1 assigned, 1 declined)"
    assert second.round == 2
    assert room.of(RunEnded)[0].status == "failed"
    assert room.of(RoundClosed) == []


def test_without_its_own_link_the_hub_opens_no_round_and_does_not_fail():
    """The open round ends by its rule; then the run waits for the link, and says so anew."""
    room = Room(run_plan(2, rounds=2, deadline_s=30.0, gather_s=20.0, max_abandoned=0))
    room.born("a", "b")
    room.do(room.hub.on_link(Link(is_up=False, epoch=1, reason="no route"), room.now))

    room.wait(75.0)

    assert [fact.at for fact in room.of(RoundAbandoned)] == [30.0]
    waits = [fact for fact in room.of(Waiting) if fact.name == "link"]
    assert [(fact.at, fact.until) for fact in waits] == [(30.0, 50.0), (50.0, 70.0), (70.0, 90.0)]
    assert waits[0].reason == "the hub's link is down: no route"
    room.lost("a")
    room.do(room.hub.on_link(Link(is_up=True, epoch=1), room.now))
    assert room.of(Waiting)[-1].until == 95.0
    room.wait(80.0)
    room.born("a")
    room.send("a", encoded(1.0), number=2)
    room.send("b", encoded(3.0), number=2)
    assert room.of(RunEnded)[0].status == "finished"


def test_who_was_not_asked_is_recorded_with_the_reason():
    """Devices that are lost, that only infer, or that were not drawn: each with its reason."""
    room = Room(run_plan(2, quorum=1, gather_s=5.0))
    capability = m.Capability(agent="test", trains=False)
    room.hear("infers", m.Birth(capability=capability))
    room.born("gone")
    room.lost("gone")
    room.born("a")
    room.wait(5.0)

    (opened,) = room.of(RoundOpened)

    assert [entry.device for entry in opened.attempts] == ["a"]
    assert opened.excluded == {
        "gone": "its link was lost",
        "infers": "it does not train, it only infers",
    }


def test_an_unanswered_assignment_is_sent_again_and_an_answered_one_is_not():
    """Every ten seconds, until the device says that it has it."""
    room = Room(run_plan(2))
    room.born("a", "b")
    room.hear("a", m.TaskEvent(attempt="run_1_a", event="accepted"))

    room.wait(35.0)

    assert len(room.told("a", m.Assignment)) == 1
    assert len(room.told("b", m.Assignment)) == 4


def test_a_returning_device_whose_work_nobody_waits_for_is_asked_again():
    """What its Welcome does not list is no task of it, so the next round has it."""
    room = Room(run_plan(2, rounds=2, quorum=1, lost_grace_s=5.0, gather_s=1.0))
    room.born("a", "b")
    room.hear("a", m.TaskEvent(attempt="run_1_a", event="training"))
    room.lost("a")
    room.send("b", encoded(1.0))
    room.wait(5.5)
    assert len(room.of(RoundClosed)) == 1

    room.born("a", working="run_1_a")

    assert room.told("a", m.Welcome)[-1].open_attempts == ()
    assert [letter.attempt for letter in room.told("a", m.Assignment)] == ["run_1_a", "run_2_a"]


def test_an_assignment_made_at_a_birth_is_sent_again_too():
    """Everybody had answered when it was made: it is repeated like any other."""
    room = Room(run_plan(2))
    room.born("a", "b")
    for device in ("a", "b"):
        room.hear(device, m.TaskEvent(attempt=f"run_1_{device}", event="accepted"))
    room.wait(30.0)
    room.lost("b")
    room.born("b")

    room.wait(55.0)

    assert len(room.told("b", m.Assignment)) == 1 + 3


def test_the_will_of_an_older_connection_does_not_make_a_device_lost():
    """A death certificate that arrives after the rebirth is void."""
    room = Room(run_plan(2))
    room.born("a", "b")
    room.hear("a", m.Birth(capability=m.Capability(agent="test"), working="run_1_a"), epoch=2)

    room.hear("a", m.Presence(state="lost"), epoch=1)

    assert room.hub.fleet.is_there("a")
    assert room.hub.run.round.attempts["run_1_a"].status == "accepted"


# Restarts ---------------------------------------------------------------------------------


def opening_of(attempt, data):
    content = content_of(data, 1024)
    return m.UpdateOpen(attempt=attempt, content=content, report=m.Report(samples=1))


def part_of_a_run(room, data):
    """The life of a run of two devices, step by step; a restart may come between any two."""
    opening = opening_of("run_1_b", data["b"])
    sent = list(chunks("run_1_b", data["b"], opening.content))
    yield lambda: None
    yield lambda: room.born("a")
    yield lambda: room.born("b")
    yield lambda: room.hear("a", m.TaskEvent(attempt="run_1_a", event="training"))
    yield lambda: room.send("a", data["a"])
    yield lambda: room.hear("b", opening)
    for chunk in sent[:2]:
        yield lambda chunk=chunk: room.hear("b", chunk)
    yield lambda: [room.hear("b", chunk) for chunk in sent[2:]]
    yield lambda: room.send("a", data["a"], number=2)
    yield lambda: room.send("b", data["b"], number=2)


@pytest.mark.parametrize("restart_after", range(11))
def test_a_hub_restarted_in_any_state_ends_with_the_same_model(restart_after):
    """Between any two letters: births come anew, what was sent is not asked for again."""
    data = {"a": encoded(1.0), "b": encoded(0.3)}
    plan = run_plan(2, rounds=2)
    with on_disk(plan) as record:
        room = Room(plan, record=record)
        for number, step in enumerate(part_of_a_run(room, data)):
            step()
            if number == restart_after:
                room.restart()
                room.born(*["a", "b"][:restart_after])
                if 5 <= restart_after <= 7:
                    # A device announces again what it has not been answered for.
                    room.hear("b", opening_of("run_1_b", data["b"]))
        ended = room.of(RunEnded)

    assert [fact.status for fact in ended] == ["finished"]
    assert len(room.of(UpdateAccepted)) == 4
    expected = np.float32((1.0 + np.float64(np.float32(0.3))) / 2)
    assert value(room.model()) == expected


def test_a_restarted_hub_asks_again_only_those_who_do_not_hold_their_part():
    """A birth that names the attempt keeps it; one that does not is assigned anew."""
    plan = run_plan(2)
    with on_disk(plan) as record:
        room = Room(plan, record=record)
        room.born("a", "b")
        room.restart()
        room.born("a", working="run_1_a")
        room.born("b")

        assert room.told("a", m.Assignment) == []
        assert [letter.attempt for letter in room.told("b", m.Assignment)] == ["run_1_b"]
        assert room.told("a", m.Welcome)[0].open_attempts == ("run_1_a",)


def test_a_restarted_hub_gives_up_devices_that_do_not_come_back():
    """After `lost_grace_s` the round goes by its rule, without those never heard of again."""
    plan = run_plan(2, quorum=1, lost_grace_s=10.0, deadline_s=500.0)
    with on_disk(plan) as record:
        room = Room(plan, record=record)
        room.born("a", "b")
        room.send("a", encoded(2.0))
        room.restart()
        room.wait(60.0)

    assert room.of(RoundClosed)[0].at == 10.0
    assert room.of(RoundClosed)[0].devices == ("a",)


def test_a_stopped_run_calls_everybody_off_and_keeps_its_model():
    """An operator's stop ends the run at once; updates that come later are told so."""
    room = Room(run_plan(2, rounds=3))
    room.born("a", "b")

    room.do(room.hub.stop_run("run", room.now))
    room.send("a", encoded(1.0))

    assert room.of(RunEnded)[0].status == "stopped"
    assert len(room.told("a", m.Cancel)) == len(room.told("b", m.Cancel)) == 1
    assert room.verdicts("a") == ["too-late"]
