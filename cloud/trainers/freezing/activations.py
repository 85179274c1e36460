"""What the frozen modules say of each sample, kept on disk: they need not say it again."""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

AHEAD = 5
"""So many batches are in memory at most: those that were prefetched and not yet asked for."""


class Activations:
    """The activations at one cut, by sample: a memory-mapped file that is filled as it is used.

    Egeria (arXiv:2201.06227), section 4.4. What is read has the bits of what was written. The
    file goes when the cache is closed: it is right for one cut, while nothing before it changes.

    Ranks of one machine that are given one path fill one file and read what others wrote: which
    samples a rank sees is new in every epoch.

    Args:
        path: the file; beside it lies another that says which samples are known.
        samples: how many samples there are; a sample's place is its name.
        size_bytes: the file is never larger; where that is too little, nothing is kept.
    """

    def __init__(self, path: Path, samples: int, size_bytes: int) -> None:
        self._path, self._samples, self._size_bytes = path, samples, size_bytes
        self._flags = path.with_suffix(".known")
        self._known: Tensor | None = None
        self._rows: Tensor | None = None
        self._is_too_large = False
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="activations")
        self._ahead: dict[bytes, Future[Tensor]] = {}
        self.read, self.written = 0, 0

    def put(self, places: NDArray[np.int64], activations: Tensor) -> None:
        """Keep what was computed for the samples at these places, if there is room."""
        rows = self._file(activations)
        if rows is not None:
            rows[torch.from_numpy(places)] = activations.detach().cpu()
            if self._known is not None:
                self._known[torch.from_numpy(places)] = 1
            self.written += len(places)

    def prefetch(self, places: NDArray[np.int64]) -> None:
        """Have these read by the time they are asked for, if they are known."""
        key = places.tobytes()
        if len(self._ahead) < AHEAD and key not in self._ahead and self._knows(places):
            self._ahead[key] = self._reader.submit(self._gather, places)

    def take(self, places: NDArray[np.int64]) -> Tensor | None:
        """The activations of these samples, on the CPU; None unless all are known."""
        coming = self._ahead.pop(places.tobytes(), None)
        if coming is None and not self._knows(places):
            return None
        self.read += len(places)
        return coming.result() if coming is not None else self._gather(places)

    def close(self) -> None:
        """Forget all, and free the disk."""
        self._reader.shutdown(cancel_futures=True)
        self._ahead.clear()
        self._rows = self._known = None
        self._path.unlink(missing_ok=True)
        self._flags.unlink(missing_ok=True)

    def _knows(self, places: NDArray[np.int64]) -> bool:
        return self._known is not None and bool(self._known[torch.from_numpy(places)].all())

    def _gather(self, places: NDArray[np.int64]) -> Tensor:
        rows = self._rows
        if rows is None:
            raise RuntimeError("activations are gathered before any are known")
        return rows[torch.from_numpy(places)]

    def _file(self, activations: Tensor) -> Tensor | None:
        if self._rows is None and not self._is_too_large:
            entries = self._samples * activations[0].numel()
            size_bytes = entries * activations.element_size()
            if size_bytes > self._size_bytes or not self._has_room(size_bytes):
                self._is_too_large = True
                return None
            kind, shape = activations.dtype, (self._samples, *activations.shape[1:])
            rows = torch.from_file(str(self._path), shared=True, size=entries, dtype=kind)
            self._rows = rows.view(shape)
            self._known = torch.from_file(
                str(self._flags), shared=True, size=self._samples, dtype=torch.uint8
            )
        return self._rows

    def _has_room(self, size_bytes: int) -> bool:
        """Take the disk's room now: a mapped file that finds none later ends the process."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            for path, size in ((self._path, size_bytes), (self._flags, self._samples)):
                with path.open("ab") as file:
                    os.posix_fallocate(file.fileno(), 0, size)
        except OSError:
            self._path.unlink(missing_ok=True)
            return False
        return True
