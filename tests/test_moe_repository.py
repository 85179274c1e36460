"""The repository of models: versions that are whole, checked, and never change."""

import threading
from pathlib import Path

import pytest

from federation.errors import StoreError
from moe_serving.repository import About, models, open_version, publish, versions

ABOUT = About(kind="classifier", labels=("rest", "walk"), note="made by a test")


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A folder with what could be a model's files."""
    folder = tmp_path / "made"
    (folder / "extra").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 64)
    (folder / "extra" / "config.json").write_text("{}")
    return folder


def test_a_published_version_is_opened_with_what_was_said_of_it(made: Path, tmp_path: Path) -> None:
    """Publishing numbers versions from 1; the newest is opened unless another is named."""
    repository = tmp_path / "repository"
    first = publish(repository, "watch", made, ABOUT)
    (made / "model.safetensors").write_bytes(b"newer")
    second = publish(repository, "watch", made, ABOUT)

    newest, oldest = open_version(repository, "watch"), open_version(repository, "watch", 1)

    assert (first, second) == (1, 2)
    assert versions(repository, "watch") == [1, 2]
    assert models(repository) == ["watch"]
    assert newest.version == 2
    assert newest.about == ABOUT
    assert (newest.folder / "model.safetensors").read_bytes() == b"newer"
    assert (oldest.folder / "model.safetensors").read_bytes() == bytes(range(256)) * 64


@pytest.mark.parametrize("harm", ["cut", "flip", "remove", "add", "manifest", "no manifest"])
def test_a_version_that_is_not_what_was_published_is_refused(
    harm: str, made: Path, tmp_path: Path
) -> None:
    """A file that is cut short, altered, missing or new is found, and the error names it."""
    publish(tmp_path, "watch", made, ABOUT)
    file = tmp_path / "watch" / "1" / "model.safetensors"
    data = file.read_bytes()
    match harm:
        case "cut":
            file.write_bytes(data[:-1])
        case "flip":
            file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        case "remove":
            file.unlink()
        case "add":
            file.with_name("other").write_bytes(b"?")
        case "manifest":
            file.with_name("manifest.json").write_text('{"about": {"kind": "poem"}, "files": {}}')
        case _:
            file.with_name("manifest.json").unlink()

    with pytest.raises(StoreError, match=r"watch/1.*publish"):
        open_version(tmp_path, "watch")


@pytest.mark.parametrize("name", ["", "..", "a/b", "Watch", "a" * 65, "-a", "x\n"])
def test_a_name_that_could_leave_the_repository_is_refused(
    name: str, made: Path, tmp_path: Path
) -> None:
    """Names are lower-case letters, digits and hyphens, for publishing and for opening."""
    with pytest.raises(StoreError, match="cannot be a model's name"):
        publish(tmp_path, name, made, ABOUT)
    with pytest.raises(StoreError, match="cannot be a model's name"):
        open_version(tmp_path, name)


def test_what_is_not_there_is_said_to_be_not_there(made: Path, tmp_path: Path) -> None:
    """An unknown model, an unknown version and an empty folder each have their own words."""
    publish(tmp_path, "watch", made, ABOUT)
    (tmp_path / "empty").mkdir()

    with pytest.raises(StoreError, match="no version 7 of model 'watch'; it has 1"):
        open_version(tmp_path, "watch", 7)
    with pytest.raises(StoreError, match="of model 'poem'; it has none"):
        open_version(tmp_path, "poem")
    with pytest.raises(StoreError, match="has no files"):
        publish(tmp_path, "watch", tmp_path / "empty", ABOUT)
    assert not list((tmp_path / "watch").glob(".aside-*"))


def test_publishers_at_once_each_get_a_version_of_their_own(made: Path, tmp_path: Path) -> None:
    """Eight publishers at the same time make eight whole versions."""
    got: list[int] = []
    threads = [
        threading.Thread(target=lambda: got.append(publish(tmp_path, "watch", made, ABOUT)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(got) == list(range(1, 9))
    for version in got:
        open_version(tmp_path, "watch", version)
