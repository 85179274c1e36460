"""A teacher's answers as labels, and the student that can use them.

The teacher never travels: what it says of a device's samples does, beside the student's base.
"""

from collections.abc import Collection

import numpy as np
import torch
from numpy.typing import NDArray

from federation.errors import ConfigError
from federation.learning.data import LocalData
from federation.learning.layers import TAUGHT, model_part
from federation.learning.losses.taught import FEATURES, LOGITS
from federation.learning.models import (
    build_model,
    check_samples,
    forward_pass,
    initial_weights,
    load_weights,
    sizes_of,
)
from federation.learning.samples import DIGEST, as_tensor, sample_digest
from federation.protocol.codec import Weights
from federation.protocol.messages import ModelSpec

SAID = {"logit_kd": (LOGITS,), "simkd": (FEATURES,)}
"""What each method wants a teacher to say of every sample."""


def answers(
    spec: ModelSpec,
    weights: Weights,
    data: LocalData,
    said: Collection[str] = (FEATURES, LOGITS),
    batch: int = 256,
) -> Weights:
    """What a teacher says of each of these samples, to lie beside a student's base.

    The samples are named with it: a device whose samples are others refuses the answers.

    Args:
        spec: the teacher's model.
        weights: the teacher's.
        data: the samples a student will train on, in the order in which it has them.
        said: which of "features" and "logits".
        batch: how many samples go through the teacher at once.

    Raises:
        ConfigError: a model the zoo does not have.
        TrainingError: weights or samples that do not fit the model.
    """
    check_samples(spec, data)
    run = forward_pass(load_weights(build_model(spec), model_part(weights)))
    told: dict[str, list[NDArray[np.float32]]] = {FEATURES: [], LOGITS: []}
    with torch.inference_mode():
        for start in range(0, data.samples, batch):
            features, logits, _ = run(torch.tensor(data.x[start : start + batch]))
            told[FEATURES].append(features.numpy())
            told[LOGITS].append(logits.numpy())
    rows = {f"{TAUGHT}/{what}": np.concatenate(told[what]) for what in said}
    return {**rows, DIGEST: as_tensor(sample_digest(data))}


def student_of(student: ModelSpec, teacher: ModelSpec) -> ModelSpec:
    """The student with a projector to this teacher's features (SimKD).

    Raises:
        ConfigError: a student that cannot have a projector, or other classes than the teacher's.
    """
    if "projected" not in sizes_of(student):
        raise ConfigError(
            f"model {student.name!r} has no projector: choose mlp, cnn or conv1d for students"
        )
    if sizes_of(student)["classes"] != sizes_of(teacher)["classes"]:
        raise ConfigError("student and teacher have other numbers of classes: give them the same")
    width = build_model(teacher).get_parameter("classifier.weight").shape[1]
    return ModelSpec(name=student.name, sizes={**student.sizes, "projected": width})


def first_student(student: ModelSpec, taught_by: Weights, seed: int) -> Weights:
    """A student's first weights: freshly drawn, but for the classifier, which is the teacher's.

    Args:
        student: with a projector, as `student_of` gives it.
        taught_by: the teacher's weights.
        seed: of what is drawn.

    Raises:
        ConfigError: a classifier of another shape than the teacher's.
    """
    drawn = initial_weights(student, seed)
    for name in (name for name in drawn if name.startswith("classifier.")):
        if name not in taught_by or taught_by[name].shape != drawn[name].shape:
            raise ConfigError(
                f"tensor {name!r} of the student has shape {drawn[name].shape}, and the teacher "
                "has none like it: give the student the size `projected` of the teacher's features"
            )
        drawn[name] = taught_by[name]
    return drawn
