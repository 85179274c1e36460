"""Model files by what they are: named by the SHA-256 of their bytes, never changed.

```
<folder>/models/<digest>           one file a model, weights or ONNX
<folder>/models/<digest>.damaged   a file whose bytes are no longer what its name says
<folder>/runs/<run>.json           one manifest a run: which round gave which model
```
"""

import hashlib
import os
import re
import tempfile
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path

import msgspec

from federation.errors import StoreError

_DIGEST = re.compile(r"[0-9a-f]{64}")


class ManifestEntry(msgspec.Struct, frozen=True, kw_only=True):
    """What one round gave: the model, and its ONNX file where there is one.

    Round 0 is the initial model. `at` is in seconds of the hub's clock; digests are SHA-256 in
    lower-case hexadecimal, empty where there is no such file.
    """

    round: int
    weights: str = ""
    weights_bytes: int = 0
    onnx: str = ""
    onnx_bytes: int = 0
    at: float = 0.0


class Registry:
    """The model files below one folder. Safe for several readers and one writer at a time."""

    def __init__(self, folder: Path) -> None:
        self._models = folder / "models"
        self._runs = folder / "runs"
        for sub in (self._models, self._runs):
            try:
                sub.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise _failed("create", sub, error) from error

    def put(self, data: bytes) -> str:
        """Keep these bytes, through a power cut too; their digest. Again is no second file.

        Raises:
            StoreError: the folder cannot be written to, or the disk is full.
        """
        digest = hashlib.sha256(data).hexdigest()
        path = self._models / digest
        try:
            if not (path.is_file() and path.read_bytes() == data):
                _write_whole(path, data)
        except OSError as error:
            raise _failed("write", path, error) from error
        return digest

    def has(self, digest: str) -> bool:
        """Whether there is a file of this digest; `read` tells whether it is whole."""
        return _DIGEST.fullmatch(digest) is not None and (self._models / digest).is_file()

    def read(self, digest: str) -> bytes:
        """The bytes of this digest, checked.

        Raises:
            StoreError: there is none; or it is damaged, in which case it is set aside so that
                the same model can be put again.
        """
        if _DIGEST.fullmatch(digest) is None:
            raise StoreError(f"{digest[:80]!r} is no digest; one has 64 hexadecimal digits")
        path = self._models / digest
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise StoreError(
                f"no model {digest} in {self._models}; put the file back from a copy of the folder"
            ) from error
        except OSError as error:
            raise _failed("read", path, error) from error
        if hashlib.sha256(data).hexdigest() != digest:
            raise StoreError(self._set_aside(path))
        return data

    def manifest(self, run: str) -> list[ManifestEntry]:
        """What the rounds of a run gave, in order; empty where nothing is written yet.

        Raises:
            StoreError: the manifest cannot be read.
        """
        path = self._runs / f"{run}.json"
        try:
            return msgspec.json.decode(path.read_bytes(), type=list[ManifestEntry])
        except FileNotFoundError:
            return []
        except OSError as error:
            raise _failed("read", path, error) from error
        except msgspec.DecodeError as error:
            raise StoreError(
                f"{path} is no manifest ({error}); delete it: the hub writes it again from its "
                "database"
            ) from error

    def write_manifest(self, run: str, entries: Sequence[ManifestEntry]) -> None:
        """Say anew what the rounds of a run gave, in place of what was said before.

        Raises:
            StoreError: the folder cannot be written to, or the disk is full.
        """
        path = self._runs / f"{run}.json"
        text = msgspec.json.format(msgspec.json.encode(list(entries)), indent=1)
        try:
            _write_whole(path, text + b"\n")
        except OSError as error:
            raise _failed("write", path, error) from error

    def prune(self, keep: AbstractSet[str]) -> list[str]:
        """Remove model files that are not in `keep`, and what broken-off writing left behind.

        Damaged files that were set aside stay. Only for when nobody writes: a file is there
        before the database refers to it. The names of what was removed come back.
        """
        removed = []
        for path in sorted(self._models.iterdir()):
            is_model = _DIGEST.fullmatch(path.name) is not None
            if (is_model and path.name not in keep) or path.suffix == ".part":
                path.unlink(missing_ok=True)
                removed.append(path.name)
        return removed

    def _set_aside(self, path: Path) -> str:
        aside = path.with_name(f"{path.name}.damaged")
        try:
            path.replace(aside)
        except OSError as error:
            raise _failed("set aside the damaged", path, error) from error
        return (
            f"model {path.name} is damaged: its bytes have another digest; it was set aside as "
            f"{aside}: put the file back from a copy of the folder"
        )


def _failed(doing: str, path: Path, error: OSError) -> StoreError:
    return StoreError(
        f"cannot {doing} {path}: {error.strerror}; "
        "check that the folder may be written to and the disk has room"
    )


def _write_whole(path: Path, data: bytes) -> None:
    """Write a file so that, whatever happens, its name stands for all of it or the old one."""
    handle, name = tempfile.mkstemp(prefix=".", suffix=".part", dir=path.parent)
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
