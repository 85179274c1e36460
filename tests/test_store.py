import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import msgspec
import pytest
from sqlalchemy import func, select

from cloud.coordination import facts as f
from cloud.record import tables as t
from cloud.record.registry import Registry
from cloud.record.store import Store
from federation.errors import StoreError
from federation.protocol.messages import Report
from tests.histories import CHUNK, REPORT, UPDATE, commit, content_of, send, with_open_round


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    opened = Store(database_url)
    yield opened
    opened.close()


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


def count(store: Store, table: type[t.Base]) -> int:
    with store._engine.connect() as connection:
        return connection.scalar(select(func.count()).select_from(table)) or 0


def test_a_hub_begins_with_nothing(database_url: str, registry: Registry) -> None:
    """A new database gives an empty memory, and epochs that grow with every start."""
    store = Store(database_url)
    memory, first = store.restore(registry), store.next_epoch()
    store.close()
    again = Store(database_url)

    assert memory == f.HubMemory()
    assert (first, again.next_epoch(), again.next_epoch()) == (1, 2, 3)
    again.close()


def test_every_kind_of_fact_is_told_in_the_log(store: Store, registry: Registry) -> None:
    """Each fact but a chunk becomes one event, in order; none holds bytes."""
    history = with_open_round(store)
    history.present("d1", "lost")
    history.note(f.DeviceReported("d1", 1, {"enabled": "applied"}, {"settings": {}}, 2.0))
    history.note(f.MirrorTaken("demo_1_d1", "demo", 1, "d1", b"samples", 2.5))
    history.note(f.Waiting("demo", 1, "updates", "0 of 2 are in", 60.0, 3.0))
    history.mark("demo_1_d1", "training", "")
    send(history, "demo_1_d2")
    history.accept("demo_1_d2")
    history.refuse("demo_1_d1", "rejected")
    history.note(f.LetterRefused("d3", "not for the hub", 4.0))
    history.close_round(b"second", 9, 8)
    history.release(b"onnx")
    history.abandon()
    history.end_run("finished")
    told = [fact for fact in history.noted if not isinstance(fact, f.ChunkStored)]
    assert {type(fact) for fact in history.noted} == set(get_args(f.HubFact))

    commit(store, history, registry)

    events = store.events()
    assert [event.kind.replace("-", "") for event in events] == [
        type(fact).__name__.lower() for fact in told
    ]
    assert [event.id for event in events] == sorted(event.id for event in events)
    assert store.events(after_id=events[2].id, limit=2) == events[3:5]
    assert {event.run for event in store.events(run="demo")} == {"demo"}


def test_an_update_counts_once(store: Store, registry: Registry) -> None:
    """The same update again changes nothing, nor does another of that device and round."""
    history = with_open_round(store)
    send(history, "demo_1_d1")
    history.accept("demo_1_d1")
    facts, accepted = history.noted[:], history.noted[-1]
    assert isinstance(accepted, f.UpdateAccepted)
    commit(store, history, registry)
    before = store.restore(registry), store.events()

    store.record([fact for fact in facts if not isinstance(fact, f.DeviceBorn)], registry)
    store.record([dataclasses.replace(accepted, attempt="demo_1_d2")], registry)

    assert (store.restore(registry), store.events()) == before
    assert count(store, t.Update) == 1


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("update without chunks", "with 0 of its 3 chunks"),
        ("unknown run", "run 'other' is not in the record"),
        ("other model", "brings a model that is not"),
        ("chunk of no attempt", "cannot record facts in"),
    ],
)
def test_a_batch_that_fails_leaves_nothing(
    store: Store, registry: Registry, bad: str, words: str
) -> None:
    """Where one fact of a batch cannot be recorded, none of the batch is."""
    history = with_open_round(store)
    content = content_of(UPDATE)
    wrong: dict[str, f.HubFact] = {
        "update without chunks": f.UpdateAccepted(
            "demo_1_d1", "demo", 1, "d1", content, REPORT, 1, 5.0
        ),
        "chunk of no attempt": f.ChunkStored("demo_1_d7", content, 0, b"", REPORT),
        "unknown run": f.RunOpened("other", content_of(b"m"), b"m", 5.0),
        "other model": f.RunOpened("demo", content_of(b"m"), b"n", 5.0),
    }

    with pytest.raises(StoreError, match=words):
        store.record([*history.noted, wrong[bad]], registry)

    assert store.restore(registry) == f.HubMemory()
    assert store.events() == []
    assert [plan.name for plan in store.requested()] == ["demo"]


def test_bytes_are_kept_as_long_as_they_may_count(store: Store, registry: Registry) -> None:
    """A closed round's chunks go; those of a late update stay until it is aggregated."""
    history = with_open_round(store, late="keep")
    send(history, "demo_1_d1")
    history.accept("demo_1_d1")
    history.chunk("demo_1_d2", UPDATE, 0, REPORT)
    history.close_round(b"second", 1, 1)
    commit(store, history, registry)
    after_close = count(store, t.Chunk)

    send(history, "demo_1_d2")
    history.accept("demo_1_d2")
    history.open_round(["d1"], {})
    history.abandon()
    commit(store, history, registry)
    after_abandon = store.restore(registry)
    chunks = count(store, t.Chunk)
    history.open_round(["d1"], {})
    history.close_round(b"third", 2, 2)
    commit(store, history, registry)

    assert after_close == 1
    assert after_abandon.run is not None
    assert [kept.data for kept in after_abandon.run.accepted] == [UPDATE]
    assert chunks == content_of(UPDATE).chunks
    assert count(store, t.Chunk) == count(store, t.Upload) == 0


def test_a_device_cannot_spoil_another_ones_update(store: Store, registry: Registry) -> None:
    """Wrong bytes under the digest of somebody else's update touch only the sender's own."""
    history = with_open_round(store)
    content = content_of(UPDATE)
    history.note(f.ChunkStored("demo_1_d2", content, 0, b"\0" * CHUNK, REPORT))
    send(history, "demo_1_d1")
    history.accept("demo_1_d1")

    commit(store, history, registry)

    run = store.restore(registry).run
    assert run is not None
    assert [(kept.device, kept.data) for kept in run.accepted] == [("d1", UPDATE)]


def test_a_chunk_sent_anew_replaces_the_damaged_one(store: Store, registry: Registry) -> None:
    """An upload that begins again under the same digest ends with the new bytes."""
    history = with_open_round(store)
    history.note(f.ChunkStored("demo_1_d1", content_of(UPDATE), 0, b"\0" * CHUNK, REPORT))
    commit(store, history, registry)
    send(history, "demo_1_d1")
    history.accept("demo_1_d1")

    commit(store, history, registry)

    run = store.restore(registry).run
    assert run is not None
    assert run.accepted[0].data == UPDATE


def test_the_manifest_follows_the_rounds(store: Store, registry: Registry) -> None:
    """The registry says beside its files which round gave which; prune keeps all of them."""
    history = with_open_round(store)
    history.close_round(b"second", 1, 1)
    history.release(b"onnx")
    commit(store, history, registry)
    orphan = registry.put(b"from a batch that never came to be")

    first, second = registry.manifest("demo")

    assert (first.round, first.weights) == (0, content_of(b"initial").digest)
    assert (second.round, second.weights) == (1, content_of(b"second").digest)
    assert (second.onnx, second.onnx_bytes) == (content_of(b"onnx").digest, 4)
    assert registry.prune(store.models()) == [orphan]


def test_a_lost_model_file_is_said(store: Store, registry: Registry, tmp_path: Path) -> None:
    """A hub whose newest model is gone does not begin with another one."""
    commit(store, with_open_round(store), registry)
    (tmp_path / "registry" / "models" / content_of(b"initial").digest).unlink()

    with pytest.raises(StoreError, match="no model"):
        store.restore(registry)


def test_what_devices_say_is_data(store: Store, registry: Registry) -> None:
    """NUL, endless text, integers of 64 bits and NaN are recorded, bounded, and harm nothing."""
    history = with_open_round(store)
    born = next(fact for fact in history.noted if isinstance(fact, f.DeviceBorn))
    evil = "\0\x1b[2J" + "x" * 100_000
    capability = msgspec.structs.replace(born.capability, agent=evil, models=(evil,) * 1000)
    history.note(dataclasses.replace(born, epoch=2**64 - 1, capability=capability))
    history.note(f.AttemptChanged("demo", 1, "demo_1_d1", "d1", "failed", evil, 5.0))
    history.note(f.LetterRefused(evil, evil, 5.0))
    history.note(f.UpdateRefused(evil, "d1", evil, "rejected", evil, 5.0))
    strange = Report(samples=2**64 - 1, loss_sum=float("nan"), seconds=float("inf"))
    history.note(f.ChunkStored("demo_1_d1", content_of(b"u"), 0, b"u", strange))

    store.record(history.noted, registry)

    memory = store.restore(registry)
    assert memory.run is not None
    reason = memory.run.attempts["demo_1_d1"].reason
    assert len(reason) == 500
    assert reason.startswith("\N{REPLACEMENT CHARACTER}" * 2 + "[2J")
    back = memory.uploads["demo_1_d1"].report
    assert (back.samples, str(back.loss_sum), back.seconds) == (2**64 - 1, "nan", float("inf"))
    assert max(len(str(event.detail)) for event in store.events()) < 10_000


def test_a_reader_sees_whole_batches(database_url: str, registry: Registry) -> None:
    """While the hub writes, others read without waiting, and never half of a batch."""
    writer, reader = Store(database_url), Store(database_url)
    history = with_open_round(writer)
    commit(writer, history, registry)
    done = threading.Event()
    seen: list[tuple[int, int]] = []

    def look() -> None:
        while not done.is_set():
            told = [event.kind for event in reader.events(run="demo")]
            seen.append((told.count("round-opened"), told.count("round-closed")))

    looking = threading.Thread(target=look)
    looking.start()
    for number in range(25):
        history.close_round(str(number).encode(), number, number)
        history.open_round(["d1"], {})
        commit(writer, history, registry)
    done.set()
    looking.join(30)

    assert len(set(seen)) > 3
    assert {opened - closed for opened, closed in seen} == {1}
    writer.close()
    reader.close()
