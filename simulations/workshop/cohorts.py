"""Cuts what is to be trained into cohorts, by a rule that knows nothing of workers or timing.

Trained together, the clients of a cohort may differ in their last bits from the same clients
in another one. So the same jobs must always be cut alike: by the order of places and by what
they cost, never by how many workers there are or which is free.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from federation.errors import ConfigError
from federation.learning.data import LocalData
from federation.protocol.messages import LocalPlan, ModelSpec
from simulations.workshop.job import Job


@dataclass(frozen=True, slots=True)
class CohortRule:
    """The most jobs in a cohort, and the MACs at which it is full.

    Light jobs gain from being many, since what is paid once a cohort is most of their cost.
    Heavy ones gain nothing, and alone they spread evenly over workers. 5e7 MACs, forward, take
    one core some 10 ms to train.
    """

    most: int = 64
    macs: float = 5e7


ALONE = CohortRule(most=1)
"""Every job is trained by itself, so its result depends on no other."""


def cut(
    jobs: Sequence[Job], data: Mapping[str, LocalData], rule: CohortRule
) -> list[tuple[Job, ...]]:
    """All of these jobs in cohorts, the heaviest first: a function of the jobs, in any order.

    Workers that take the heaviest first end at about the same time.
    """
    ordered = sorted(jobs, key=_order)
    if rule.most == 1:
        return [(job,) for job in ordered]
    cohorts: list[tuple[float, tuple[Job, ...]]] = []
    filling: list[Job] = []
    filled = 0.0
    for job in ordered:
        cost = macs_of(job.assignment.plan, data[job.device].samples)
        if filling and (len(filling) == rule.most or filled + cost > rule.macs):
            cohorts.append((filled, tuple(filling)))
            filling, filled = [], 0.0
        filling.append(job)
        filled += cost
    cohorts.append((filled, tuple(filling)))
    return [cohort for _, cohort in sorted(cohorts, key=lambda pair: -pair[0])]


def macs_of(plan: LocalPlan, samples: int) -> float:
    """The MACs of a training on its way forward; none where the plan cannot be carried out."""
    seen = plan.epochs * samples
    if plan.max_steps:
        seen = min(seen, plan.max_steps * plan.batch_size)
    return float(max(seen, 0) * _macs_a_sample(msgspec.msgpack.encode(plan.model, order="sorted")))


@functools.lru_cache(maxsize=64)
def _macs_a_sample(model: bytes) -> int:
    # Counting passes a sample through the model, so torch is needed: not before there are jobs.
    from federation.learning.costs import count_macs

    try:
        return count_macs(msgspec.msgpack.decode(model, type=ModelSpec))
    except ConfigError:
        return 0  # The trainer will say what is wrong with the model.


def _order(job: Job) -> tuple[int, str]:
    return job.place, job.assignment.attempt
