"""A teacher from mirrored data, and what its students begin with.

It runs apart from the hub, on the hub's folder, and needs torch. What it leaves in the registry is
named by digest; a run that names it in `teaching` begins with it.
"""

from dataclasses import dataclass
from typing import Literal

import msgspec

from cloud.config import ModelChoice
from cloud.record.registry import Registry
from federation.errors import ConfigError
from federation.learning.models import initial_weights
from federation.protocol.codec import Weights, encode
from federation.protocol.messages import ModelSpec
from twin.mirror import MirrorStore
from twin.students import base_for, enrol, school
from twin.teacher import Schooling, keep, train_teacher


class TeachingPlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `teach.toml` says.

    `model` is what devices train that mirror nothing: they learn alone. `students` names the
    architecture of each that does, and `default` that of the others that do. Students `at_twin` are
    trained at once, where their data is mirrored; the others train on their devices.
    """

    method: Literal["simkd", "logit_kd"] = "simkd"
    teacher: ModelChoice
    model: ModelChoice
    default: ModelChoice
    students: dict[str, ModelChoice] = {}
    at_twin: tuple[str, ...] = ()
    teacher_schooling: Schooling = Schooling()
    student_schooling: Schooling = Schooling()
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Prepared:
    """The digests of teacher and teaching, and the model of each device that has a student."""

    teacher: str
    teaching: str
    students: dict[str, ModelSpec]


def prepare(plan: TeachingPlan, mirrors: MirrorStore, registry: Registry) -> Prepared:
    """Train a teacher on all mirrored data, and put it and its students' first bases away.

    Raises:
        ConfigError: a student of a device that mirrors nothing, or a model that cannot be one.
        TrainingError: no data, or data that does not fit the models.
        DataError, StoreError: data or registry that cannot be read or written.
    """
    data = {device: mirrors.read(device) for device in mirrors.devices}
    if strangers := sorted({*plan.students, *plan.at_twin} - data.keys()):
        raise ConfigError(
            f"{strangers[0]} is to be taught and mirrors no data; expected some of "
            f"{', '.join(data) or 'none'}: have its owner allow it, or leave it out"
        )
    teacher = train_teacher(data, plan.teacher, plan.teacher_schooling)
    models: dict[str, ModelSpec] = {d: plan.students.get(d, plan.default) for d in data}
    students = enrol(models, teacher, plan.method, plan.seed)
    at_twin = {device: students[device] for device in plan.at_twin}
    if at_twin:
        students |= school(at_twin, teacher, data, plan.method, plan.student_schooling)
    bundle: Weights = dict(initial_weights(plan.model, plan.seed))
    for device, student in students.items():
        base = base_for(student, teacher, data[device], plan.method)
        bundle |= {f"{device}/{name}": tensor for name, tensor in base.items()}
    return Prepared(
        teacher=keep(teacher, registry),
        teaching=registry.put(encode(bundle)),
        students={device: student.model for device, student in students.items()},
    )
