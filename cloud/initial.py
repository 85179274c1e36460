"""The model a run begins with."""

import msgspec
import numpy as np

from cloud.config import RunPlan
from cloud.coordination.facts import RunMemory
from cloud.coordination.run import CHUNK_BYTES, ActiveRun
from federation.errors import ConfigError, TrainingError
from federation.learning.data import LocalData
from federation.learning.methods import method_named
from federation.learning.models import initial_weights, input_shape
from federation.learning.training import train_locally
from federation.protocol import codec
from federation.protocol.transfer import content_of


def initial_model(plan: RunPlan) -> bytes:
    """The encoded weights a run begins with, and what travels beside them.

    They are decided by the run's seed and method.

    Raises:
        ConfigError: a model or size that the zoo does not have, or numbers with which devices
            could not train or the hub could not aggregate.
    """
    weights, method = initial_weights(plan.model, plan.seed), method_named(plan.method.name)
    state = method.state(weights, method.settings(plan.method.params))
    model = codec.encode({**weights, **state})
    _rehearse(plan, model)
    return model


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
