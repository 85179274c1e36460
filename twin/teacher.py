"""The teacher: a large model that learns from what devices mirror, and tells students of it.

It sees the union of all mirrored data. That is no federated learning, and not as private: only
owners who allow it take part (`twin.mirror`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec
import numpy as np

from federation.errors import HeadwaterError, StoreError, TrainingError
from federation.learning.cohort import Task, train_cohort
from federation.learning.data import LocalData
from federation.learning.models import initial_weights
from federation.learning.samples import sample_digest
from federation.learning.training import LocalResult
from federation.protocol.codec import Weights, decode, encode
from federation.protocol.messages import LocalPlan, ModelSpec


class Phase(msgspec.Struct, frozen=True):
    """So many epochs at one learning rate."""

    epochs: int
    learning_rate: float


PAPERS_PHASES = (Phase(45, 0.05), Phase(15, 0.01), Phase(15, 0.002), Phase(15, 4e-4))
"""The paper's rates up to its 90th epoch (arXiv:2303.06155): 0.05, divided by 5 as it says."""


class Schooling(msgspec.Struct, frozen=True, kw_only=True):
    """How a teacher or a student learns: phases, and the numbers of every step.

    A `batch_size` of 0 takes all samples in every step, which is the paper's FedSGD.
    """

    phases: tuple[Phase, ...] = PAPERS_PHASES
    batch_size: int = 64
    momentum: float = 0.9
    weight_decay: float = 7.5e-4
    seed: int = 0

    def plans(self, model: ModelSpec, samples: int, method: str = "fedavg") -> list[LocalPlan]:
        """The plan of each phase, for so many samples."""
        return [
            LocalPlan(
                model=model,
                method=method,
                epochs=phase.epochs,
                batch_size=self.batch_size or samples,
                learning_rate=phase.learning_rate,
                momentum=self.momentum,
                weight_decay=self.weight_decay,
                seed=self.seed + number,
            )
            for number, phase in enumerate(self.phases)
        ]


class Contents(Protocol):
    """Where bytes are kept by their digest; the hub's registry is one such place."""

    def put(self, data: bytes) -> str:
        """Keep these bytes; their digest."""
        ...

    def read(self, digest: str) -> bytes:
        """The bytes of this digest, checked."""
        ...


class TeacherNote(msgspec.Struct, frozen=True, kw_only=True):
    """A teacher as the registry keeps it: its model, the digest of its weights, whose data.

    `taught_by` names, by device, the digest of the mirrored samples it learned from: so it can be
    told which teachers know of data that was deleted since.
    """

    model: ModelSpec
    weights: str
    taught_by: dict[str, str]


@dataclass(frozen=True, slots=True, eq=False)
class Teacher:
    """A trained teacher, and whose data it has seen, by digest."""

    model: ModelSpec
    weights: Weights
    taught_by: Mapping[str, str]


def train_teacher(
    mirrors: Mapping[str, LocalData],
    model: ModelSpec,
    schooling: Schooling,
    *,
    accelerator: str = "auto",
) -> Teacher:
    """Train a teacher on what these devices mirror, pooled in the order of their names.

    With `batch_size` = 0 a step is one of FedSGD over the twins, each with all of its samples:
    the mean of their gradients, weighted by samples, is that of the pool.

    Departs from the paper: the momentum is not Nesterov's, and begins anew in each phase.

    Raises:
        TrainingError: no data, samples that do not fit together or the model, or a loss that is
            not finite.
        ConfigError: a model the zoo does not have, or an accelerator that is not there.
    """
    pool = pooled(mirrors)
    weights = initial_weights(model, schooling.seed)
    for plan in schooling.plans(model, pool.samples):
        [found] = train_cohort([Task(weights, pool, plan)], accelerator=accelerator)
        weights = trained(found).weights
    seen = {device: sample_digest(mirrors[device]) for device in sorted(mirrors)}
    return Teacher(model, weights, seen)


def pooled(mirrors: Mapping[str, LocalData]) -> LocalData:
    """All samples, in the order of the devices' names.

    Raises:
        TrainingError: there are none, or their shapes differ.
    """
    if not mirrors:
        raise TrainingError("no device mirrors its data; a teacher needs one or more: ask owners")
    each = [mirrors[device] for device in sorted(mirrors)]
    shapes = {data.x.shape[1:] for data in each}
    if len(shapes) > 1:
        raise TrainingError(
            f"devices mirror samples of shapes {sorted(shapes)}; expected one: "
            "teach devices of one kind of data at a time"
        )
    return LocalData(
        np.concatenate([data.x for data in each]), np.concatenate([data.y for data in each])
    )


def trained(result: LocalResult | HeadwaterError) -> LocalResult:
    """What came of a training.

    Raises:
        HeadwaterError: why nothing did.
    """
    if isinstance(result, HeadwaterError):
        raise result
    return result


def keep(teacher: Teacher, contents: Contents) -> str:
    """Put a teacher among contents that are named by digest; the digest to ask for it by."""
    weights = contents.put(encode(teacher.weights))
    note = TeacherNote(model=teacher.model, weights=weights, taught_by=dict(teacher.taught_by))
    return contents.put(msgspec.json.encode(note, order="sorted"))


def recall(digest: str, contents: Contents) -> Teacher:
    """The teacher that was kept under this digest.

    Raises:
        StoreError: there is none, or its bytes are no teacher's.
    """
    try:
        note = msgspec.json.decode(contents.read(digest), type=TeacherNote)
    except msgspec.DecodeError as error:
        raise StoreError(f"content {digest} is no teacher ({error}): name another") from error
    return Teacher(note.model, decode(contents.read(note.weights)), note.taught_by)


def taught_from(teachers: Sequence[TeacherNote], deleted: str) -> list[TeacherNote]:
    """The teachers that have seen the samples of this digest: train them anew without those."""
    return [note for note in teachers if deleted in note.taught_by.values()]
