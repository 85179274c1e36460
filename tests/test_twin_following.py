"""What the hub records becomes twins: once, in order, from the log alone."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from cloud.coordination import facts as f
from cloud.record.registry import Registry
from cloud.record.store import Store
from cloud.twins.store import TwinStore
from federation.errors import TwinConflictError, TwinError
from federation.protocol.wishes import DesiredState
from tests.histories import History, commit, send, with_open_round
from twin.shadow import Edit


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    opened = Store(database_url)
    yield opened
    opened.close()


@pytest.fixture
def twins(database_url: str) -> Iterator[TwinStore]:
    opened = TwinStore(database_url)
    yield opened
    opened.close()


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


def wish(patch: dict[str, object], at: float = 2000.0) -> Edit:
    return Edit(
        writer="hub", part="desired", patch=patch, actor="me", cause="a test", received_at=at
    )


def trained(history: History, number: int, *, takes_s: float = 5.0) -> None:
    """A whole part of d1 in the open round, of which every moment is known."""
    attempt = f"demo_{number}_d1"
    history.mark(attempt, "accepted", "")
    history.mark(attempt, "training", "")
    history.now += takes_s
    send(history, attempt)
    history.accept(attempt)


def test_a_birth_makes_a_twin(store: Store, twins: TwinStore, registry: Registry) -> None:
    """A device has a twin from its first birth on: what it said, when, and that it is there."""
    history = History()
    history.born("d1", 7)
    commit(store, history, registry)

    assert twins.follow() == 1

    shadow = twins.twin("d1").shadow
    assert shadow.reported.state["hardware"]["agent"] == "agent of d1"
    assert shadow.reported.state["connection"] == {"state": "ready", "epoch": 7}
    assert shadow.reported.leaves["/connection/state"].received_at == 1000.5
    assert (shadow.revision, twins.count()) == (1, 1)
    assert twins.follow() == 0


def test_the_log_is_followed_exactly_once(
    store: Store, twins: TwinStore, registry: Registry, database_url: str
) -> None:
    """However the log is cut into pages, and whoever reads them, the twins are the same."""
    history = with_open_round(store)
    trained(history, 1)
    history.mark("demo_1_d2", "lost", "its link was lost")
    history.close_round(b"second", 9, 8)
    commit(store, history, registry)
    other = TwinStore(database_url)

    while twins.follow(limit=3) + other.follow(limit=2):
        pass

    assert twins.twin("d1").model.completes.count == 1
    assert twins.twin("d1").model.outcomes == {"received": 1}
    assert twins.twin("d2").model.outcomes == {"lost": 1}
    assert [row.outcome for row in twins.forecasts(run="demo")] == ["received", "lost"]
    other.close()


def test_a_wish_is_written_once_and_read_by_revision(
    store: Store, twins: TwinStore, registry: Registry
) -> None:
    """A wish raises its own version; who has not seen that is refused; the past can be read."""
    history = History()
    history.born("d1", 1)
    commit(store, history, registry)
    twins.follow()

    twins.edit("d1", [wish({"enabled": False})], {"desired": 0})
    with pytest.raises(TwinConflictError, match="has version 1"):
        twins.edit("d1", [wish({"enabled": True})], {"desired": 0})
    twins.edit("d1", [wish({"enabled": True}, 3000.0)], {"desired": 1})

    assert twins.wishes() == {"d1": DesiredState(version=2, document={"enabled": True})}
    assert twins.as_it_was("d1", revision=2).desired.state == {"enabled": False}
    assert twins.as_it_was("d1", at=1500.0).desired.state == {}
    assert [change.actor for change in twins.changes("d1", after=1)] == ["me", "me"]
    with pytest.raises(TwinError, match="no twin of 'd2'"):
        twins.edit("d2", [wish({})], {})


def test_what_a_device_reports_replaces_what_it_said(
    store: Store, twins: TwinStore, registry: Registry
) -> None:
    """A reported state is whole: a key it no longer has is gone; its hardware stays."""
    history = History()
    history.born("d1", 1)
    said = {"settings": {"enabled": True, "heartbeat_s": 5.0}, "surprise": 1}
    history.note(f.DeviceReported("d1", 1, {"enabled": "applied"}, said, history.tick()))
    history.note(f.DeviceReported("d1", 2, {}, {"settings": {"enabled": True}}, history.tick()))
    commit(store, history, registry)

    twins.follow()

    state = twins.twin("d1").shadow.reported.state
    assert state["settings"] == {"enabled": True}
    assert state["applied"] == {"version": 2, "results": {}}
    assert state["hardware"]["agent"] == "agent of d1"
    assert "surprise" not in state


def test_the_past_is_cut_at_a_snapshot(store: Store, twins: TwinStore, registry: Registry) -> None:
    """Every fiftieth shadow is kept whole; what is older than the retention goes, and says so."""
    history = History()
    history.born("d1", 1)
    commit(store, history, registry)
    twins.follow()
    for number in range(120):
        # Two years pass from the sixtieth wish to the next.
        at = 2000.0 + number + (6e7 if number >= 60 else 0.0)
        twins.edit("d1", [wish({"n": number}, at)], {})

    kept = [change.revision for change in twins.changes("d1")]

    assert kept == list(range(51, 122))
    assert twins.as_it_was("d1", revision=75).desired.state == {"n": 73}
    assert twins.as_it_was("d1", revision=50).desired.state == {"n": 48}
    with pytest.raises(TwinError, match="cannot be told"):
        twins.as_it_was("d1", revision=20)


def test_a_round_that_repeats_itself_changes_no_shadow(
    store: Store, twins: TwinStore, registry: Registry
) -> None:
    """What a device says again each round is young again, and fills no history."""
    history = with_open_round(store, devices=("d1",))
    trained(history, 1)
    history.close_round(b"second", 9, 8)
    history.open_round(["d1"], {})
    commit(store, history, registry)
    twins.follow()
    first = twins.twin("d1")
    trained(history, 2)
    history.close_round(b"third", 9, 8)
    commit(store, history, registry)
    twins.follow()
    second = twins.twin("d1")

    assert second.shadow.revision == first.shadow.revision
    leaf = "/training/samples"
    assert second.shadow.reported.leaves[leaf].at > first.shadow.reported.leaves[leaf].at
    said = twins.forecasts(device="d1")[-1]
    assert said.forecast is not None
    assert said.outcome == "received"
    assert second.model.calibration.median_error < 0.2


def test_an_entry_that_cannot_be_read_does_not_stop_the_rest(
    store: Store, twins: TwinStore, registry: Registry
) -> None:
    """An event of another version is left out, and those after it are followed."""
    history = History()
    history.born("d1", 1)
    commit(store, history, registry)
    with store._engine.begin() as connection:
        connection.execute(text("UPDATE events SET detail = '{}' WHERE kind = 'device-born'"))
    history.born("d2", 1)
    commit(store, history, registry)

    assert twins.follow() == 2

    assert [row.shadow.device for row in twins.twins()] == ["d2"]


def test_an_entry_of_another_shape_does_not_stop_the_twins(
    store: Store, twins: TwinStore, registry: Registry
) -> None:
    """An event that holds a number for an object is left out, and those after it are followed."""
    history = History()
    history.born("d1", 1)
    history.present("d1", "lost")
    commit(store, history, registry)
    with store._engine.begin() as connection:
        connection.execute(
            text(
                "UPDATE events SET kind = 'device-reported', detail = '{\"document\": 5}' "
                "WHERE kind = 'presence-changed'"
            )
        )
    history.born("d2", 1)
    commit(store, history, registry)

    assert twins.follow() == 3

    assert [row.shadow.device for row in twins.twins()] == ["d1", "d2"]
