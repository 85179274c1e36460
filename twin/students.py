"""Students: one small model a device, of whatever architecture, taught and never averaged."""

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from federation.errors import ConfigError
from federation.learning.cohort import Task, train_cohort
from federation.learning.data import LocalData
from federation.learning.distillation import SAID, answers, first_student, student_of
from federation.learning.models import initial_weights
from federation.protocol.codec import Weights
from federation.protocol.messages import LocalPlan, ModelSpec
from twin.teacher import Schooling, Teacher, trained


@dataclass(frozen=True, slots=True, eq=False)
class Student:
    """A device's model, with a projector where its method wants one, and its weights."""

    model: ModelSpec
    weights: Weights


def enrol(
    models: Mapping[str, ModelSpec], teacher: Teacher, method: str, seed: int
) -> dict[str, Student]:
    """A first student of each device, as its method wants it.

    Args:
        models: the architecture each device chose, without projector.
        teacher: whose classifier students of SimKD begin and end with.
        method: "simkd" or "logit_kd".
        seed: of the first weights; a device's place among the names is part of it.

    Raises:
        ConfigError: no such method, or an architecture that cannot be a student.
    """
    _check_method(method)
    students = {}
    for place, device in enumerate(sorted(models)):
        model, own = models[device], seed + place
        if method == "simkd":
            model = student_of(model, teacher.model)
            students[device] = Student(model, first_student(model, teacher.weights, own))
        else:
            students[device] = Student(model, initial_weights(model, own))
    return students


def base_for(student: Student, teacher: Teacher, data: LocalData, method: str) -> Weights:
    """The base of a student's training: its weights, and what the teacher says of these samples.

    It travels to a device that trains itself, and is what the twin trains from where that does.

    Raises:
        ConfigError: no such method.
        TrainingError: samples that do not fit the teacher.
    """
    _check_method(method)
    return {**student.weights, **answers(teacher.model, teacher.weights, data, SAID[method])}


def school(
    students: Mapping[str, Student],
    teacher: Teacher,
    mirrors: Mapping[str, LocalData],
    method: str,
    schooling: Schooling,
    *,
    accelerator: str = "auto",
    params: Mapping[str, float] | None = None,
) -> dict[str, Student]:
    """Train students at their twins, side by side, through all phases.

    Each learns from its own device's samples and the teacher's answers to them, nothing else.

    Raises:
        ConfigError: as `base_for`, or an accelerator that is not there.
        TrainingError: a student that cannot be trained.
    """
    devices = sorted(students)
    said = {d: base_for(students[d], teacher, mirrors[d], method) for d in devices}
    plans = {d: schooling.plans(students[d].model, mirrors[d].samples, method) for d in devices}
    current = {device: students[device].weights for device in devices}
    for phase in range(len(schooling.phases)):
        tasks = [
            Task(
                {**said[device], **current[device]},
                mirrors[device],
                _with(plans[device][phase], params or {}, place),
            )
            for place, device in enumerate(devices)
        ]
        found = train_cohort(tasks, accelerator=accelerator)
        current = {d: trained(one).weights for d, one in zip(devices, found, strict=True)}
    return {device: Student(students[device].model, current[device]) for device in devices}


def _with(plan: LocalPlan, params: Mapping[str, float], place: int) -> LocalPlan:

    return msgspec.structs.replace(plan, params=dict(params), seed=plan.seed + 1000 * place)


def _check_method(method: str) -> None:
    if method not in SAID:
        raise ConfigError(
            f"method {method!r} teaches no students; expected one of {', '.join(SAID)}: correct it"
        )
