"""`headwater-sim demo`: the demonstration from its first process to its plot."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.live import Live

from cloud.config import BrokerConfig
from cloud.record.queries import RoundRow, RunStatus
from cloud.record.store import Store
from federation.datasets.cached import cache_folder, load
from federation.errors import HeadwaterError
from federation.protocol.clock import steady_clock
from simulations.demo import script as demo
from simulations.demo import view as demo_view
from simulations.demo.wrist import PLAN, SPEC, wrist_fleet
from simulations.processes import open_record

PATIENCE_S = 600.0
"""The whole run is given up after this; it usually takes about a minute."""

_AGAIN_S = 0.25


def run_demo(
    out: Annotated[Path, typer.Option(help="Where everything is written.")] = Path("out/demo"),
    rounds: Annotated[int, typer.Option(min=14, help="Rounds of training.")] = 20,
    broker: Annotated[Literal["auto", "mosquitto", "nats"], typer.Option()] = "auto",
) -> None:
    """Ten wrist sensors learn together over MQTT, while some are killed and come back."""
    console = Console()
    fleet = wrist_fleet(load("watch", cache=cache_folder(os.environ)))
    shutil.rmtree(out, ignore_errors=True)
    plan = demo.run_plan(SPEC, PLAN, rounds=rounds, held_out=(out / "held-out").resolve())
    began = time.monotonic()
    with demo.set_stage(out.resolve(), fleet, plan, BrokerConfig(kind=broker)) as stage:
        store = _bring_up(stage)
        status = _follow(stage, store, fleet.person_of, console)
        seconds = time.monotonic() - began
        rows = _when_measured(store, status)
        for row in rows[len(rows) - 4 :]:
            console.print(demo_view.round_line(store, row), markup=False, soft_wrap=True)
    console.print("each device alone, for as long ...")
    alone = demo.alone(fleet, SPEC, PLAN, rounds)
    _finish(out, rows, alone, stage, status, seconds, console)
    store.close()


def _bring_up(stage: demo.Stage) -> Store:
    """Start the hub, ask it for the run, and start all agents but the one that joins late."""
    stage.hub.start()
    deadline = time.monotonic() + 30.0
    while "hub is serving" not in stage.hub.last_words():
        demo.check_alive(stage)
        if time.monotonic() > deadline:
            raise HeadwaterError(f"the hub did not start within 30 s; see {stage.hub.log}")
        time.sleep(0.05)
    store = open_record(stage.hub_config)
    store.request_run(stage.plan)
    for device, agent in stage.agents.items():
        if device != demo.LATE:
            agent.start()
    return store


def _follow(stage: demo.Stage, store: Store, people: dict[str, str], console: Console) -> RunStatus:
    """Show what happens, and let happen what shall, until the run has ended."""
    clock, deadline = steady_clock(), time.monotonic() + PATIENCE_S
    shown: set[int] = set()
    told = 0
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while (status := store.run_status(demo.RUN)).status in ("requested", "active"):
            if time.monotonic() > deadline:
                raise HeadwaterError(f"not done after {PATIENCE_S:.0f} s; see {stage.hub.log}")
            demo.check_alive(stage)
            demo.befall(stage, store, status, clock())
            rows = store.rounds(demo.RUN)
            if console.is_terminal:
                view = demo_view.live_view(store, status, rows, people, stage.story)
                live.update(view, refresh=True)
            told = _log(stage, store, rows, shown, told, console)
            time.sleep(_AGAIN_S)
    _log(stage, store, store.rounds(demo.RUN), shown, told, console)
    if status.status != "finished":
        raise HeadwaterError(f"the run {status.status}: {status.reason}; see {stage.hub.log}")
    return status


def _log(
    stage: demo.Stage,
    store: Store,
    rows: list[RoundRow],
    shown: set[int],
    told: int,
    console: Console,
) -> int:
    """Leave a line behind for each thing that befell and each round that is over."""
    for number, line in stage.story[told:]:
        console.print(f"round {number:2d}  [bold red]{line}[/]")
    for row in rows:
        if row.status != "open" and row.number not in shown and (row.evaluations or row.reason):
            shown.add(row.number)
            console.print(demo_view.round_line(store, row), markup=False, soft_wrap=True)
    return len(stage.story)


def _when_measured(store: Store, status: RunStatus) -> list[RoundRow]:
    """The rounds, once the last model has been measured."""
    deadline = time.monotonic() + 60.0
    while time.monotonic() < deadline:
        rows = store.rounds(status.plan.name)
        if all(row.evaluations for row in rows if row.status == "closed"):
            return rows
        time.sleep(_AGAIN_S)
    raise HeadwaterError("the last model was not measured within 60 s; see the hub's log")


def _finish(
    out: Path,
    rows: list[RoundRow],
    alone: dict[str, float],
    stage: demo.Stage,
    status: RunStatus,
    seconds: float,
    console: Console,
) -> None:
    """Draw, write and print the result.

    Raises:
        HeadwaterError: something of the script did not happen, so this run shows too little.
    """
    accuracies = [demo_view.accuracy_of(row) for row in rows]
    final = [accuracy for accuracy in accuracies if accuracy is not None][-1]
    file = out / "accuracy.png"
    demo_view.draw_plot(file, rows, alone, stage.story)
    result = {"final": final, "by_round": accuracies, "alone": alone, "story": stage.story}
    (out / "result.json").write_text(json.dumps(result, indent=2))
    console.print(demo_view.summary(final, alone, status, seconds, file))
    if missing := demo.what_did_not_happen(stage):
        raise HeadwaterError(f"the run was over before: {', '.join(missing)}; give more --rounds")
