"""The model a run begins with."""

import msgspec
import numpy as np

from cloud.config import RunPlan
from cloud.coordination.facts import RunMemory
from cloud.coordination.run import CHUNK_BYTES, ActiveRun
from cloud.record.registry import Registry
from federation.errors import CodecError, ConfigError, TrainingError
from federation.learning.data import LocalData
from federation.learning.layers import model_part
from federation.learning.methods import method_named
from federation.learning.models import initial_weights, input_shape
from federation.learning.training import train_locally
from federation.protocol import codec
from federation.protocol.codec import Weights
from federation.protocol.transfer import content_of


def initial_model(plan: RunPlan, registry: Registry | None = None) -> bytes:
    """The encoded weights a run begins with, and what travels beside them.

    They are decided by the run's seed and method, or are the newest model of the run or training
    in the registry that `plan.start` names.

    Raises:
        ConfigError: a model or size that the zoo does not have, numbers with which devices could
            not train or the hub could not aggregate, or a start that is not there or is another
            model.
        StoreError: the registry cannot be read.
    """
    weights, method = initial_weights(plan.model, plan.seed), method_named(plan.method.name)
    if plan.start:
        weights = _started(plan.start, weights, registry)
    state = method.state(weights, method.settings(plan.method.params))
    model = codec.encode({**weights, **state})
    _rehearse(plan, model)
    return model


def _started(start: str, like: Weights, registry: Registry | None) -> Weights:
    """The newest model of this name in the registry; the method's tensors stay behind."""
    entries = registry.manifest(start) if registry is not None else []
    models = [entry.weights for entry in entries if entry.weights]
    if registry is None or not models:
        raise ConfigError(
            f"start is {start!r}, and there is no model of that name here; expected a run or a "
            "training in the hub's registry: correct it, or leave it out"
        )
    try:
        weights = model_part(codec.decode(registry.read(models[-1])))
        codec.check_update(weights, like)
    except CodecError as error:
        raise ConfigError(
            f"start is {start!r}, whose model is not that of [model] ({error}): name the model "
            "and sizes it was trained with"
        ) from error
    return weights


def _rehearse(plan: RunPlan, model: bytes) -> None:
    """A step on one blank sample and a round without votes: what is out of range fails now."""
    run = ActiveRun(RunMemory(plan=plan, content=content_of(model, CHUNK_BYTES), model=model))
    blank = LocalData(np.zeros((1, *input_shape(plan.model)), np.float32), np.zeros(1, np.int64))
    local = msgspec.structs.replace(run.local_plan("nobody"), epochs=1, max_steps=1, batch_size=1)
    try:
        if not plan.mirror:
            train_locally(run.weights, blank, local)
    except TrainingError as error:
        raise ConfigError(f"no device could train by this plan: {error}") from error
    run.close_round()
