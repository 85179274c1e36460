"""The trainer: what turns an assignment and a base into an encoded update.

`fulfil` is that; `federation.learning.fulfilment` does it for many at once.
`python -m edge_agent.trainer` is the child process in which a device calls `fulfil`, so that
torch's memory goes when the child goes.
"""

import hashlib
import logging
import os
import queue
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO

import msgspec
import numpy as np

from edge_agent.durable import read_sealed, remove, write_sealed
from edge_agent.frames import (
    DataSource,
    Finished,
    Job,
    MixFinished,
    MixJob,
    News,
    Stepped,
    Stop,
    read_order,
    write_frame,
)
from edge_agent.peering_trainer import carry_out
from federation.errors import CodecError, HeadwaterError, StoreError
from federation.learning.checkpoint import Checkpoint
from federation.learning.data import LocalData, load_entry, load_folder
from federation.learning.fulfilment import answer, training_part
from federation.learning.mirroring import mirrored
from federation.learning.training import (
    UNWATCHED,
    StoppedError,
    Supervision,
    train_locally,
)
from federation.protocol.codec import decode, digest_of
from federation.protocol.effects import Mixed, Trained
from federation.protocol.messages import Assignment
from federation.protocol.mirror import MIRROR

_log = logging.getLogger(__name__)

PROGRESS_EVERY_S = 0.2
"""The child tells of progress at most this often, and of the last step always."""


@dataclass(frozen=True, slots=True)
class CheckpointFile:
    """Where a training keeps its checkpoint, and how often at most it writes it."""

    path: Path
    every_s: float = 5.0

    def write(self, identity: str, checkpoint: Checkpoint) -> None:
        """Replace the file, so that after a power cut it is the old one or the new one.

        Raises:
            StoreError: the disk is full, read-only or broken; the old file stands.
        """
        write_sealed(self.path, f"{identity}\n".encode() + checkpoint.to_bytes())

    def read(self, identity: str) -> Checkpoint | None:
        """The checkpoint of this training; None where there is none, whole and its own.

        Raises:
            StoreError: the disk cannot be read.
        """
        payload = read_sealed(self.path) or b""
        owner, _, content = payload.partition(b"\n")
        if owner != identity.encode():
            return None
        try:
            return Checkpoint.from_bytes(content)
        except CodecError:
            return None

    def forget(self) -> None:
        """Remove the file, and what a write that was cut short left behind.

        Raises:
            StoreError: it cannot be removed.
        """
        for file in sorted(self.path.parent.glob(f"{self.path.name}*")):
            remove(file)


def fulfil(
    assignment: Assignment,
    base: bytes,
    data: LocalData,
    memory: bytes = b"",
    *,
    supervision: Supervision = UNWATCHED,
    checkpoint: CheckpointFile | None = None,
) -> Trained:
    """The encoded update an assignment asks for, or why there is none.

    Args:
        assignment: what to do; its `base` and `inline` are not looked at.
        base: the encoded base model.
        data: the local samples.
        memory: what the last training of the same run left here (empty: nothing).
        supervision: who is told of progress, and may stop the training: it is then forgotten.
        checkpoint: where to keep a checkpoint, and to resume from one. The bits of the
            update do not depend on it.
    """
    identity = _identity(assignment, base, data, memory) if checkpoint else ""
    if checkpoint is not None:
        save = partial(checkpoint.write, identity)
        supervision = replace(supervision, save=save, save_every_s=checkpoint.every_s)
    try:
        resume = checkpoint.read(identity) if checkpoint else None
        trained = _train(assignment, base, data, memory, supervision, resume)
    except StoppedError as error:
        trained = Trained(assignment.attempt, failure=f"stopped: {error}")
    except HeadwaterError as error:
        trained = Trained(assignment.attempt, failure=str(error))
    if checkpoint is not None:
        # What stays behind for want of a working disk is told by its identity.
        with suppress(StoreError):
            checkpoint.forget()
    return trained


def _train(
    assignment: Assignment,
    base: bytes,
    data: LocalData,
    memory: bytes,
    supervision: Supervision,
    resume: Checkpoint | None,
) -> Trained:
    if assignment.plan.method == MIRROR:
        return mirrored(assignment.attempt, data)
    plan, weights = assignment.plan, decode(base)
    kept = decode(memory) if memory else {}
    samples = training_part(data, plan)
    result = train_locally(
        weights, samples, plan, memory=kept, supervision=supervision, resume=resume
    )
    return answer(assignment, weights, kept, result)


def _identity(assignment: Assignment, base: bytes, data: LocalData, memory: bytes) -> str:
    """Names a training by all that decides its bits, so that no other one resumes it."""
    plan = msgspec.json.encode(assignment.plan, order="sorted")
    names = f"{assignment.attempt} {digest_of(base)} {digest_of(memory)} {data.x.shape}\n"
    digest = hashlib.sha256(names.encode())
    digest.update(plan)
    digest.update(np.ascontiguousarray(data.x).data)
    digest.update(np.ascontiguousarray(data.y).data)
    return digest.hexdigest()


class _Data:
    """The local data, read once and again when its files have changed."""

    def __init__(self) -> None:
        self._stamp: object = None
        self._data: LocalData | None = None

    def load(self, source: DataSource) -> LocalData:
        stamp = (source, _files_stamp(source.folder))
        if self._data is None or stamp != self._stamp:
            self._data = load_entry(source.entry) if source.entry else load_folder(source.folder)
            self._stamp = stamp
        return self._data


def _files_stamp(folder: str) -> list[tuple[str, int, int]]:
    if not folder or not Path(folder).is_dir():
        return []
    found = [(f.name, f.stat()) for f in Path(folder).iterdir()]
    return sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in found)


class _Orders:
    """Reads the agent's orders on a thread, and ends the process when the agent is gone."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe = pipe
        self._stopped: set[str] = set()
        self.jobs: queue.SimpleQueue[Job | MixJob] = queue.SimpleQueue()

    def read(self) -> None:
        """Read until the pipe closes; then exit at once, in the middle of a batch too."""
        while (order := read_order(self._pipe)) is not None:
            match order:
                case Job(assignment=assignment):
                    # A stop that came after the end of an earlier job is not meant for this one.
                    self.forget(assignment.attempt)
                    self.jobs.put(order)
                case MixJob():
                    self.jobs.put(order)
                case Stop(attempt=attempt):
                    self._stopped.add(attempt)
        os._exit(0)

    def is_stopped(self, attempt: str) -> bool:
        """Whether the agent took this attempt back."""
        return attempt in self._stopped

    def forget(self, attempt: str) -> None:
        """The attempt is over; its name may come again."""
        self._stopped.discard(attempt)


def _tell(pipe: IO[bytes], news: News) -> None:
    try:
        write_frame(pipe, news)
    except OSError:
        # The agent is gone: there is nobody left to work for.
        os._exit(0)


def _perform(job: Job, data: _Data, orders: _Orders, news: IO[bytes]) -> Trained:
    attempt = job.assignment.attempt
    told = time.monotonic()

    def on_step(done: int, total: int) -> None:
        nonlocal told
        now = time.monotonic()
        if done == total or now - told >= PROGRESS_EVERY_S:
            told = now
            _tell(news, Stepped(attempt=attempt, done=done, total=total))

    checkpoint = None
    if job.checkpoint:
        checkpoint = CheckpointFile(Path(job.checkpoint), job.checkpoint_every_s)
    try:
        samples = data.load(job.source)
    except HeadwaterError as error:
        return Trained(attempt, failure=str(error))
    return fulfil(
        job.assignment,
        job.base,
        samples,
        job.memory,
        supervision=Supervision(on_step, lambda: orders.is_stopped(attempt), threads=job.threads),
        checkpoint=checkpoint,
    )


def _mix(job: MixJob, data: _Data) -> Mixed:
    try:
        samples = data.load(job.source)
    except HeadwaterError as error:
        return Mixed(attempt=job.mix.attempt, failure=str(error))
    return carry_out(job.mix, samples)


def _attempt_of(job: Job | MixJob) -> str:
    return job.mix.attempt if isinstance(job, MixJob) else job.assignment.attempt


def _perform_safely(
    job: Job | MixJob, data: _Data, orders: _Orders, news: IO[bytes]
) -> Finished | MixFinished:
    what, attempt = ("mixing" if isinstance(job, MixJob) else "training"), _attempt_of(job)
    try:
        if isinstance(job, MixJob):
            return MixFinished(mixed=_mix(job, data))
        return Finished(trained=_perform(job, data, orders, news))
    except MemoryError:
        failure = "out of memory: use a smaller batch or model, or give the device more memory"
    except Exception as error:  # The outermost loop: one bad job must not end the trainer.
        _log.exception("%s failed attempt=%s", what, attempt)
        failure = f"{what} failed unexpectedly ({type(error).__name__}: {error}): report it"
    if isinstance(job, MixJob):
        return MixFinished(mixed=Mixed(attempt=attempt, failure=failure))
    return Finished(trained=Trained(attempt, failure=failure))


def main() -> None:
    """Take jobs from standard input until it closes; results go to standard output.

    What libraries print goes to standard error, so it cannot fall between two frames.
    """
    news = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    orders, data = _Orders(sys.stdin.buffer), _Data()
    threading.Thread(target=orders.read, name="orders", daemon=True).start()
    while True:
        job = orders.jobs.get()
        finished = _perform_safely(job, data, orders, news)
        orders.forget(_attempt_of(job))
        _tell(news, finished)


if __name__ == "__main__":
    main()
