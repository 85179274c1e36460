from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from cloud.coordination import facts as f
from cloud.coordination.rounds import Wait
from cloud.record.registry import Registry
from cloud.record.store import Store
from federation.errors import ConfigError
from tests.histories import REPORT, commit, content_of, plan_of, send, with_open_round


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    opened = Store(database_url)
    yield opened
    opened.close()


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


def test_runs_are_asked_for_in_order(store: Store, registry: Registry) -> None:
    """The hub hears of the runs and stops that other processes ask for, until it acted."""
    for name in ("b", "a", "c"):
        store.request_run(plan_of(name))
    store.request_stop("a")
    heard = [plan.name for plan in store.requested()], store.stop_requested()

    store.record([f.RunOpened("b", content_of(b"m"), b"m", 1.0)], registry)
    store.record([f.RunEnded("a", "stopped", "asked", 2.0)], registry)

    assert heard == (["b", "a", "c"], ["a"])
    assert [plan.name for plan in store.requested()] == ["c"]
    assert store.stop_requested() == []
    assert [status.status for status in store.runs()] == ["active", "stopped", "requested"]


def test_a_plan_comes_back_as_it_was_written(store: Store) -> None:
    """A plan is the same after it went through the record, its paths included."""
    plan = msgspec.structs.replace(plan_of("demo", "keep"), evaluation=Path("data/held-out"))

    store.request_run(plan)

    assert store.requested() == [plan]
    assert store.run_status("demo").plan == plan


def test_wrong_names_are_said(store: Store, registry: Registry) -> None:
    """A name taken, unknown or over is refused with what there is instead."""
    with pytest.raises(ConfigError, match="no run 'demo'; no run was ever started"):
        store.request_stop("demo")
    store.request_run(plan_of("demo"))
    with pytest.raises(ConfigError, match="there is a run 'demo' already"):
        store.request_run(plan_of("demo"))
    with pytest.raises(ConfigError, match="no run 'dema'; there are demo"):
        store.run_status("dema")
    store.record([f.RunEnded("demo", "failed", "no devices", 1.0)], registry)
    with pytest.raises(ConfigError, match="is over: it is failed"):
        store.request_stop("demo")


def test_a_round_says_who_and_why(store: Store, registry: Registry) -> None:
    """Status, rounds, devices, attempts and exclusions tell how a round stands."""
    history = with_open_round(store)
    send(history, "demo_1_d1")
    history.accept("demo_1_d1")
    history.mark("demo_1_d2", "declined", "battery is low")
    history.note(f.Waiting("demo", 1, "updates", "1 of 2 updates are in", 60.0, 9.0))
    commit(store, history, registry)

    status, (round_row,) = store.run_status("demo"), store.rounds("demo")
    first, second = store.attempts("demo", 1)

    assert (status.status, status.round, status.is_open) == ("active", 1, True)
    assert status.wait == Wait("updates", "1 of 2 updates are in", 60.0)
    assert (round_row.asked, round_row.received, round_row.excluded) == (2, 1, 1)
    assert (first.device, first.status, first.verdict) == ("d1", "received", "stored")
    assert (first.counts_in, first.report) == (1, REPORT)
    assert (second.device, second.status, second.reason) == ("d2", "declined", "battery is low")
    assert store.excluded("demo", 1) == {"d9": "its link was lost"}
    assert [row.task_status for row in store.devices()] == ["received", "declined"]


def test_a_closed_round_says_what_it_gave(store: Store, registry: Registry) -> None:
    """After the end of a round its model, sums, bytes and measured accuracy are there."""
    history = with_open_round(store)
    history.close_round(b"second", 10, 20)
    commit(store, history, registry)
    store.record_evaluation("demo", 1, "held-out", 3, float("nan"), 4)
    store.record_evaluation("demo", 1, "held-out", 4, 1.0, 4)

    status, (row,) = store.run_status("demo"), store.rounds("demo")

    assert (status.bytes_up, status.bytes_down, status.accuracy) == (10, 20, 0.75)
    assert (row.status, row.model) == ("closed", content_of(b"second").digest)
    assert row.evaluations == status.evaluations
    assert row.evaluations[0].loss_sum is None
    assert store.devices()[0].task is None


def test_an_abandoned_round_keeps_its_reason(store: Store, registry: Registry) -> None:
    """A round that was given up says why, and the run goes on."""
    history = with_open_round(store)
    history.abandon()
    history.abandon()
    commit(store, history, registry)

    memory = store.restore(registry)

    assert [(row.status, row.reason) for row in store.rounds("demo")] == [("abandoned", "too few")]
    assert memory.run is not None
    assert memory.run.abandoned_in_a_row == 2
    assert store.run_status("demo").status == "active"


def test_all_answers_can_be_written_as_json(store: Store, registry: Registry) -> None:
    """What people ask for is a record that msgspec turns into JSON."""
    history = with_open_round(store)
    history.note(f.Waiting("demo", 1, "updates", "none", float("inf"), 9.0))
    commit(store, history, registry)

    answers = [
        store.runs(),
        store.rounds("demo"),
        store.devices(),
        store.attempts("demo", 1),
        store.events(),
    ]

    written = msgspec.json.decode(msgspec.json.encode(answers, enc_hook=str))
    assert written[0][0]["plan"]["name"] == "demo"
    assert all(len(answer) > 0 for answer in written)


def test_unknown_rounds_are_empty(store: Store) -> None:
    """Asking for a round that never was gives nothing, not an error."""
    assert store.attempts("demo", 7) == []
    assert store.excluded("demo", 7) == {}
    assert store.rounds("demo") == []
    assert store.events(run="demo") == []
