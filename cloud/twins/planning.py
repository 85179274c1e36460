"""The round's plan: whom to ask and how fast each may send, proven close to the best.

The twins' forecasts become an `optimizer.problem.Problem`: one student (the run's model), one power
mode, one gateway whose uplink all share. The plan says who sits out and how many hundredths of
the uplink each of the others gets; those become paces that the devices keep. Where no plan can
be made, the devices are drawn by chance and keep the paces of the last plan; where one has fewer
train than the run's quorum, the others up to it are drawn by chance, without a pace.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from cloud.config import PlanningChoice, RunPlan
from cloud.twins.judging import work_of
from cloud.twins.store import TwinRow, TwinStore
from federation.errors import PlanError
from optimizer.allocation import plan as make_plan
from optimizer.baselines import select_uniformly
from optimizer.plan import Plan
from optimizer.problem import Gateway, PowerMode, Problem, Server, Student, User, Weights
from optimizer.selection import Candidates, Planned, Selection
from twin.forecast import Forecast, forecast, power_of
from twin.model import is_cold

UNITS = 100
"""The uplink is shared in hundredths."""

UPLINK_CHOICES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)

MOST = 1000
"""Of more candidates than this, so many are drawn first, and a plan is made of these."""

NEED = 0.1
"""What a device's update is worth: 1 - NEED / sqrt(samples / mean samples), the power law of the
planning literature; and 1 - NEED less for a device that sits out."""

STUDENT, GATEWAY = "model", "uplink"


class RoundPlanner:
    """Makes a plan a round; keeps the last one, whose prices make the next one quicker."""

    def __init__(self, twins: TwinStore) -> None:
        self._twins = twins
        self._last: Plan | None = None
        self._paces: dict[str, float] = {}

    def select(
        self,
        candidates: Candidates,
        count: int,
        rng: np.random.Generator,
        *,
        run: RunPlan,
        model_bytes: int,
        now: float,
    ) -> Selection:
        """Choose at most `count` of the candidates, each with its pace.

        Raises:
            StoreError: the twins cannot be read.
        """
        names = _some(candidates.names, rng)
        rows, fleet = self._twins.of(names), self._twins.fleet()
        said: dict[str, Forecast] = {}
        for name, row in rows.items():
            work = work_of(run, model_bytes, run.policy.deadline_s, row.shadow)
            found = forecast(row.model, fleet, work, now, is_cold=is_cold(row.model, now))
            if found is not None:
                said[name] = found
        drawn = select_uniformly(candidates, count, 0, rng)
        if not said:
            return drawn
        near = self._last.prices if self._last is not None else None
        choice = run.planning
        try:
            problem = problem_of(rows, said, run)
            made = make_plan(problem, choice.tolerance, choice.time_limit_s, near=near)
        except PlanError as error:
            kept = {name: self._paces[name] for name in drawn.chosen if name in self._paces}
            return _planned(drawn, Planned(paces=kept, why_stopped=f"no plan: {error}"))
        self._last = made
        self._paces = paces_of(made, choice)
        chosen = selection_of(made, drawn, candidates, count, self._paces)
        return filled_up(chosen, drawn, run.policy.quorum, rng)


def problem_of(rows: Mapping[str, TwinRow], said: Mapping[str, Forecast], run: RunPlan) -> Problem:
    """The planning problem of the devices of which a forecast is there, in order of names."""
    names = sorted(said)
    choice, up_bytes = run.planning, max(each.up_bytes for each in said.values())
    usual = float(np.mean([max(rows[name].model.samples, 1) for name in names]))
    return Problem(
        users=tuple(_user(rows[name], said[name], run, usual) for name in names),
        gateways=(Gateway(GATEWAY, UNITS),),
        students=(Student(STUDENT, update_bytes=float(max(up_bytes, 1))),),
        server=Server(units=0, choices=(1,)),
        uplink_choices=UPLINK_CHOICES,
        weights=Weights(
            makespan=choice.makespan,
            energy=choice.energy,
            accuracy=choice.accuracy,
            time_ref_s=run.policy.deadline_s / 4,
            accuracy_ref=NEED,
        ),
        deadline_s=run.policy.deadline_s,
    )


def _user(row: TwinRow, said: Forecast, run: RunPlan, usual: float) -> User:
    samples = max(row.model.samples, 1)
    own = row.model.up_bytes_per_s
    link = own.next().median if own is not None else math.inf
    unit = run.planning.uplink_bytes_per_s / UNITS
    seen = max(1.0, run.training.epochs * samples)
    power = power_of(row.shadow.reported.state)
    upload_s = said.up_bytes / link if link < math.inf else 0.0
    return User(
        name=row.shadow.device,
        gateway=GATEWAY,
        samples=samples,
        modes=(
            PowerMode(
                "usual",
                {STUDENT: said.training_s.median / seen * run.training.epochs},
                watts=(power.training_w or 0.0) if power is not None else 0.0,
            ),
        ),
        goodput_bytes_per_s=tuple(min(link, units * unit) for units in UPLINK_CHOICES),
        accuracy={STUDENT: 1.0 - NEED / math.sqrt(max(samples / usual, 0.04))},
        absent_accuracy=1.0 - 6 * NEED,
        availability=said.completes,
        overhead_s=max(said.finish_s.median - said.training_s.median - upload_s, 0.0),
    )


def paces_of(made: Plan, choice: PlanningChoice) -> dict[str, float]:
    """Bytes a second for each device that the plan has train."""
    unit = choice.uplink_bytes_per_s / UNITS
    return {each.user: each.uplink_units * unit for each in made.choices if each.place == "device"}


def selection_of(
    made: Plan,
    drawn: Selection,
    candidates: Candidates,
    count: int,
    paces: Mapping[str, float],
) -> Selection:
    """Who is asked: those that the plan has train, of too many the quickest; others by chance.

    Devices of which nothing is known were not planned for; they fill what is left of `count`.
    """
    seconds = {each.user: each.seconds for each in made.choices}
    planned = sorted(paces, key=lambda name: (seconds[name], name))[:count]
    unknown = [name for name in drawn.chosen if name not in seconds]
    chosen = tuple(sorted([*planned, *unknown][:count]))
    idle = {
        name: "its plan is to sit this round out"
        for name in seconds
        if name not in paces and name in candidates.names
    }
    note = Planned(
        paces={name: paces[name] for name in planned},
        objective=made.objective,
        bound=made.bound,
        gap=made.gap,
        makespan_s=made.makespan_s,
        prices={**{f"uplink {name}": each for name, each in made.prices.uplink.items()}},
        why_stopped=made.why_stopped,
    )
    return Selection(chosen, idle, drawn.otherwise, planned=note)


def filled_up(
    chosen: Selection, drawn: Selection, quorum: int, rng: np.random.Generator
) -> Selection:
    """The selection with at least a quorum, by more of those drawn by chance.

    A plan may find that idling is best, and the next one would too: no round would ever open.
    """
    others = [name for name in drawn.chosen if name not in chosen.chosen]
    missing = min(quorum - len(chosen.chosen), len(others))
    if missing <= 0:
        return chosen
    more = rng.permutation(others)[:missing].tolist()
    return replace(
        chosen,
        chosen=tuple(sorted([*chosen.chosen, *more])),
        excluded={name: why for name, why in chosen.excluded.items() if name not in more},
    )


def _planned(drawn: Selection, note: Planned) -> Selection:
    return Selection(drawn.chosen, drawn.excluded, drawn.otherwise, planned=note)


def _some(names: Sequence[str], rng: np.random.Generator) -> list[str]:
    if len(names) <= MOST:
        return list(names)
    return [names[place] for place in np.sort(rng.choice(len(names), MOST, replace=False)).tolist()]
