import hashlib
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from cloud.record.registry import ManifestEntry, Registry
from federation.errors import StoreError


def test_what_was_put_is_read_again(tmp_path: Path) -> None:
    """A model is found under the SHA-256 of its bytes, by another process too."""
    data = os.urandom(100_000)

    digest = Registry(tmp_path).put(data)

    assert digest == hashlib.sha256(data).hexdigest()
    assert Registry(tmp_path).has(digest)
    assert Registry(tmp_path).read(digest) == data


def test_the_same_model_is_kept_once(tmp_path: Path) -> None:
    """Putting the same bytes again writes nothing."""
    registry = Registry(tmp_path)
    digest = registry.put(b"weights")
    before = (tmp_path / "models" / digest).stat()

    registry.put(b"weights")

    after = (tmp_path / "models" / digest).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert [path.name for path in (tmp_path / "models").iterdir()] == [digest]


def test_an_absent_model_is_an_error(tmp_path: Path) -> None:
    """Reading what was never put says what is missing; nothing outside the folder is read."""
    registry = Registry(tmp_path)
    (tmp_path / "secret").write_text("mine")

    with pytest.raises(StoreError, match="no model 0000"):
        registry.read("0" * 64)
    for name in ("../secret", "", "x" * 64):
        assert not registry.has(name)
        with pytest.raises(StoreError, match="is no digest"):
            registry.read(name)


def test_a_damaged_model_is_set_aside(tmp_path: Path) -> None:
    """Changed bytes are never returned: the file is set aside, and can be put again."""
    registry = Registry(tmp_path)
    digest = registry.put(b"weights")
    (tmp_path / "models" / digest).write_bytes(b"weightz")

    with pytest.raises(StoreError, match=r"is damaged.*set aside as .*\.damaged"):
        registry.read(digest)

    assert not registry.has(digest)
    assert (tmp_path / "models" / f"{digest}.damaged").read_bytes() == b"weightz"
    assert registry.put(b"weights") == digest
    assert registry.read(digest) == b"weights"


def test_putting_again_heals_a_damaged_model(tmp_path: Path) -> None:
    """A damaged file is replaced by the good bytes when they are put again."""
    registry = Registry(tmp_path)
    digest = registry.put(b"weights")
    (tmp_path / "models" / digest).write_bytes(b"weigh")

    registry.put(b"weights")

    assert registry.read(digest) == b"weights"


def test_a_killed_writer_leaves_no_half_model(tmp_path: Path) -> None:
    """Whenever the writer is killed, each name stands for all its bytes, and prune cleans up."""
    program = textwrap.dedent("""
        import os, sys
        from pathlib import Path
        from cloud.record.registry import Registry
        registry = Registry(Path(sys.argv[1]))
        while True:
            print(registry.put(os.urandom(2_000_000)), flush=True)
    """)
    order = [sys.executable, "-c", program, str(tmp_path)]
    for puts in (1, 2, 4):
        with subprocess.Popen(order, stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            said = [writer.stdout.readline().decode().strip() for _ in range(puts)]
            writer.send_signal(signal.SIGKILL)

        registry = Registry(tmp_path)
        for path in (tmp_path / "models").iterdir():
            assert path.suffix == ".part" or len(registry.read(path.name)) == 2_000_000
        registry.prune(set(said))
        assert {path.name for path in (tmp_path / "models").iterdir()} == set(said)


def test_prune_removes_only_what_nobody_needs(tmp_path: Path) -> None:
    """Files that are kept stay, and so do damaged ones for whoever wants to look."""
    registry = Registry(tmp_path)
    kept, gone, damaged = (registry.put(data) for data in (b"a", b"b", b"c"))
    (tmp_path / "models" / damaged).write_bytes(b"?")
    with pytest.raises(StoreError):
        registry.read(damaged)

    removed = registry.prune({kept})

    assert removed == [gone]
    assert registry.has(kept)
    assert (tmp_path / "models" / f"{damaged}.damaged").exists()


def test_a_manifest_is_replaced_whole(tmp_path: Path) -> None:
    """The manifest of a run says what was written last; other runs have none."""
    registry = Registry(tmp_path)
    first = [ManifestEntry(round=0, weights="a" * 64, weights_bytes=5, at=1.5)]
    second = [*first, ManifestEntry(round=1, onnx="b" * 64, onnx_bytes=7)]

    registry.write_manifest("demo", first)
    registry.write_manifest("demo", second)

    assert registry.manifest("demo") == second
    assert registry.manifest("other") == []


def test_an_unreadable_manifest_is_an_error(tmp_path: Path) -> None:
    """A manifest that somebody spoiled is told apart from none, with what to do."""
    registry = Registry(tmp_path)
    (tmp_path / "runs" / "demo.json").write_text("[{")

    with pytest.raises(StoreError, match=r"is no manifest.*delete it"):
        registry.manifest("demo")


def test_a_folder_that_cannot_be_is_an_error(tmp_path: Path) -> None:
    """A file where the folder should be is said at once."""
    (tmp_path / "taken").write_text("")

    with pytest.raises(StoreError, match=r"cannot create .*taken"):
        Registry(tmp_path / "taken")
