"""Digital agents train in a device's place, where the owner allows it, with the device's bits."""

from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge_agent.trainer import fulfil
from federation.errors import CodecError, DataError, StoreError
from federation.learning.data import LocalData
from federation.learning.mirroring import pack_mirror, unpack_mirror
from federation.learning.models import initial_weights
from federation.learning.samples import sample_digest
from federation.protocol.codec import decode, encode
from federation.protocol.messages import Assignment, Content, LocalPlan, ModelSpec, Uplink
from twin.agent import DigitalAgents, why_not
from twin.mirror import MirrorStore
from twin.students import base_for, enrol
from twin.teacher import Phase, Schooling, train_teacher

MODELS = {
    "d1": ModelSpec(name="mlp", sizes={"inputs": 32, "hidden": 8, "classes": 3}),
    "d2": ModelSpec(name="mlp", sizes={"inputs": 32, "hidden": 6, "hidden2": 5, "classes": 3}),
    "d3": ModelSpec(name="conv1d", sizes={"length": 16, "channels": 2, "filters": 4, "classes": 3}),
}
TEACHER = ModelSpec(name="mlp", sizes={"inputs": 32, "hidden": 16, "classes": 3})


def samples(seed: int, count: int = 20) -> LocalData:
    rng = np.random.default_rng(seed)
    return LocalData(
        rng.standard_normal((count, 16, 2)).astype(np.float32), rng.integers(0, 3, count)
    )


MIRRORS = {device: samples(seed) for seed, device in enumerate(MODELS)}


def store_with(folder: Path, devices: dict[str, LocalData]) -> MirrorStore:
    store = MirrorStore(folder)
    for device, data in devices.items():
        store.allow(device, 1.0)
        store.put(device, pack_mirror(data), 2.0)
    return store


def assignment_of(device: str, model: ModelSpec, method: str = "simkd") -> Assignment:
    return Assignment(
        attempt=f"run_1_{device}",
        run="run",
        round=1,
        deadline_s=60.0,
        base=Content(digest="0" * 64, size=0, chunk_bytes=1),
        plan=LocalPlan(
            model=model,
            method=method,
            epochs=2,
            batch_size=8,
            learning_rate=0.02,
            momentum=0.9,
            weight_decay=1e-3,
            seed=9,
        ),
    )


def jobs_of(method: str) -> list[tuple[str, Assignment, bytes]]:
    teacher = train_teacher(MIRRORS, TEACHER, Schooling(phases=(Phase(2, 0.05),), batch_size=8))
    students = enrol(MODELS, teacher, method, 0)
    return [
        (
            device,
            assignment_of(device, student.model, method),
            encode(base_for(student, teacher, MIRRORS[device], method)),
        )
        for device, student in students.items()
    ]


@pytest.mark.parametrize("method", ["simkd", "logit_kd"])
def test_a_twin_gives_the_bits_of_its_device(tmp_path: Path, method: str) -> None:
    """Exactly trained, an agent's update is the device's own, to the bit; else to 1e-5."""
    agents = DigitalAgents(store_with(tmp_path, MIRRORS), accelerator="cpu")
    jobs = jobs_of(method)

    exact, together = agents.fulfil(jobs, exact=True), agents.fulfil(jobs)

    for (device, assignment, base), mine, near in zip(jobs, exact, together, strict=True):
        theirs = fulfil(assignment, base, MIRRORS[device])
        assert not theirs.failure
        assert mine.update == theirs.update
        assert mine.report.loss_sum == theirs.report.loss_sum
        for name, tensor in decode(theirs.update).items():
            np.testing.assert_allclose(decode(near.update)[name], tensor, rtol=1e-5, atol=1e-5)


def test_an_update_holds_the_student_and_nothing_the_teacher_said(tmp_path: Path) -> None:
    """What comes back are the student's tensors: the answers do not travel twice."""
    agents = DigitalAgents(store_with(tmp_path, MIRRORS), accelerator="cpu")

    for trained in agents.fulfil(jobs_of("simkd")):
        assert all("/" not in name for name in decode(trained.update))


def test_who_may_not_be_stood_in_for_says_why(tmp_path: Path) -> None:
    """Owner, data and method each can forbid it, and the other jobs are done all the same."""
    store = store_with(tmp_path, {"d1": MIRRORS["d1"]})
    store.allow("d2", 3.0)
    jobs = jobs_of("simkd")
    scaffold = assignment_of("d1", MODELS["d1"], "scaffold")

    found = DigitalAgents(store, accelerator="cpu").fulfil(jobs)

    assert not found[0].failure
    assert "has mirrored no data" in found[1].failure
    assert "the owner of d3 allows no mirror" in found[2].failure
    assert "only the device remembers" in why_not(store, "d1", scaffold.plan)
    residual = msgspec.structs.replace(
        assignment_of("d1", MODELS["d1"], "fedavg").plan, uplink=Uplink(residual=True)
    )
    assert "residual" in why_not(store, "d1", residual)


def test_nothing_is_kept_that_was_not_allowed(tmp_path: Path) -> None:
    """Mirroring is off until the device says otherwise: what comes before that is refused."""
    store = MirrorStore(tmp_path)

    with pytest.raises(DataError, match="has not allowed it"):
        store.put("d1", pack_mirror(MIRRORS["d1"]), 1.0)

    assert store.devices == ()
    assert list(tmp_path.iterdir()) == []


def test_a_mirror_is_the_devices_data(tmp_path: Path) -> None:
    """Samples and labels come back to the bit, so labels of a teacher fit the device's own."""
    store = store_with(tmp_path, MIRRORS)

    for device, data in MIRRORS.items():
        kept = store.read(device)
        np.testing.assert_array_equal(kept.x, data.x)
        np.testing.assert_array_equal(kept.y, data.y)
        assert sample_digest(kept) == sample_digest(data)


def test_revoking_deletes_and_the_ledger_proves_it(tmp_path: Path) -> None:
    """After revoking, no file holds the samples, and the ledger names what is gone, and when."""
    store = store_with(tmp_path, MIRRORS)
    needle = MIRRORS["d1"].x.tobytes()
    assert any(needle in path.read_bytes() for path in tmp_path.iterdir())

    gone = store.revoke("d1", 7.0)

    assert gone is not None
    assert (gone.what, gone.digest, gone.at) == ("deleted", sample_digest(MIRRORS["d1"]), 7.0)
    assert not any(needle in path.read_bytes() for path in tmp_path.iterdir())
    assert not store.allows("d1")
    assert store.devices == ("d2", "d3")
    assert [e.what for e in MirrorStore(tmp_path).ledger() if e.device == "d1"] == [
        "allowed",
        "mirrored",
        "revoked",
        "deleted",
    ]
    with pytest.raises(DataError, match="has not allowed it"):
        store.put("d1", pack_mirror(MIRRORS["d1"]), 8.0)
    assert store.revoke("d1", 9.0) is None


def test_a_crash_while_revoking_ends_in_deletion(tmp_path: Path) -> None:
    """Killed between the ledger's line and the deletion, the next start deletes the file."""
    store = store_with(tmp_path, {"d1": MIRRORS["d1"]})
    kept = (tmp_path / "d1.safetensors").read_bytes()
    store.revoke("d1", 3.0)
    (tmp_path / "d1.safetensors").write_bytes(kept)

    again = MirrorStore(tmp_path)

    assert again.devices == ()
    assert not (tmp_path / "d1.safetensors").exists()


def test_a_crash_while_mirroring_leaves_a_ledger_that_can_be_read(tmp_path: Path) -> None:
    """Killed amid a line or a file, the next start goes on, and what is half there goes."""
    store_with(tmp_path, {"d1": MIRRORS["d1"]})
    ledger = tmp_path / "ledger.jsonl"
    ledger.write_bytes(ledger.read_bytes()[:-7])  # The file is there, its line is not.
    (tmp_path / "d1.arriving").write_bytes(b"half")

    again = MirrorStore(tmp_path)
    gone = again.revoke("d1", 7.0)

    assert gone is not None
    assert (gone.digest, gone.samples) == (sample_digest(MIRRORS["d1"]), 20)
    assert [path.name for path in tmp_path.iterdir()] == ["ledger.jsonl"]
    said = [entry.what for entry in MirrorStore(tmp_path).ledger()]
    assert said == ["allowed", "revoked", "deleted"]


def test_a_reader_mends_nothing(tmp_path: Path) -> None:
    """Who reads beside a hub that writes leaves alone what is on its way."""
    store_with(tmp_path, {"d1": MIRRORS["d1"]})
    (tmp_path / "d2.arriving").write_bytes(b"on its way")

    assert MirrorStore(tmp_path, is_reader=True).devices == ("d1",)

    assert (tmp_path / "d2.arriving").exists()


def test_a_changed_ledger_is_noticed(tmp_path: Path) -> None:
    """An entry that was changed, or left out, breaks the chain of those after it."""
    store_with(tmp_path, MIRRORS)
    ledger = tmp_path / "ledger.jsonl"
    lines = ledger.read_bytes().splitlines(keepends=True)

    for forged in (lines[:2] + lines[3:], [lines[0].replace(b"d1", b"d9"), *lines[1:]]):
        ledger.write_bytes(b"".join(forged))
        with pytest.raises(StoreError, match="does not follow"):
            MirrorStore(tmp_path)


@pytest.mark.parametrize(
    ("payload", "match"),
    [
        (b"no tensors", None),
        (encode({"x": np.zeros((2, 3), np.float32)}), "expected mirror/x and mirror/y"),
        (
            encode({"mirror/x": np.zeros((2, 3), np.float32), "mirror/y": np.zeros(3, np.float32)}),
            "one label a sample",
        ),
        (
            encode(
                {"mirror/x": np.zeros((2, 3), np.float32), "mirror/y": np.full(2, -1, np.float32)}
            ),
            "whole numbers",
        ),
    ],
)
def test_hostile_mirrors_are_refused(tmp_path: Path, payload: bytes, match: str | None) -> None:
    """Bytes that are no samples leave no file, whoever sends them."""
    store = MirrorStore(tmp_path)
    store.allow("d1", 0.0)

    with pytest.raises((CodecError, DataError), match=match):
        store.put("d1", payload, 1.0)

    assert store.devices == ()
    with pytest.raises((CodecError, DataError)):
        unpack_mirror(payload)


def test_a_mirror_is_bounded(tmp_path: Path) -> None:
    """More bytes than the store is told to keep are refused, and names are no paths."""
    store = MirrorStore(tmp_path, most_bytes=1000)
    store.allow("d1", 0.0)
    store.allow("../d2", 0.0)

    with pytest.raises(DataError, match="at most 1000"):
        store.put("d1", pack_mirror(samples(0, 200)), 1.0)
    with pytest.raises(DataError, match="no name of a device"):
        store.put("../d2", pack_mirror(samples(0, 5)), 1.0)


def test_a_file_that_was_damaged_is_not_trained_on(tmp_path: Path) -> None:
    """Bytes lost on the disk are noticed, and the job says so."""
    store = store_with(tmp_path, MIRRORS)
    (tmp_path / "d1.safetensors").write_bytes(b"gone")

    found = DigitalAgents(store, accelerator="cpu").fulfil(jobs_of("simkd"))

    assert "damaged" in found[0].failure
    assert not found[1].failure


def test_first_weights_do_not_matter_to_who_may(tmp_path: Path) -> None:
    """A run that averages may be stood in for too: FedAvg's update is the device's, to the bit."""
    store = store_with(tmp_path, MIRRORS)
    assignment = assignment_of("d2", MODELS["d2"], "fedavg")
    base = encode(initial_weights(MODELS["d2"], 0))

    [mine] = DigitalAgents(store, accelerator="cpu").fulfil([("d2", assignment, base)], exact=True)

    assert mine.update == fulfil(assignment, base, MIRRORS["d2"]).update
