"""The model a run begins with."""

from cloud.config import RunPlan
from federation.learning.models import initial_weights
from federation.protocol import codec


def initial_model(plan: RunPlan) -> bytes:
    """The encoded weights a run begins with, decided by its seed alone.

    Raises:
        ConfigError: a model or size that the zoo does not have.
    """
    return codec.encode(initial_weights(plan.model, plan.seed))
