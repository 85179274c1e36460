"""A hub's wishes reach a device, which obeys what it can and says what it made of each."""

import msgspec
import pytest

from cloud.coordination.facts import DeviceReported, HubMemory, LetterRefused
from edge_agent.facts import Held, WishKept
from edge_agent.journal import Journal
from federation.protocol import messages as m
from federation.protocol.wishes import DAY_S, DesiredState, ReportedState, is_within
from tests.desk import CONTENT, Counterpart, Desk, assignment, live
from tests.rooms import Room, run_plan


def desire(desk, document, version=1, epoch=1):
    desk.hear(DesiredState(version=version, document=document), epoch)
    return desk.take(ReportedState)[-1]


def declined(desk):
    desk.hear(assignment())
    return desk.take(m.TaskEvent)[-1]


def test_each_key_is_answered() -> None:
    """A device says of each key whether it applied it, and why not; the rest it obeys."""
    desk = Desk().boot().meet()

    said = desire(desk, {"heartbeat_s": 5, "allowed_hours": "nights", "colour": "red"})

    assert said.results["heartbeat_s"] == "applied"
    assert said.results["allowed_hours"].startswith("rejected: allowed_hours is 'nights'")
    assert said.results["colour"] == "unsupported"
    assert said.document["settings"] == {"enabled": True, "heartbeat_s": 5}
    desk.now += 5.0
    desk.wake()
    assert desk.take(m.Heartbeat)


def test_a_device_that_shall_not_train_does_not() -> None:
    """With enabled false a task is declined, the one in hand is dropped, and both are said."""
    desk = Desk().boot().meet()
    desk.hear(assignment())
    desk.take(m.TaskEvent)

    desire(desk, {"enabled": False})

    (dropped,) = desk.take(m.TaskEvent)
    assert (dropped.event, "enabled is false" in dropped.reason) == ("cancelled", True)
    assert declined(desk).event == "declined"
    desire(desk, {}, version=2)
    assert declined(desk).event == "accepted"


def test_bytes_of_a_day_are_bounded() -> None:
    """When a day's bytes are spent no task is taken, over a restart too; a new day begins at 0."""
    desk, hub = Desk(), Counterpart()
    live(desk, hub)
    most = CONTENT.size * 2 + 1000
    desire(desk, {"max_bytes_per_day": most})
    desk.do(desk.agent._terms.spend(CONTENT.size, CONTENT.size, desk.now))
    desk.hear(assignment("run_4_dev"))
    reason = desk.take(m.TaskEvent)[-1].reason

    again = Desk(desk.held)
    again.now = desk.now
    again.boot().meet()
    again.hear(assignment("run_5_dev"))
    still = again.take(m.TaskEvent)[-1].event
    again.now += DAY_S
    again.hear(assignment("run_6_dev"))

    assert f"at most {most} a day" in reason
    assert still == "declined"
    assert again.take(m.TaskEvent)[-1].event == "training"


@pytest.mark.parametrize(
    ("hours", "hour", "within"),
    [((8, 18), 12, True), ((8, 18), 18, False), ((22, 6), 23, True), ((22, 6), 7, False)],
)
def test_hours_may_run_over_midnight(hours, hour, within) -> None:
    """Hours of the day are begin and end; where the first is the later, midnight is inside."""
    assert is_within(hours, 5 * DAY_S + hour * 3600.0) is within


def test_only_newer_wishes_are_obeyed() -> None:
    """An older version changes nothing; a hub that lost its record is heard all the same."""
    desk = Desk().boot().meet()
    desire(desk, {"heartbeat_s": 5}, version=3)

    older = desire(desk, {"heartbeat_s": 9}, version=2)
    anew = desire(desk, {"heartbeat_s": 9}, version=1, epoch=2)

    assert (older.applied, older.document["settings"]["heartbeat_s"]) == (3, 5)
    assert (anew.applied, anew.document["settings"]["heartbeat_s"]) == (1, 9)


def test_wishes_outlive_the_power(tmp_path) -> None:
    """A device remembers what was desired of it, and says it again with its next birth."""
    kept = WishKept(epoch=4, version=2, document={"enabled": False}, day=3, bytes_today=9)
    journal = Journal(tmp_path)
    journal.record(kept)
    journal.close()
    again = Journal(tmp_path)

    held = again.restore()
    desk = Desk(held).boot().meet(hub_epoch=5)

    assert held.wish == kept
    assert desk.take(ReportedState)[-1].applied == 2
    again.close()


def test_a_device_of_which_nothing_is_desired_says_nothing_more() -> None:
    """Without wishes, and without figures of its owner, no letter is added to a birth."""
    desk = Desk(Held()).boot().meet()

    assert not desk.take(ReportedState)


def test_the_hub_tells_its_wishes_whole_at_every_birth() -> None:
    """A reconnect exchanges the full state both ways: the birth's answer has the newest wish."""
    room = Room(run_plan())
    room.born("a")
    room.do(room.hub.on_wish("a", DesiredState(version=1, document={"enabled": False}), 0.0))
    room.do(room.hub.on_wish("b", DesiredState(version=4, document={"enabled": True}), 0.0))

    room.born("b")
    room.lost("a")
    room.born("a")

    assert [wish.version for wish in room.told("a", DesiredState)] == [1, 1]
    assert [wish.version for wish in room.told("b", DesiredState)] == [4]
    assert HubMemory().wishes == {}


@pytest.mark.parametrize(
    "document",
    [{"a": float("nan")}, {"a": {"b": [None]}}, {"a": "x" * 20_000}, {"k" * 99: 1}, {"a": b"x"}],
)
def test_a_hostile_report_is_refused(document) -> None:
    """What a device reports is bounded and JSON, or it is refused and nothing is recorded."""
    room = Room(run_plan())
    room.born("a")

    room.hear("a", ReportedState(document=document))
    room.hear("a", ReportedState(applied=1, results={"enabled": "applied"}))

    assert len(room.of(LetterRefused)) == 1
    (fact,) = room.of(DeviceReported)
    assert (fact.device, fact.applied, fact.document) == ("a", 1, {})


def test_letters_of_twins_travel() -> None:
    """A wish and a report come back from the wire as they went."""
    wish = DesiredState(version=2, document={"a": [1, {"b": "c"}], "d": 1.5})

    assert m.unseal(m.seal("hub", 1, wish)).body == wish
    assert msgspec.msgpack.encode(wish)
