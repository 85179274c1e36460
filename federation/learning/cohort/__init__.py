"""The training loop for many clients at once: `train_cohort`."""

from federation.learning.cohort.task import Task
from federation.learning.cohort.training import train_cohort

__all__ = ["Task", "train_cohort"]
