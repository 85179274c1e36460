"""What the hub can learn: models of the zoo, and mixtures of experts, each on real data."""

from pathlib import Path

from cloud.trainers.plans import TrainPlan
from cloud.trainers.task import Task
from cloud.trainers.tasks.labelled import of_the_zoo, of_windows
from cloud.trainers.tasks.language import of_text
from cloud.trainers.tasks.translation import of_pairs
from federation.errors import ConfigError
from moe_serving.models.config import ClassifierConfig, DecoderConfig, TranslationConfig


def open_task(plan: TrainPlan, cache: Path) -> Task:
    """The task a plan names, with its model at the weights its seed gives.

    Raises:
        ConfigError: data and model that do not fit each other.
        DataError: a data set that is unknown or was not fetched.
    """
    if plan.model is not None:
        return of_the_zoo(plan, plan.model, cache)
    match plan.moe:
        case ClassifierConfig():
            return of_windows(plan, plan.moe, cache)
        case DecoderConfig():
            return of_text(plan, plan.moe, cache)
        case TranslationConfig():
            return of_pairs(plan, plan.moe, cache)
        case None:
            raise ConfigError("the plan has no model; expected [model] or [moe]: give one")
