"""`headwater-sim swarm`: load-test a hub with agents by the thousand."""

import asyncio
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from edge_agent.config import password
from federation.datasets.cached import cache_folder, load
from federation.errors import ConfigError
from federation.learning.data import LocalData
from federation.learning.partitions import iid_partition
from simulations.swarm import trial
from simulations.swarm.dropping import Dropping
from simulations.swarm.plan import SwarmPlan, read_swarm_plan
from simulations.swarm.record import Audit, HubRecord
from simulations.swarm.swarm import SwarmConfig, names_of
from simulations.swarm.tally import Tally
from simulations.swarm.training import Echo, RealTrainer, Trainer


def run_swarm(
    agents: Annotated[int, typer.Option(min=1, max=100_000, help="How many agents.")] = 100,
    broker: Annotated[str, typer.Option(help="mqtt://host:port (default: the hub's).")] = "",
    hub: Annotated[
        str, typer.Option(help="The hub's record: its hub.toml, or the database's URL.")
    ] = "",
    rounds: Annotated[int, typer.Option(min=0, help="Of the run to ask for (0: ask none).")] = 20,
    drop: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share that drops out of each round.")
    ] = 0.1,
    config: Annotated[
        Path | None, typer.Option(help="swarm.toml: trainer, update_kb, away_s, seed and so on.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Load-test a hub: real agents over real MQTT from one process, some dropping out.

    With --hub the swarm asks that hub for a run over all its agents, and compares the record of
    it with what the agents were told: exit code 1 where an update was lost or counted twice.
    Without, it takes part in whatever comes until its patience is over.
    """
    plan = read_swarm_plan(config)
    record = HubRecord(hub, plan.namespace) if hub else None
    try:
        swarm = SwarmConfig(
            agents=agents,
            broker=_broker(broker, record),
            namespace=(record.namespace if record is not None else plan.namespace) or "fleet",
            password=password(),
            keepalive_s=plan.keepalive_s,
            patience_s=plan.patience_s,
            heartbeat_s=plan.heartbeat_s,
            dropping=Dropping(share=drop, away_s=plan.away_s, seed=plan.seed),
            seed=plan.seed,
        )
        stay = trial.Stay(
            rounds, plan.update_kb * 1000, plan.patience_s, trains=plan.trainer == "real"
        )
        with _progress(agents * rounds if record is not None else 0, quiet=as_json) as show:
            work = trial.live(swarm, _trainer(plan, agents), stay, record, show)
            result = asyncio.run(work)
    finally:
        if record is not None:
            record.close()
    if as_json:
        sys.stdout.write(msgspec.json.encode(result).decode() + "\n")
    else:
        _show(result)
    if result.record is not None and not (result.status == "finished" and is_clean(result.record)):
        raise typer.Exit(1)


def is_clean(found: Audit) -> bool:
    """Whether nothing was lost and nothing counted twice."""
    return not found.lost and not found.double


def _broker(broker: str, record: HubRecord | None) -> str:
    address = broker or (record.broker if record is not None else "")
    if not address:
        raise ConfigError(
            "no broker is named, and no running hub tells of one; "
            "name it with --broker mqtt://host:port, or start the hub and name its file with --hub"
        )
    return address


def _trainer(plan: SwarmPlan, agents: int) -> Trainer:
    names = names_of(agents)
    if plan.trainer == "echo":
        return Echo({name: 1 + place for place, name in enumerate(names)})
    import torch

    torch.set_num_threads(1)  # The models are small, and the hub needs the other cores.
    digits = load("digits", cache=cache_folder(os.environ))
    if agents > len(digits.y):
        raise ConfigError(
            f"there are {len(digits.y)} digits for {agents} agents, and each needs one to train: "
            'ask for fewer agents, or for trainer = "echo"'
        )
    shares = iid_partition(len(digits.y), agents, np.random.default_rng(plan.seed))
    pairs = zip(names, shares, strict=True)
    return RealTrainer({name: LocalData(digits.x[each], digits.y[each]) for name, each in pairs})


@contextmanager
def _progress(updates: int, *, quiet: bool) -> Iterator[trial.Progress]:
    """Gives what to call while the swarm lives: a bar on the error stream, or nothing."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda _tally, _linked: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("connecting", total=updates or None)

        def show(tally: Tally, linked: int) -> None:
            about = f"round {tally.newest_round}, {linked} linked"
            bar.update(task, completed=tally.answers, description=about)

        yield show


def _show(result: trial.SwarmResult) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    if result.record is not None:
        _show_record(table, result, result.record)
    told = ", ".join(f"{count} {verdict}" for verdict, count in sorted(result.verdicts.items()))
    table.add_row("agents", f"{result.agents}, asked {result.asked} times, {told or 'no answers'}")
    if result.unanswered:
        table.add_row("", f"{result.unanswered} updates finished and never answered for")
    dropped = sum(result.drops.values())
    table.add_row("dropped out", f"{dropped} times, {result.connections} connections")
    middle_s, late_s, longest_s = result.delay_s
    table.add_row(
        "from task to answer",
        f"median {middle_s:.2f} s, 95 % within {late_s:.2f} s, longest {longest_s:.2f} s",
    )
    (up, down), (up_mb, down_mb) = result.letters, result.mbytes
    table.add_row("letters", f"{up} up with {up_mb:.1f} MB, {down} down with {down_mb:.1f} MB")
    table.add_row("this process", f"{result.cpu_s:.1f} s of CPU in {result.wall_s:.1f} s")
    for reason, count in [*result.failures.items(), *result.refusals.items()]:
        table.add_row("", f"{count} times: {escape(reason)}")
    Console().print(table)


def _show_record(table: Table, result: trial.SwarmResult, found: Audit) -> None:
    table.add_row("run", f"{result.run}: {result.status} ({escape(result.reason)})")
    abandoned = f", {found.rounds_abandoned} abandoned" if found.rounds_abandoned else ""
    table.add_row("rounds", f"{found.rounds_closed} closed{abandoned}")
    table.add_row("updates", f"{found.counted} counted of {found.asked} asked for")
    table.add_row("", f"{found.lost} lost, {found.double} double")
    table.add_row("rate", f"{found.updates_per_s:.0f} updates/s over {found.wall_s:.1f} s")
    if found.round_s:
        spans_s = sorted(found.round_s)
        middle_s = spans_s[len(spans_s) // 2]
        table.add_row("a round", f"median {middle_s:.2f} s, longest {spans_s[-1]:.2f} s")
