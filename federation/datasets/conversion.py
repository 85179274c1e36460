"""From a package's members to plain arrays: one function a kind of data set.

Each gives what the cache keeps: `x` and `y`, and where the set has them `client` (whose sample it
is), `part` (which arm or session of that person) and `train_count` (the samples after it are the
test set). Images stay uint8 here; loading scales them.
"""

import gzip
import io
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from federation.datasets.archives import read_idx, read_object_npy, unpickle_arrays
from federation.errors import DataError

Arrays = dict[str, npt.NDArray[Any]]
Members = Mapping[str, bytes]

_WATCH_WINDOW, _WATCH_HOP = 100, 50
_HAPT_WINDOW, _HAPT_HOP, _HAPT_CLASSES = 128, 64, 6
_HAPT_AXES = ("acc-x", "acc-y", "acc-z", "gyro-x", "gyro-y", "gyro-z")


def windows(series: npt.NDArray[Any], length: int, hop: int) -> npt.NDArray[np.float32]:
    """Cuts a series of shape (samples, axes) into windows (count, length, axes) every `hop`.

    A series shorter than a window gives none; what is left at the end is dropped.
    """
    if len(series) < length:
        return np.empty((0, length, series.shape[1]), np.float32)
    views = np.lib.stride_tricks.sliding_window_view(series, length, axis=0)[::hop]
    return np.ascontiguousarray(views.swapaxes(1, 2), np.float32)


def convert_watch(members: Members) -> Arrays:
    """Shoulder exercises from seglearn: one recording per person, arm and exercise."""
    (content,) = members.values()
    recordings = read_object_npy(content)
    cut = [windows(series, _WATCH_WINDOW, _WATCH_HOP) for series in recordings["X"]]
    counts = [len(part) for part in cut]
    return {
        "x": np.concatenate(cut),
        "y": np.repeat(recordings["y"].astype(np.int64), counts),
        "client": np.repeat(recordings["subject"].astype(np.int64) - 1, counts),
        "part": np.repeat(recordings["side"].astype(np.int64), counts),
    }


def convert_hapt(members: Members) -> Arrays:
    """The six activities of HAPT; a window never crosses from one activity to the next."""
    (content,) = members.values()
    people = unpickle_arrays(io.BytesIO(gzip.decompress(content)))
    cut, labels, clients, parts = [], [], [], []
    for person, sessions in people.items():
        for session, frame in enumerate(sessions):
            columns = _columns_of(frame)
            series = np.stack([columns[axis] for axis in _HAPT_AXES], axis=1)
            for label, stretch in _stretches(columns["label"]):
                if 1 <= label <= _HAPT_CLASSES:
                    found = windows(series[stretch], _HAPT_WINDOW, _HAPT_HOP)
                    cut.append(found)
                    labels += [label - 1] * len(found)
                    clients += [person - 1] * len(found)
                    parts += [session] * len(found)
    return {
        "x": np.concatenate(cut),
        "y": np.array(labels, np.int64),
        "client": np.array(clients, np.int64),
        "part": np.array(parts, np.int64),
    }


def _columns_of(frame: Any) -> dict[str, npt.NDArray[Any]]:
    """Takes the columns out of a data frame as the pickle of pandas 1 describes it."""
    try:
        _, blocks, names, _ = frame.state["_data"].state
        return {
            name: column
            for block, index in zip(blocks, names, strict=True)
            for name, column in zip(index.arguments[0]["data"], block, strict=True)
        }
    except (AttributeError, KeyError, TypeError, ValueError) as cause:
        raise DataError(
            f"the sessions are laid out differently ({cause}); data frames as pandas 1 pickled "
            "them were expected; fetch the pinned version"
        ) from cause


def _stretches(label: npt.NDArray[Any]) -> Iterator[tuple[int, slice]]:
    """Gives each run of equal labels with its place."""
    edges = np.flatnonzero(np.diff(label)) + 1
    for start, stop in zip([0, *edges], [*edges, len(label)], strict=True):
        yield int(label[start]), slice(int(start), int(stop))


def convert_idx(members: Members) -> Arrays:
    """MNIST and Fashion-MNIST; the members are train images, labels, test images, labels."""
    train_x, train_y, test_x, test_y = (read_idx(content) for content in members.values())
    return _images(train_x[:, None], train_y, test_x[:, None], test_y)


def convert_cifar10(members: Members) -> Arrays:
    """CIFAR-10 as pictures of 10,000 rows, an image a row, and JSON lists of labels.

    The members are five training pictures, their labels, the test picture and its labels.
    """
    *pictures, train_labels, test_picture, test_labels = members.values()
    return _images(
        np.concatenate([_rows_as_images(picture) for picture in pictures]),
        np.array(json.loads(train_labels)),
        _rows_as_images(test_picture),
        np.array(json.loads(test_labels)),
    )


def _rows_as_images(picture: bytes) -> npt.NDArray[np.uint8]:
    from PIL import Image

    with Image.open(io.BytesIO(picture)) as opened:
        pixels = np.asarray(opened.convert("RGB"))
    return pixels.reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2)


def _images(
    train_x: npt.NDArray[np.uint8],
    train_y: npt.NDArray[Any],
    test_x: npt.NDArray[np.uint8],
    test_y: npt.NDArray[Any],
) -> Arrays:
    return {
        "x": np.concatenate([train_x, test_x]),
        "y": np.concatenate([train_y, test_y]).astype(np.int64),
        "train_count": np.array(len(train_x), np.int64),
    }
