"""Who is asked in a round: the wishes of the operators first, then chance, or what twins forecast.

`uniform` draws each candidate with the same chance. `forecast` draws it the likelier the surer
its twin is that it finishes before the deadline; a badly calibrated twin is hardly listened to,
and its device is taken for an average one. `plan` is of `cloud.twins.planning`.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from cloud.config import RunPlan
from cloud.twins.judging import BASE_RATE_WORTH, work_of
from cloud.twins.planning import RoundPlanner
from cloud.twins.store import TwinStore
from federation.errors import StoreError
from federation.protocol.wishes import DesiredState, is_within, objection_to
from optimizer.baselines import select_uniformly
from optimizer.selection import Candidates, Selection
from twin.forecast import forecast
from twin.model import is_cold

SHARPNESS = 2.0
"""Chances are drawn in proportion to this power of the score: 2 to 1 becomes 4 to 1."""

LEAST = 0.02
"""No score is lower: whoever was slow is tried again now and then."""

MOST = 2000
"""Of more candidates than this, so many are drawn first, and only their twins are read."""

_log = logging.getLogger("headwater.twins")


@dataclass(frozen=True)
class Task:
    """The run that asks: its plan, and the size of its newest model."""

    plan: RunPlan
    model_bytes: int


@dataclass
class Choosing:
    """A selector. `task` and `wishes` give what is so at the moment of choosing."""

    twins: TwinStore
    task: Callable[[], Task | None]
    wishes: Callable[[], Mapping[str, DesiredState]]
    clock: Callable[[], float]
    planner: RoundPlanner = field(init=False)

    def __post_init__(self) -> None:
        self.planner = RoundPlanner(self.twins)

    def __call__(
        self, candidates: Candidates, count: int, number: int, rng: np.random.Generator
    ) -> Selection:
        """Choose at most `count` of the candidates."""
        now, barred = self.clock(), {}
        for device, wish in self.wishes().items():
            if why := barred_by(wish, now):
                barred[device] = why
        if barred:
            free = [name for name in candidates.names if name not in barred]
            candidates = Candidates(free, candidates.capability)
        selection = self._choose(candidates, count, number, rng, now)
        return replace(selection, excluded={**selection.excluded, **barred})

    def _choose(
        self,
        candidates: Candidates,
        count: int,
        number: int,
        rng: np.random.Generator,
        now: float,
    ) -> Selection:
        task, names = self.task(), candidates.names
        if task is None or task.plan.selection == "uniform":
            return select_uniformly(candidates, count, number, rng)
        if task.plan.selection == "forecast" and len(names) <= count:
            return select_uniformly(candidates, count, number, rng)
        if len(names) > max(MOST, count):
            drawn = rng.choice(len(names), size=max(MOST, count), replace=False)
            names = [names[place] for place in np.sort(drawn).tolist()]
        try:
            if task.plan.selection == "plan":
                return self.planner.select(
                    candidates,
                    count,
                    rng,
                    run=task.plan,
                    model_bytes=task.model_bytes,
                    now=now,
                )
            scores = score(self.twins, task, names, now)
        except StoreError as error:
            _log.warning("devices are drawn by chance, for twins cannot be read: %s", error)
        except Exception:  # outermost: a round chosen by chance is better than a hub that ends
            _log.exception("devices are drawn by chance, for choosing them failed")
        else:
            return select_by_forecast(scores, count, rng)
        return select_uniformly(candidates, count, number, rng)


def score(twins: TwinStore, task: Task, names: Sequence[str], now: float) -> dict[str, float]:
    """How likely each device is to finish a round in time, by its twin as far as that can be told.

    What a twin says counts by its weight, and else how often the fleet was in time.
    """
    rows, fleet = twins.of(names), twins.fleet()
    usual = fleet.in_time.mean(0.5, BASE_RATE_WORTH)
    scores = dict.fromkeys(names, usual)
    for name, row in rows.items():
        work = work_of(task.plan, task.model_bytes, task.plan.policy.deadline_s, row.shadow)
        said = forecast(row.model, fleet, work, now, is_cold=is_cold(row.model, now))
        if said is not None:
            weight = row.model.calibration.weight
            chance = said.finishes_before(work.deadline_s)
            scores[name] = weight * chance + (1.0 - weight) * usual
    return scores


def select_by_forecast(
    scores: Mapping[str, float], count: int, rng: np.random.Generator
) -> Selection:
    """Draw `count` devices without replacement, in proportion to a power of their scores.

    The largest of Gumbel noise added to logarithms: W. Kool et al., "Stochastic beams and where
    to find them" (arXiv:1903.06059), section 2.
    """
    names = sorted(scores)
    logs = [SHARPNESS * math.log(max(scores[name], LEAST)) for name in names]
    keys = np.array(logs) + rng.gumbel(size=len(names))
    places = np.sort(np.argsort(-keys)[:count]).tolist()
    chosen = tuple(names[place] for place in places)
    rest = (name for name in names if name not in set(chosen))
    return Selection(
        chosen=chosen,
        excluded={
            name: f"not drawn: its twin gives it {scores[name]:.0%} to finish in time"
            for name in rest
        },
        otherwise=f"not drawn: the round asks {count} of those that are there",
    )


def barred_by(wish: DesiredState, now: float) -> str:
    """Why a device is not asked, by what is desired of it; empty where it may be."""
    document = {
        key: value for key, value in wish.document.items() if objection_to(key, value) == ""
    }
    if not document.get("enabled", True):
        return "it shall not train: enabled is desired to be false"
    hours = document.get("allowed_hours")
    if hours is not None and not is_within((hours[0], hours[1]), now):
        return f"it is outside of its allowed hours, {hours[0]:g} to {hours[1]:g} h UTC"
    return ""
