"""When a device drops out of a round, its digital agent may finish in its place.

Only where the run says so, and where whoever knows of owners and methods has no objection. The
update counts under the device's own attempt, once, and the record says who made it.
"""

from collections.abc import Callable
from typing import TypeAlias

from cloud.coordination.rounds import Attempt
from cloud.coordination.run import ActiveRun
from federation.protocol.effects import Train
from federation.protocol.messages import LocalPlan

MayStandIn: TypeAlias = Callable[[str, LocalPlan], str]
"""Why the agent of this device may not train by this plan; empty where it may."""

LABEL = "its digital agent trains in its place"


def nobody_may(_device: str, _plan: LocalPlan) -> str:
    """There are no digital agents here."""
    return "this hub has no digital agents"


class StandingIn:
    """Which attempts of the open round were given to digital agents."""

    def __init__(self, why_not: MayStandIn) -> None:
        self._why_not = why_not
        self._asked: set[str] = set()

    def due(self, run: ActiveRun, now: float) -> list[tuple[Attempt, Train]]:
        """The attempts to give to agents now: their devices are lost beyond their grace."""
        is_wanted = run.plan.stand_in and not run.plan.mirror
        if not is_wanted or run.round is None or now >= run.round.deadline:
            return []
        found = []
        for entry in run.round.dropped(now):
            if entry.attempt in self._asked:
                continue
            self._asked.add(entry.attempt)
            if not self._why_not(entry.device, run.local_plan(entry.device)):
                assignment, base = run.work(entry, run.round.deadline - now)
                found.append((entry, Train(assignment, base)))
        return found

    def has_asked(self, attempt: str) -> bool:
        """Whether an agent was given this attempt: by this hub, since it last began."""
        return attempt in self._asked

    def objection(self, run: ActiveRun, device: str) -> str:
        """Why what an agent made may not count any more; empty where it may."""
        return self._why_not(device, run.local_plan(device))

    def forget(self) -> None:
        """The round is over."""
        self._asked.clear()
