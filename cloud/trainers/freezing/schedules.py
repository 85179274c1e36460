"""Freezing by the clock alone: the controls that a rule has to beat."""

from collections.abc import Sequence

from cloud.trainers.loop import learning_rate
from cloud.trainers.plans import OptimizerPlan


def front_at(times: Sequence[float], done: float) -> int:
    """How many modules are frozen once a share `done` of the training is.

    Args:
        times: when each module freezes, from the front, as a share of the training; those whose
            time is over freeze in order, none before the ones in front of it.
        done: 0 to 1.
    """
    front = 0
    while front < len(times) and done >= times[front]:
        front += 1
    return front


def freeze_out_times(modules: int, first: float, *, is_cubed: bool = False) -> tuple[float, ...]:
    """When each module but the last freezes, as FreezeOut (arXiv:1706.04983), section 2 has it.

    From `first` for the frontmost, evenly (or cubed, so that front ones freeze earlier still) up
    to 1 for the last, which so never does.
    """
    steps = [first + (1 - first) * module / (modules - 1) for module in range(modules)]
    if is_cubed:
        base = first ** (1 / 3)
        steps = [(base + (1 - base) * module / (modules - 1)) ** 3 for module in range(modules)]
    return tuple(steps[:-1])


def freeze_out_scale(plan: OptimizerPlan, end: float, step: int, steps: int) -> float:
    """What a module that freezes at share `end` multiplies the plan's rate of a step with.

    It runs through the plan's schedule in that share of the time, at a rate 1 / `end` times as
    high, so that as much is learned under the curve (FreezeOut's scaled rates). With a cosine
    schedule and no warm-up that is the paper's Eq. 1.
    """
    rate = learning_rate(plan, step, steps)
    own = learning_rate(plan, min(steps, round(step / end)), steps) / end
    return own / rate if rate > 0 else 0.0
