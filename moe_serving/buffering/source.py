"""Where the bytes of an expert come from: a range of a file, or pinned memory of the host."""

import os
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from federation.errors import StoreError
from moe_serving.buffering.trace import Shape
from moe_serving.checkpoint import ExpertRanges
from moe_serving.layers.experts import ExpertShape


@dataclass(slots=True, eq=False)
class Buffer:
    """Memory for the raw bytes of one expert, used over and over.

    `last_use` is where the device's own queue was when the buffer was given back: whoever fills
    it again waits for that. Processors have no such queue.
    """

    bytes_B: Tensor
    last_use: torch.cuda.Event | None = None

    def release(self) -> None:
        """Notes that all work on the buffer has been handed to its device."""
        if self.bytes_B.is_cuda:
            self.last_use = torch.cuda.current_stream(self.bytes_B.device).record_event()


class Source(Protocol):
    """Brings experts one by one, by key (`Shape.key`), from a thread of its own."""

    shape: Shape
    expert: ExpertShape
    dtype: torch.dtype
    size_bytes: int
    device: torch.device

    def read(self, key: int, buffer: Buffer) -> None:
        """Fills the buffer; returns when the bytes are there.

        Raises:
            StoreError: They cannot be had.
        """

    def close(self) -> None:
        """Lets go of what it holds; `read` may not be called after."""


class FileSource:
    """Positional reads from a checkpoint: one expert is one range, so one read.

    The operating system's page cache is a second tier behind the residents, for free; nothing
    is mapped, so nothing counts as this process's memory but the buffers.
    """

    device = torch.device("cpu")

    def __init__(self, ranges: ExpertRanges):
        layers = len(ranges.offsets)
        self.shape = Shape(layers, len(ranges.offsets[0]) if layers else 0)
        self.expert = ranges.shape
        self.dtype = ranges.dtype
        self.size_bytes = ranges.size_bytes
        self._path = ranges.path
        self._offset_K = [offset for layer in ranges.offsets for offset in layer]
        self._checked: set[int] = set()
        try:
            self._descriptor: int | None = os.open(ranges.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise StoreError(f"{ranges.path} cannot be opened: {error.strerror}") from error

    def read(self, key: int, buffer: Buffer) -> None:
        """Reads the expert's range; the first time, its numbers must be finite."""
        if self._descriptor is None:
            raise StoreError(f"{self._path} was closed; open a store again")
        view = buffer.bytes_B.numpy().data
        done = 0
        while done < self.size_bytes:
            try:
                count = os.preadv(self._descriptor, [view[done:]], self._offset_K[key] + done)
            except OSError as error:
                raise StoreError(f"{self._path} cannot be read: {error.strerror}") from error
            if count == 0:
                raise StoreError(
                    f"{self._path} ends inside expert {self._name(key)}: it was truncated while "
                    "in use; put the version's file back, and serve it again"
                )
            done += count
        if key not in self._checked:
            self._check(key, buffer)

    def close(self) -> None:
        """Closes the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _check(self, key: int, buffer: Buffer) -> None:
        if not bool(torch.isfinite(buffer.bytes_B.view(self.dtype)).all()):
            raise StoreError(
                f"expert {self._name(key)} of {self._path} holds NaN or infinity; "
                "the model was saved from a failed training"
            )
        self._checked.add(key)

    def _name(self, key: int) -> str:
        layer, expert = divmod(key, self.shape.experts)
        return f"{expert} of layer {layer}"


class HostSource:
    """All experts in the host's memory, pinned if they are to go to a GPU, copied on demand.

    Copies to a GPU have a stream of their own, so they overlap the products of other experts.

    Args:
        ranges: The checkpoint, read once, whole.
        device: Where the buffers are.
    """

    def __init__(self, ranges: ExpertRanges, device: torch.device):
        files = FileSource(ranges)
        self.shape, self.expert, self.dtype = files.shape, files.expert, files.dtype
        self.size_bytes, self.device = files.size_bytes, device
        is_cuda = device.type == "cuda"
        keys = self.shape.layers * self.shape.experts
        self._host_KB = torch.empty(
            keys, self.size_bytes, dtype=torch.uint8, pin_memory=is_cuda, device="cpu"
        )
        try:
            for key in range(keys):
                files.read(key, Buffer(self._host_KB[key]))
        finally:
            files.close()
        self._stream = torch.cuda.Stream(device) if is_cuda else None  # type: ignore[no-untyped-call]

    def read(self, key: int, buffer: Buffer) -> None:
        """Copies the expert; on a GPU after all earlier work on the buffer is done."""
        if self._stream is None:
            buffer.bytes_B.copy_(self._host_KB[key])
            return
        with torch.cuda.stream(self._stream):
            if buffer.last_use is not None:
                self._stream.wait_event(buffer.last_use)
            buffer.bytes_B.copy_(self._host_KB[key], non_blocking=True)
        self._stream.synchronize()

    def close(self) -> None:
        """Lets go of the host's copy."""
        self._host_KB = torch.empty(0, self.size_bytes, dtype=torch.uint8)
