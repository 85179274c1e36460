"""A swarm's time with a hub: from its birth through a run to what came of it, in figures."""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from statistics import median

import msgspec

from cloud.config import RunPlan
from federation.errors import LinkError
from federation.protocol.clock import steady_clock
from simulations.swarm.record import Audit, HubRecord, audit, swarm_plan
from simulations.swarm.swarm import Swarm, SwarmConfig, names_of, swarming
from simulations.swarm.tally import Tally
from simulations.swarm.training import Trainer

LOOK_EVERY_S = 0.5
"""How often the hub's record is asked how the run is; each look is work for its database."""

SETTLE_S = 15.0
"""How long the answers to the last updates of a run that is over are waited for."""


@dataclass(frozen=True, slots=True)
class Stay:
    """What the swarm is there for: a run of so many rounds, or (0) whatever comes meanwhile."""

    rounds: int
    update_bytes: float
    seconds: float
    trains: bool = False


class SwarmResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a swarm saw, and what the hub's record says of its run (None: it was not asked).

    `delay_s` has the median, the 95th percentile and the longest time from an assignment to the
    answer to its update. Letters and bytes are those of the run, up and down. `cpu_s` is what
    this process took meanwhile.
    """

    agents: int
    run: str = ""
    status: str = ""
    reason: str = ""
    asked: int
    finished: int
    verdicts: dict[str, int]
    unanswered: int
    drops: dict[str, int]
    connections: int
    refusals: dict[str, int]
    failures: dict[str, int]
    letters: tuple[int, int]
    mbytes: tuple[float, float]
    delay_s: tuple[float, float, float]
    wall_s: float
    cpu_s: float
    record: Audit | None = None


Progress = Callable[[Tally, int], None]
"""Told what the agents saw so far, and how many links are up; perhaps on another thread."""


async def live(
    config: SwarmConfig,
    trainer: Trainer,
    stay: Stay,
    record: HubRecord | None,
    on_progress: Progress,
) -> SwarmResult:
    """Bring the swarm up, live through its stay, and say what came of it.

    Raises:
        LinkError: the agents do not reach the broker or the hub, or the run is not over in time.
    """
    async with swarming(config, trainer) as swarm:
        if record is None or not stay.rounds:
            began = _Spent.now()
            await _take_part(swarm, stay.seconds, on_progress)
            return _result(config, swarm.tally, began)
        await _be_known(swarm, record, config.agents, stay.seconds)
        plan = _plan_for(config, stay)
        swarm.tally.forget_traffic()
        began = _Spent.now()
        record.store.request_run(plan)
        try:
            await _follow(swarm, record, plan.name, stay.seconds, on_progress)
        except asyncio.CancelledError:
            record.store.request_stop(plan.name)
            raise
        result = _result(config, swarm.tally, began)
        return _with_record(result, swarm.tally, record, plan.name)


@dataclass(frozen=True, slots=True)
class _Spent:
    """What this process had taken of time and of CPU at a moment, in seconds."""

    wall_s: float
    cpu_s: float

    @staticmethod
    def now() -> "_Spent":
        return _Spent(time.monotonic(), time.process_time())


async def _be_known(swarm: Swarm, record: HubRecord, agents: int, patience_s: float) -> None:
    names = set(names_of(agents))
    await swarm.wait_until(
        lambda: record.ready(names) == agents,
        f"birth of {agents} agents at the hub",
        patience_s=patience_s,
        asks_record=True,
    )


def _plan_for(config: SwarmConfig, stay: Stay) -> RunPlan:
    # Milliseconds: a hub never takes a second run of the same name.
    return swarm_plan(
        f"swarm-{int(steady_clock()() * 1000)}",
        agents=config.agents,
        rounds=stay.rounds,
        update_bytes=stay.update_bytes,
        trains=stay.trains,
        patience_s=stay.seconds,
    )


async def _take_part(swarm: Swarm, seconds: float, on_progress: Progress) -> None:
    give_up_at = time.monotonic() + seconds
    while time.monotonic() < give_up_at:
        on_progress(swarm.tally, swarm.linked)
        swarm.check_alive()
        await asyncio.sleep(min(LOOK_EVERY_S, max(0.0, give_up_at - time.monotonic())))


async def _follow(
    swarm: Swarm, record: HubRecord, run: str, patience_s: float, on_progress: Progress
) -> None:
    def is_over() -> bool:
        on_progress(swarm.tally, swarm.linked)
        return record.is_over(run)

    await swarm.wait_until(is_over, f"end of run {run}", patience_s=patience_s, asks_record=True)
    # The last answers are still on their way, and some agents on their way back to them.
    with suppress(LinkError):
        await swarm.wait_until(
            lambda: not swarm.tally.unanswered, "the last answers", patience_s=SETTLE_S
        )


def _result(config: SwarmConfig, tally: Tally, began: _Spent) -> SwarmResult:
    now, delays_s = _Spent.now(), tally.delays_s() or [0.0]
    return SwarmResult(
        agents=config.agents,
        asked=len(tally.journeys),
        finished=sum(journey.finished_at is not None for journey in tally.journeys.values()),
        verdicts=dict(tally.verdicts),
        unanswered=tally.unanswered,
        drops=dict(sorted(tally.drops.items())),
        connections=tally.connections,
        refusals=dict(tally.refusals.most_common(5)),
        failures=dict(tally.failures.most_common(5)),
        letters=(tally.letters_up, tally.letters_down),
        mbytes=(tally.bytes_up / 1e6, tally.bytes_down / 1e6),
        delay_s=(median(delays_s), delays_s[int(0.95 * (len(delays_s) - 1))], delays_s[-1]),
        wall_s=now.wall_s - began.wall_s,
        cpu_s=now.cpu_s - began.cpu_s,
    )


def _with_record(result: SwarmResult, tally: Tally, record: HubRecord, run: str) -> SwarmResult:
    status = record.store.run_status(run)
    return msgspec.structs.replace(
        result,
        run=run,
        status=status.status,
        reason=status.reason,
        record=audit(record.store.rounds(run), tally.promised(run)),
    )
