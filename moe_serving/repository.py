"""Models to be served, in versions that never change.

```
<repository>/<model>/<version>/manifest.json    what it is, and the SHA-256 of every other file
<repository>/<model>/<version>/...              config.json, model.safetensors, and what goes along
<repository>/<model>/.aside-<random>/           a version that is being written
```

A version is a whole number from 1. It is written aside and renamed into place, so a reader sees
all of it or nothing; several publishers may work at once.
"""

import contextlib
import errno
import hashlib
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import msgspec

from federation.errors import StoreError

Kind: TypeAlias = Literal["lm", "translation", "classifier"]

MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 16 * 1024 * 1024
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")

_ASIDE = ".aside-"
_VERSION = re.compile(r"[1-9][0-9]{0,8}")
_BLOCK_BYTES = 4 * 1024 * 1024


class File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file of a version: its size and its SHA-256 in lower-case hexadecimal."""

    size_bytes: Annotated[int, msgspec.Meta(ge=0)]
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class About(msgspec.Struct, frozen=True, kw_only=True):
    """What a model is, beyond its weights: what a server must know to talk to its clients.

    `tokenizer` names a tokenizer of `moe_serving.tokens`; `labels` are a classifier's classes in
    order; `note` is for people, such as where the model comes from.
    """

    kind: Kind
    tokenizer: str = "bytes"
    labels: tuple[str, ...] = ()
    note: str = ""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """A version's `manifest.json`; paths of files are relative, with forward slashes."""

    about: About
    files: dict[str, File]


@dataclass(frozen=True, slots=True)
class Published:
    """One version of one model, whose files were found to be what its manifest says."""

    name: str
    version: int
    folder: Path
    about: About


def publish(repository: Path, name: str, folder: Path, about: About) -> int:
    """Copy the files in a folder into the repository as the model's next version; its number.

    Raises:
        StoreError: a name that is none, nothing to publish, or a disk that is full or read-only.
    """
    home = repository / check_model_name(name)
    try:
        home.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=_ASIDE, dir=home))
        try:
            _copy_in(folder, aside, about)
            return _rename_in(aside, home)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise StoreError(
            f"cannot publish {name!r} in {repository} ({error.strerror or error}); a folder that "
            "can be read and a disk with room were expected: see to both and publish again"
        ) from error


def models(repository: Path) -> list[str]:
    """The names of all models that have a version, in order; of no repository none."""
    return [
        each.name
        for each in _folders(repository)
        if NAME.fullmatch(each.name) and versions(repository, each.name)
    ]


def versions(repository: Path, name: str) -> list[int]:
    """The versions of a model, oldest first; of one that is not there none."""
    home = repository / check_model_name(name)
    return sorted(int(each.name) for each in _folders(home) if _VERSION.fullmatch(each.name))


def open_version(repository: Path, name: str, version: int | None = None) -> Published:
    """A version (the newest if none is named), every byte of it checked.

    Raises:
        StoreError: there is none, or a file is missing, cut short, altered or not in the manifest.
    """
    there = versions(repository, name)
    version = version if version is not None else max(there, default=0)
    if version not in there:
        raise StoreError(
            f"{repository} has no version {version or ''} of model {name!r}; it has "
            f"{', '.join(map(str, there)) or 'none'}: publish it, or ask for one that is there"
        )
    folder = repository / name / str(version)
    manifest = _read_manifest(folder)
    try:
        _check_files(folder, manifest.files)
    except OSError as error:
        raise StoreError(
            f"cannot read {folder} ({error.strerror}); files that can be read were expected: "
            "see to their permissions and to the disk"
        ) from error
    return Published(name, version, folder, manifest.about)


def check_model_name(name: str) -> str:
    """The name itself, if it may be a folder's and stand in a topic.

    Raises:
        StoreError: another character than a-z, 0-9 and hyphen, or longer than 64.
    """
    if NAME.fullmatch(name) is None:
        raise StoreError(
            f"model {name[:80]!r} cannot be a model's name: use 1 to 64 lower-case letters, "
            "digits and hyphens, not beginning with a hyphen"
        )
    return name


def _folders(folder: Path) -> list[Path]:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return sorted(each for each in folder.iterdir() if each.is_dir())
    return []


def _copy_in(folder: Path, aside: Path, about: About) -> None:
    sources = sorted(
        each for each in folder.rglob("*") if each.is_file() and each != folder / MANIFEST
    )
    if not sources:
        raise StoreError(f"{folder} has no files; a model's files were expected: save it first")
    files = {}
    for source in sources:
        path = source.relative_to(folder)
        (aside / path).parent.mkdir(parents=True, exist_ok=True)
        files[path.as_posix()] = _copy(source, aside / path)
    manifest = msgspec.json.encode(Manifest(about=about, files=files))
    _write(aside / MANIFEST, msgspec.json.format(manifest))
    for each in aside.rglob("*"):
        if each.is_dir():
            _sync_folder(each)
    _sync_folder(aside)


def _copy(source: Path, target: Path) -> File:
    digest, size = hashlib.sha256(), 0
    with source.open("rb") as reader, target.open("wb") as writer:
        while block := reader.read(_BLOCK_BYTES):
            writer.write(block)
            digest.update(block)
            size += len(block)
        writer.flush()
        os.fsync(writer.fileno())
    return File(size_bytes=size, sha256=digest.hexdigest())


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _rename_in(aside: Path, home: Path) -> int:
    """Give the folder the first free number above all: another publisher may take one first."""
    aside.chmod(0o755)
    while True:
        taken = (int(each.name) for each in _folders(home) if _VERSION.fullmatch(each.name))
        version = max(taken, default=0) + 1
        try:
            aside.rename(home / str(version))
        except OSError as error:
            if error.errno not in {errno.EEXIST, errno.ENOTEMPTY}:
                raise
            continue
        _sync_folder(home)
        return version


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    try:
        with path.open("rb") as file:
            data = file.read(MAX_MANIFEST_BYTES)
        return msgspec.json.decode(data, type=Manifest)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise StoreError(
            f"{path} is no manifest ({error}); one written by publish was expected: "
            "publish the model again and remove this version"
        ) from error


def _check_files(folder: Path, files: dict[str, File]) -> None:
    there = {
        each.relative_to(folder).as_posix() for each in folder.rglob("*") if not each.is_dir()
    } - {MANIFEST}
    if there != set(files):
        names = ", ".join(sorted(there ^ set(files))[:3])
        raise _damaged(folder, f"{names} is in the manifest or in the folder, not in both")
    for path, expected in files.items():
        size = (folder / path).stat().st_size
        if size != expected.size_bytes:
            raise _damaged(folder, f"{path} has {size} bytes and not {expected.size_bytes}")
        with (folder / path).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != expected.sha256:
            raise _damaged(folder, f"{path} is not what its SHA-256 says")


def _damaged(folder: Path, what: str) -> StoreError:
    return StoreError(
        f"{folder} is damaged: {what}; what was published was expected: publish it again"
    )
