"""What a device remembers over SIGKILL and power loss: a folder with one file per thing.

```
lock                       held while an agent uses the folder
epoch                      the number of the last connection
assignment                 the assignment in hand
checkpoints/<name>         how far its training is; written by the trainer
contents/<digest>.part     what is being fetched, with <digest>.index: see `edge_agent.partial`
updates/<name>             finished updates that the hub has not answered for
memory                     the last update that counted and left something for the next
peer                       how far this device is as a peer, without a hub
start                      what it would go on from as a peer
wish                       what the hub desires of this device
release                    the released model in use, and its bytes in models/<digest>.onnx
```

A `<name>` is a hash of the attempt: what a hub says never becomes a path. Every file carries
a checksum; a damaged one is renamed to `.corrupt` and what it held is as if it had never been.
"""

import fcntl
import os
import re
import time
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

import msgspec

from edge_agent import partial
from edge_agent.durable import (
    TEMPORARY,
    peek_sealed,
    read_sealed,
    remove,
    rename,
    set_aside,
    sync_folder,
    write_sealed,
    write_whole,
)
from edge_agent.facts import (
    AgentFact,
    AssignmentForgotten,
    AssignmentKept,
    ChunkKept,
    ContentForgotten,
    Held,
    ReleaseKept,
    UpdateForgotten,
    UpdateKept,
    WishKept,
)
from edge_agent.peering_facts import PeerForgotten, PeerKept, StartKept
from federation.errors import ConfigError, TransferError
from federation.protocol.messages import Assignment, Content, Release
from federation.protocol.transfer import check_content

Record = TypeVar("Record")

_OUR_NAME = re.compile(r"(?:[0-9a-f]{32}|[0-9a-f]{64})(?:\.[a-z.]+)?")


class Journal:
    """The memory of one agent, in a folder of its own.

    After a `StoreError` the folder holds the state before the fact that could not be written.
    """

    def __init__(self, folder: Path) -> None:
        """Take the folder for this process, and make it if it is not there.

        Raises:
            ConfigError: another agent uses the folder, or it cannot be used at all.
        """
        self._folder = folder
        self._contents = folder / "contents"
        self._updates = folder / "updates"
        self._models = folder / "models"
        self._checkpoints = folder / "checkpoints"
        self._partials: dict[str, partial.Partial] = {}
        self._release: Release | None = None
        try:
            for each in (self._contents, self._updates, self._models, self._checkpoints):
                each.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = _lock(folder / "lock")
            for leftover in self._leftovers():
                leftover.unlink(missing_ok=True)
            sync_folder(folder)
            sync_folder(folder.parent)
        except OSError as error:
            raise ConfigError(
                f"data folder {folder} cannot be used: {error.strerror}; "
                "name a folder that the agent may write to"
            ) from error

    def close(self) -> None:
        """Let go of the folder."""
        for each in self._partials.values():
            each.close()
        self._partials.clear()
        os.close(self._lock)

    def next_epoch(self) -> int:
        """A number larger than any given before, on disk before it is returned.

        Where nothing is remembered it begins at the wall clock's milliseconds, so that a device
        that lost its storage does not fall behind what the hub last heard from it: connections
        count slower than that.

        Raises:
            StoreError: the disk is full, read-only or broken.
        """
        path = self._folder / "epoch"
        last = _read(path, int)
        epoch = last + 1 if last is not None else max(time.time_ns() // 10**6, 1)
        write_sealed(path, msgspec.msgpack.encode(epoch))
        return epoch

    def checkpoint_path(self, attempt: str) -> Path:
        """Where the trainer keeps how far this attempt is."""
        return self._checkpoints / _name(attempt)

    def release_path(self) -> Path | None:
        """The ONNX file of the release in use; None while there is none."""
        return self._model_path(self._release.content) if self._release is not None else None

    def record(self, fact: AgentFact) -> None:
        """Write a fact down; when this returns it is on the disk.

        A `ChunkKept` survives SIGKILL at once, and power loss within `partial.SYNC_BYTES`.

        Raises:
            StoreError: the disk is full, read-only or broken.
            TransferError: a content whose digest is none.
        """
        match fact:
            case AssignmentKept(assignment):
                write_sealed(self._folder / "assignment", msgspec.msgpack.encode(assignment))
            case AssignmentForgotten(attempt):
                self._forget_assignment(attempt)
            case ChunkKept(content, index, data):
                self._partial(content).write(index, data)
            case ContentForgotten(digest):
                self._forget_content(digest)
            case UpdateKept(attempt):
                write_sealed(self._updates / _name(attempt), msgspec.msgpack.encode(fact))
            case UpdateForgotten(attempt, counted):
                self._forget_update(self._updates / _name(attempt), counted=counted)
            case ReleaseKept(release, data):
                self._keep_release(release, data)
            case WishKept():
                write_sealed(self._folder / "wish", msgspec.msgpack.encode(fact))
            case PeerKept() | PeerForgotten() | StartKept():
                self._record_peer(fact)

    def restore(self) -> Held:
        """What the recorded facts add up to; also clears away what no fact holds any more.

        Raises:
            StoreError: the disk cannot be read or written.
        """
        held = Held(
            assignment=_read(self._folder / "assignment", Assignment),
            wish=_read(self._folder / "wish", WishKept),
            peer=_read(self._folder / "peer", PeerKept),
            start=_read(self._folder / "start", StartKept),
        )
        for path in _ours(self._updates):
            update = _read(path, UpdateKept) if path.suffix != ".corrupt" else None
            if update is not None:
                held.updates[update.attempt] = update
        counted = _read(self._folder / "memory", UpdateKept)
        held.memory = counted.memory if counted is not None else None
        for path in self._indices(held.assignment):
            parts = partial.read_parts(path)
            if parts:
                held.parts[path.stem] = parts
        self._release = held.release = self._read_release()
        self._clear_away(held)
        return held

    # Memory, assignment, contents, release --------------------------------------------------

    def _record_peer(self, fact: PeerKept | PeerForgotten | StartKept) -> None:
        match fact:
            case PeerKept():
                write_sealed(self._folder / "peer", msgspec.msgpack.encode(fact))
            case PeerForgotten():
                remove(self._folder / "peer")
            case StartKept():
                write_sealed(self._folder / "start", msgspec.msgpack.encode(fact))

    def _forget_update(self, path: Path, *, counted: bool) -> None:
        update = _read(path, UpdateKept) if counted else None
        if update is None or update.memory is None:
            remove(path)
            return
        # One step for both: the file of the update that counted becomes that of the memory.
        rename(path, self._folder / "memory")

    def _forget_assignment(self, attempt: str) -> None:
        path = self._folder / "assignment"
        in_hand = _read(path, Assignment)
        if in_hand is not None and in_hand.attempt == attempt:
            remove(path)
        remove(self.checkpoint_path(attempt))

    def _partial(self, content: Content) -> partial.Partial:
        known = self._partials.get(content.digest)
        if known is not None and known.content == content:
            return known
        if known is not None:
            known.close()
        self._partials[content.digest] = opened = partial.Partial(self._contents, content)
        return opened

    def _forget_content(self, digest: str) -> None:
        check_content(Content(digest=digest, size=0, chunk_bytes=1))
        known = self._partials.pop(digest, None)
        if known is not None:
            known.close()
        partial.forget(self._contents, digest)

    def _indices(self, assignment: Assignment | None) -> list[Path]:
        """The contents worth keeping, two at most: the assignment's base, and the newest others.

        Without an assignment these are the last one's base and the release under way, if any.
        """
        indices = [path for path in _ours(self._contents) if path.suffix == ".index"]
        indices.sort(key=lambda path: path.stat().st_mtime_ns)
        base = assignment.base.digest if assignment is not None else ""
        others = [path for path in indices if path.stem != base]
        kept = others[-2:] if assignment is None else others[-1:]
        return [path for path in indices if path.stem == base] + kept

    def _model_path(self, content: Content) -> Path:
        return _model_path(self._folder, content)

    def _keep_release(self, release: Release, data: bytes) -> None:
        # The bytes first: the record never names a model that is not there.
        write_whole(self._model_path(release.content), data)
        write_sealed(self._folder / "release", msgspec.msgpack.encode(release))
        self._release = release
        self._clear_models()

    def _read_release(self) -> Release | None:
        release = _read(self._folder / "release", Release)
        if release is None:
            return None
        try:
            path = self._model_path(release.content)
            data = path.read_bytes()
        except (OSError, TransferError):
            return None
        if sha256(data).hexdigest() != release.content.digest:
            set_aside(path, "it is not what its digest says")
            return None
        return release

    def _clear_models(self) -> None:
        current = self.release_path()
        for path in _ours(self._models):
            if path.suffix == ".onnx" and path != current:
                remove(path)

    def _leftovers(self) -> list[Path]:
        """The writes that were cut short."""
        names = ("assignment", "epoch", "memory", "peer", "release", "start", "wish")
        top = [self._folder / f"{name}{TEMPORARY}" for name in names]
        folders = (self._contents, self._updates, self._models, self._checkpoints)
        below = [path for folder in folders for path in _ours(folder)]
        return top + [path for path in below if path.suffix == TEMPORARY]

    def _clear_away(self, held: Held) -> None:
        self._clear_models()
        for path in _ours(self._contents):
            if path.suffix != ".corrupt" and path.stem not in held.parts:
                remove(path)
        in_hand = held.assignment.attempt if held.assignment is not None else ""
        for path in _ours(self._checkpoints):
            if path != self.checkpoint_path(in_hand):
                remove(path)


def find_release(folder: Path) -> tuple[Release, Path] | None:
    """The release in use in an agent's folder and its ONNX file; None while there is none.

    It only looks, so an agent may be at work in the folder at the same time. A damaged record
    counts as none.

    Raises:
        StoreError: the folder cannot be read.
    """
    try:
        release = msgspec.msgpack.decode(peek_sealed(folder / "release") or b"", type=Release)
        return release, _model_path(folder, release.content)
    except (msgspec.DecodeError, TransferError):
        return None


def _model_path(folder: Path, content: Content) -> Path:
    return folder / "models" / f"{check_content(content).digest}.onnx"


def _read(path: Path, kind: type[Record]) -> Record | None:
    payload = read_sealed(path)
    if payload is None:
        return None
    try:
        return msgspec.msgpack.decode(payload, type=kind)
    except msgspec.DecodeError as error:
        set_aside(path, str(error))  # Whole, but of another version of this program.
        return None


def _ours(folder: Path) -> list[Path]:
    """The files in a folder that bear names we give: its owner may keep others there."""
    return sorted(path for path in folder.iterdir() if _OUR_NAME.fullmatch(path.name))


def _name(attempt: str) -> str:
    return sha256(attempt.encode()).hexdigest()[:32]


def _lock(path: Path) -> int:
    # A record lock, not flock: a forked trainer that outlives the agent must not hold it.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        owner = os.pread(descriptor, 20, 0).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise ConfigError(
            f"data folder {path.parent} is in use by process {owner}; "
            "give each agent a folder of its own"
        ) from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor
