"""Local data, read from a folder or a function, and ways to part data among clients.

NumPy only: reading data does not load torch.
"""

import importlib
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from federation.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True, eq=False)
class LocalData:
    """Labelled samples: `x` float32 of shape (N, ...), `y` int64 of shape (N,), from 0."""

    x: NDArray[np.float32]
    y: NDArray[np.int64]

    @property
    def samples(self) -> int:
        """N, the number of samples."""
        return len(self.y)

    def take(self, indices: NDArray[np.int64]) -> "LocalData":
        """The samples at these indices, in their order."""
        return LocalData(self.x[indices], self.y[indices])


def as_local_data(x: Any, y: Any, origin: str) -> LocalData:
    """Arrays of any numeric dtype as `LocalData`, checked.

    Args:
        x: samples first; converted to float32.
        y: whole numbers from 0, one a sample.
        origin: where they come from, for messages.

    Raises:
        DataError: no numbers, lengths that differ, labels that are not whole numbers from
            0, or values that are not finite.
    """
    try:
        samples = np.ascontiguousarray(x, np.float32)
        given = np.ascontiguousarray(y)
        with np.errstate(invalid="ignore"):
            labels = given.astype(np.int64)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{origin} does not hold numbers ({error}): store numeric arrays") from None
    if samples.ndim < 2 or labels.ndim != 1 or len(samples) != len(labels):
        raise DataError(
            f"{origin} has x of shape {samples.shape} and y of shape {labels.shape}; "
            "expected (N, ...) and (N,): one label a sample"
        )
    if len(labels) and (labels.min() < 0 or not np.array_equal(labels, given)):
        raise DataError(f"{origin} has labels that are not whole numbers from 0: number them")
    if not np.isfinite(samples).all():
        row = int(np.argmin(np.isfinite(samples).reshape(len(samples), -1).all(axis=1)))
        raise DataError(
            f"{origin} has NaN or infinity in sample {row}; expected finite numbers: "
            "leave the sample out or fill the gap"
        )
    return LocalData(samples, labels)


def load_folder(path: Path | str) -> LocalData:
    """All samples in the `.npz` and `.csv` files of a folder, in the order of their names.

    An `.npz` holds arrays `x` (N, ...) and `y` (N,). A `.csv` holds numbers, the label in
    the last column; a first line of words is a heading.

    Raises:
        ConfigError: no such folder, or no such file in it.
        DataError: a file that cannot be read, or whose samples differ in shape from others'.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(f"no data folder {folder}: create it or correct the path")
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in _READERS and f.is_file())
    if not files:
        raise ConfigError(f"data folder {folder} has no .npz or .csv file: put the data there")
    parts = [(f, _READERS[f.suffix.lower()](f)) for f in files]
    first, sample = files[0], parts[0][1].x.shape[1:]
    for file, part in parts:
        if part.x.shape[1:] != sample:
            raise DataError(
                f"samples in {file} have shape {part.x.shape[1:]}; those in {first.name} have "
                f"{sample}: keep one kind of data in a folder"
            )
    if len(parts) == 1:
        return parts[0][1]
    return LocalData(
        np.concatenate([part.x for _, part in parts]), np.concatenate([part.y for _, part in parts])
    )


def load_entry(entry: str) -> LocalData:
    """What a function of the device's owner returns: `LocalData`, or a pair of x and y.

    Args:
        entry: `package.module:function`; it is called without arguments.

    Raises:
        ConfigError: no such module or function.
        DataError: the function fails, or returns something else.
    """
    load = _find_function(entry)
    try:
        result = load()
    except Exception as error:  # The owner's code may raise anything; none of it is a traceback.
        raise DataError(
            f"data entry {entry!r} failed: {type(error).__name__}: {error}: correct the function"
        ) from error
    if isinstance(result, LocalData):
        result = (result.x, result.y)
    if isinstance(result, tuple) and len(result) == 2:
        return as_local_data(*result, f"data entry {entry!r}")
    raise DataError(
        f"data entry {entry!r} returned {type(result).__name__}; "
        "expected LocalData or a pair of arrays (x, y)"
    )


def _find_function(entry: str) -> Callable[[], Any]:
    module_name, _, name = entry.partition(":")
    if not module_name or not name:
        raise ConfigError(f"data entry {entry!r}; expected package.module:function")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"data entry {entry!r} cannot be imported ({error}): install it, or put its folder "
            "on PYTHONPATH"
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        raise ConfigError(f"data entry {entry!r}: {module_name} has no function {name!r}")
    return found  # type: ignore[no-any-return]


def _read_npz(file: Path) -> LocalData:
    try:
        with file.open("rb") as content:
            arrays = np.load(content, allow_pickle=False)
            if not isinstance(arrays, np.lib.npyio.NpzFile):
                raise DataError(f"{file} holds one bare array: save it with x and y")
            if missing := {"x", "y"} - set(arrays.files):
                raise DataError(
                    f"{file} lacks array {min(missing)!r}; it has "
                    f"{', '.join(arrays.files) or 'none'}: save it with x and y"
                )
            x, y = arrays["x"], arrays["y"]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{file} is not a readable .npz ({error}): write it again") from error
    return as_local_data(x, y, str(file))


def _read_csv(file: Path) -> LocalData:
    try:
        with file.open(encoding="utf-8") as lines:
            heading = 0 if _is_numeric(lines.readline()) else 1
        table = np.loadtxt(file, np.float64, delimiter=",", skiprows=heading, ndmin=2)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{file} is not a readable .csv ({error}); expected numbers, the label last: "
            "correct that line"
        ) from error
    if table.shape[1] < 2:
        raise DataError(f"{file} has {table.shape[1]} columns; expected features and a label last")
    return as_local_data(table[:, :-1], table[:, -1], str(file))


def _is_numeric(line: str) -> bool:
    try:
        [float(cell) for cell in line.split(",")]
    except ValueError:
        return False
    return True


_READERS: dict[str, Callable[[Path], LocalData]] = {".npz": _read_npz, ".csv": _read_csv}


def iid_partition(samples: int, clients: int, rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """Parts of (nearly) equal size, drawn without regard to labels.

    Raises:
        ConfigError: more clients than samples.
    """
    if not 1 <= clients <= samples:
        raise ConfigError(f"{samples} samples for {clients} clients; expected one each or more")
    return [np.sort(part) for part in np.array_split(rng.permutation(samples), clients)]


def shard_partition(
    labels: NDArray[np.int64], clients: int, shards_each: int, rng: np.random.Generator
) -> list[NDArray[np.int64]]:
    """Parts of a few labels each: sorted by label, cut into shards, dealt out.

    The pathological non-IID split of FedAvg (arXiv:1602.05629, section 3).

    Raises:
        ConfigError: more shards than samples.
    """
    shards = clients * shards_each
    if not 1 <= shards <= len(labels):
        raise ConfigError(
            f"{len(labels)} samples for {clients} clients of {shards_each} shards; "
            "expected a sample a shard or more"
        )
    pieces = np.array_split(np.argsort(labels, kind="stable"), shards)
    dealt = rng.permutation(shards).reshape(clients, shards_each)
    return [np.sort(np.concatenate([pieces[s] for s in hand])) for hand in dealt]


def dirichlet_partition(
    labels: NDArray[np.int64],
    clients: int,
    alpha: float,
    rng: np.random.Generator,
    min_size: int = 1,
) -> list[NDArray[np.int64]]:
    """Parts whose label shares are Dirichlet(alpha): skewed when alpha is small.

    Each class is divided by shares of its own draw (arXiv:1905.12022). Departs from the
    paper: parts that come out below `min_size` are filled from the largest.

    Raises:
        ConfigError: alpha is not positive, or there are too few samples.
    """
    if clients < 1 or alpha <= 0 or clients * min_size > len(labels):
        raise ConfigError(
            f"Dirichlet({alpha}) over {clients} clients of at least {min_size} from "
            f"{len(labels)} samples; expected a positive alpha and enough samples"
        )
    parts: list[list[NDArray[np.int64]]] = [[] for _ in range(clients)]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(clients, alpha))
        cuts = np.round(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
        for part, piece in zip(parts, np.split(members, cuts), strict=True):
            part.append(piece)
    return [np.sort(part) for part in _fill([np.concatenate(p) for p in parts], min_size, rng)]


def _fill(
    parts: list[NDArray[np.int64]], min_size: int, rng: np.random.Generator
) -> list[NDArray[np.int64]]:
    for i in range(len(parts)):
        while len(parts[i]) < min_size:
            donor = max(range(len(parts)), key=lambda k: len(parts[k]))
            moved = min(min_size - len(parts[i]), len(parts[donor]) - min_size)
            given = rng.permutation(parts[donor])
            parts[donor], parts[i] = given[moved:], np.concatenate([parts[i], given[:moved]])
    return parts
