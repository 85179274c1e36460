"""The trainer: what turns an assignment and a base into an encoded update.

`fulfil` is that, and the simulation calls it too. `python -m edge_agent.trainer` is the
child process in which a device calls it, so that torch's memory goes when the child goes.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np

from federation.errors import CodecError, HeadwaterError
from federation.learning.data import LocalData
from federation.learning.layers import choose_layers
from federation.learning.training import (
    Checkpoint,
    StoppedError,
    Supervision,
    train_locally,
)
from federation.protocol.codec import decode, digest_of, encode
from federation.protocol.effects import Trained
from federation.protocol.messages import Assignment


@dataclass(frozen=True, slots=True)
class CheckpointFile:
    """Where a training keeps its checkpoint, and how often at most it writes it."""

    path: Path
    every_s: float = 5.0

    def write(self, identity: str, checkpoint: Checkpoint) -> None:
        """Replace the file, so that after a power cut it is the old one or the new one."""
        content = checkpoint.to_bytes()
        head = f"{identity} {digest_of(content)}\n".encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            dir=self.path.parent, prefix=f"{self.path.name}.", delete=False
        ) as file:
            file.write(head + content)
            file.flush()
            os.fsync(file.fileno())
        Path(file.name).replace(self.path)

    def read(self, identity: str) -> Checkpoint | None:
        """The checkpoint of this training; None where there is none, whole and its own."""
        try:
            head, _, content = self.path.read_bytes().partition(b"\n")
            if head == f"{identity} {digest_of(content)}".encode():
                return Checkpoint.from_bytes(content)
        except (FileNotFoundError, CodecError):
            pass
        return None

    def forget(self) -> None:
        """Remove the file, and what a write that was cut short left behind."""
        for file in (self.path, *self.path.parent.glob(f"{self.path.name}.*")):
            file.unlink(missing_ok=True)


def fulfil(
    assignment: Assignment,
    base: bytes,
    data: LocalData,
    *,
    on_step: Callable[[int, int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    checkpoint: CheckpointFile | None = None,
) -> Trained:
    """The encoded update an assignment asks for, or why there is none.

    Args:
        assignment: what to do; its `base` and `inline` are not looked at.
        base: the encoded base model.
        data: the local samples.
        on_step: told the steps done and the steps in all, after each batch.
        should_stop: asked between batches; when true, the training ends and is forgotten.
        checkpoint: where to keep a checkpoint, and to resume from one. The bits of the
            update do not depend on it.
    """
    identity = _identity(assignment, base, data) if checkpoint else ""
    supervision = Supervision(on_step=on_step, should_stop=should_stop)
    if checkpoint is not None:
        supervision = replace(
            supervision,
            save=lambda state: checkpoint.write(identity, state),
            save_every_s=checkpoint.every_s,
        )
    try:
        resume = checkpoint.read(identity) if checkpoint else None
        trained = _train(assignment, base, data, supervision, resume)
    except StoppedError as error:
        trained = Trained(assignment.attempt, failure=f"stopped: {error}")
    except HeadwaterError as error:
        trained = Trained(assignment.attempt, failure=str(error))
    except OSError as error:
        return Trained(
            assignment.attempt,
            failure=f"the checkpoint cannot be kept ({error}): free some space",
        )
    if checkpoint is not None:
        checkpoint.forget()
    return trained


def _train(
    assignment: Assignment,
    base: bytes,
    data: LocalData,
    supervision: Supervision,
    resume: Checkpoint | None,
) -> Trained:
    plan = assignment.plan
    result = train_locally(decode(base), data, plan, supervision=supervision, resume=resume)
    sent = choose_layers(result.weights, plan.layers)
    update = encode(sent, encoding=plan.encoding, seed=plan.seed)
    return Trained(assignment.attempt, update=update, report=result.report)


def _identity(assignment: Assignment, base: bytes, data: LocalData) -> str:
    """Names a training by all that decides its bits, so that no other one resumes it."""
    plan = msgspec.json.encode(assignment.plan, order="sorted")
    digest = hashlib.sha256(f"{assignment.attempt} {digest_of(base)} {data.x.shape}\n".encode())
    digest.update(plan)
    digest.update(np.ascontiguousarray(data.x).data)
    digest.update(np.ascontiguousarray(data.y).data)
    return digest.hexdigest()
