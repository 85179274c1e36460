"""What devices send can be wrong: it is refused with a recorded reason, and the run goes on."""

import msgspec
import numpy as np
import pytest

from cloud.coordination.facts import (
    AttemptChanged,
    DeviceBorn,
    LetterRefused,
    PresenceChanged,
    RoundClosed,
    RunEnded,
    UpdateAccepted,
    UpdateRefused,
)
from federation.errors import ProtocolError
from federation.protocol import codec
from federation.protocol import messages as m
from federation.protocol.bitmap import indices_in
from federation.protocol.transfer import content_of
from tests.rooms import Room, chunks, encoded, run_plan, value, weights


def nan_update():
    broken = weights(1.0)
    broken["classifier.bias"][3] = np.nan
    # The codec refuses to write such weights, a broken device does not.
    sound = codec.encode(weights(1.0))
    return sound.replace(
        weights(1.0)["classifier.bias"].tobytes(), broken["classifier.bias"].tobytes(), 1
    )


BAD_UPDATES = {
    "NaN": (nan_update(), "finite"),
    "another shape": (codec.encode(weights(1.0) | {"classifier.bias": np.ones(9, np.float32)}), ""),
    "another tensor": (codec.encode(weights(1.0) | {"other.bias": np.ones(9, np.float32)}), ""),
    "no tensors": (codec.encode({}), ""),
    "garbage": (b"\x00" * 500, ""),
    "truncated": (encoded(1.0)[:-40], ""),
}


@pytest.mark.parametrize("kind", BAD_UPDATES)
def test_a_wrong_update_is_refused_with_a_reason_and_the_run_goes_on(kind):
    """NaN, wrong shapes and garbage are refused, recorded and told; the others make the model."""
    data, said = BAD_UPDATES[kind]
    room = Room(run_plan(2, quorum=1))
    room.born("a", "b")

    room.send("a", data)
    room.send("b", encoded(3.0))

    assert room.verdicts("a") == ["rejected"]
    (refused,) = room.of(UpdateRefused)
    assert refused.verdict == "rejected"
    assert said in refused.reason
    assert len(refused.reason) > 10
    assert room.told("a", m.UpdateAck)[0].reason == refused.reason
    assert room.of(RoundClosed)[0].devices == ("b",)
    assert value(room.model()) == 3.0


@pytest.mark.parametrize(
    "changes",
    [
        {"content": m.Content(digest="0" * 64, size=10**9, chunk_bytes=65536), "inline": None},
        {"content": m.Content(digest="0" * 64, size=0, chunk_bytes=65536), "inline": None},
        {"content": m.Content(digest="0" * 64, size=100, chunk_bytes=0), "inline": None},
        {"content": m.Content(digest="0" * 64, size=70_000, chunk_bytes=1), "inline": None},
        {"content": m.Content(digest="../../etc", size=100, chunk_bytes=100), "inline": None},
        {"report": m.Report(samples=0)},
        {"report": m.Report(samples=2**41)},
        {"report": m.Report(samples=1, loss_sum=float("nan"))},
        {"inline": b"another length"},
    ],
    ids=["huge", "empty", "chunks-of-0", "too-many-chunks", "bad-digest", "no-samples",
         "too-many-samples", "nan-loss", "wrong-length"],
)  # fmt: skip
def test_an_announcement_out_of_bounds_is_refused_before_a_byte_is_taken(changes):
    """What an opening letter claims is bounded; nothing of it reaches memory or record."""
    room = Room(run_plan(2))
    room.born("a", "b")

    room.send("a", encoded(1.0), **changes)

    assert room.verdicts("a") == ["rejected"]
    assert room.of(UpdateRefused)[0].reason
    assert room.hub.run.bytes_up == 0


def test_an_attempt_of_another_device_is_refused_and_recorded():
    """A device can neither send nor spoil what belongs to another, and need not ask again."""
    room = Room(run_plan(2))
    room.born("a", "b")

    room.send("a", encoded(9.0), sender="b")
    room.hear("b", m.TaskEvent(attempt="run_1_a", event="failed"))
    room.hear("b", m.UpdateChunk(attempt="x" * 300, digest="0" * 64, index=0, crc32=0, data=b""))

    assert [fact.sender for fact in room.of(LetterRefused)] == ["b"] * 3
    assert room.verdicts("b") == ["rejected"]
    assert room.of(UpdateAccepted) == []
    assert room.hub.run.round.attempts["run_1_a"].status == "assigned"


def test_chunk_garbage_is_refused_and_the_sound_chunks_count():
    """Wrong checksums, lengths and indices are recorded; the transfer goes on from its bitmap."""
    room = Room(run_plan(2))
    room.born("a", "b")
    data = encoded(1.0)
    content = content_of(data, 1024)
    opening = m.UpdateOpen(attempt="run_1_a", content=content, report=m.Report(samples=1))
    room.hear("a", opening)
    first, *rest = chunks("run_1_a", data, content)

    for changes in ({"crc32": 1}, {"data": b"short"}, {"index": 99}, {"index": -1}):
        room.hear("a", msgspec.structs.replace(first, **changes))
    assert indices_in(room.told("a", m.UpdateAck)[-1].received, content.chunks) == frozenset()
    for chunk in (*rest, first, first):
        room.hear("a", chunk)

    assert len(room.of(LetterRefused)) == 4
    assert room.verdicts("a")[-2:] == ["stored", "duplicate"]


def test_a_whole_with_another_digest_is_asked_for_again_and_at_last_rejected():
    """Sound chunks of a wrong whole: the transfer restarts a few times and then is refused."""
    room = Room(run_plan(2))
    room.born("a", "b")
    data = encoded(1.0)
    content = msgspec.structs.replace(content_of(data, 1024), digest="0" * 64)
    opening = m.UpdateOpen(attempt="run_1_a", content=content, report=m.Report(samples=1))
    room.hear("a", opening)

    tries = 0
    while "rejected" not in room.verdicts("a"):
        tries += 1
        assert tries < 10
        for chunk in chunks("run_1_a", data, content):
            room.hear("a", chunk)

    assert tries > 1
    assert "SHA-256" in room.of(UpdateRefused)[0].reason


def test_letters_that_are_not_for_the_hub_or_not_readable_are_recorded():
    """A letter of the wrong kind, or one that could not be read, is noted and does no harm."""
    room = Room(run_plan(1))
    room.born("a")

    room.hear("a", m.Welcome(epoch=1))
    room.do(room.hub.on_unreadable("a", ProtocolError("letter has version 9"), room.now))

    assert [fact.reason for fact in room.of(LetterRefused)] == [
        "Welcome is not a letter for the hub",
        "letter has version 9",
    ]
    room.send("a", encoded(2.0))
    assert room.of(RunEnded)[0].status == "finished"


def test_updates_of_invented_runs_are_answered_and_fill_no_record():
    """A thousand names that nobody asked for leave a bounded number of refusals, no more."""
    room = Room(run_plan(2))
    room.born("a", "b")

    for number in range(1000):
        room.send("a", encoded(1.0), attempt=f"other{number}_1_a")
        room.send("a", encoded(1.0), attempt=f"run_{number + 2}_a")

    assert room.verdicts("a") == ["too-late", "rejected"] * 1000
    assert room.of(UpdateRefused) == []
    assert len(room.of(LetterRefused)) == 20


def test_a_device_that_toggles_fills_no_record():
    """Births, presences and events without end: each is answered, few are recorded."""
    room = Room(run_plan(2))
    room.born("a", "b")

    for number in range(500):
        room.hear("a", m.TaskEvent(attempt="run_1_a", event=("cancelled", "training")[number % 2]))
        room.lost("a")
        room.born("a", working="run_1_a")

    assert len([fact for fact in room.of(AttemptChanged) if fact.device == "a"]) == 20
    assert len([f for f in room.of(DeviceBorn) + room.of(PresenceChanged) if f.device == "a"]) == 60
    assert len(room.told("a", m.Welcome)) == 501
    room.send("a", encoded(1.0))
    room.send("b", encoded(1.0))
    assert room.of(RunEnded)[0].status == "finished"


def test_a_request_for_a_model_is_served_within_bounds():
    """The same chunk twice, chunks too small or too large, and too many: none is served."""
    model = codec.encode({"classifier.weight": np.ones((1_500_000,), np.float32)})
    room = Room(run_plan(1), model)
    room.born("a")

    def served(chunk_bytes, wanted):
        content = msgspec.structs.replace(content_of(model, 65536), chunk_bytes=chunk_bytes)
        room.said.clear()
        room.hear("a", m.BlobRequest(content=content, wanted=wanted))
        return [letter.index for letter in room.told("a", m.BlobChunk)]

    assert served(65536, (3, 3, -1, 2, 10**9, 3)) == [3, 2]
    assert served(1024, tuple(range(1000))) == list(range(64))
    assert served(256 * 1024, tuple(range(20))) == list(range(16))
    for chunk_bytes in (0, 1023, 256 * 1024 + 1):
        assert served(chunk_bytes, (0,)) == []
        assert len(room.told("a", m.BlobGone)) == 1


def test_a_stranger_is_asked_for_its_birth():
    """A device that the hub does not know is told to introduce itself; nothing is taken."""
    room = Room(run_plan(1))

    room.send("a", encoded(1.0))

    assert len(room.told("a", m.Rebirth)) == 1
    assert room.of(UpdateAccepted) == []
