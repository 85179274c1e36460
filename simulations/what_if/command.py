"""`headwater-hub what-if`: a forecast of a run that is not made, from the twins of a hub."""

import os
import sys
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from cloud.commands import HubOption, read_hub
from cloud.twins.store import TwinRow, TwinStore
from federation.config import read_config
from federation.protocol.clock import steady_clock
from simulations.what_if.forecasting import Answer, Spread, answer
from simulations.what_if.forking import Fork, fork, load_fork, save_fork
from simulations.what_if.futures import Future, play
from simulations.what_if.plan import WhatIf, read_paths


def what_if(
    plan: Annotated[Path, typer.Argument(help="The question's file: a run, and its changes.")],
    hub: HubOption = Path("hub.toml"),
    keep: Annotated[Path | None, typer.Option(help="Write the forked twins to this file.")] = None,
    forked: Annotated[
        Path | None, typer.Option("--fork", help="Ask these twins, which --keep wrote before.")
    ] = None,
    futures: Annotated[int, typer.Option(help="In place of the question's; 0: as it says.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Forecast a run: the hub's own rounds on a virtual clock, with twins as devices.

    Nothing of the hub changes. What a round takes comes out with its spread.
    """
    question = read_paths(read_config(plan, WhatIf), plan.parent)
    if futures:
        question = msgspec.structs.replace(question, futures=futures)
    made = load_fork(forked) if forked is not None else _fork(question, hub)
    if keep is not None:
        save_fork(made, keep)
    played = _played(question, made, quiet=as_json)
    said = answer(question, made, played)
    if as_json:
        text = msgspec.json.format(msgspec.json.encode(said), indent=2).decode()
        sys.stdout.write(text + "\n")
        return
    _show(said, made)


def _fork(question: WhatIf, hub: Path) -> Fork:
    store = TwinStore(read_hub(hub).database_url)
    try:
        while store.follow():
            pass
        at = steady_clock()() if question.at is None else question.at
        return fork(all_twins(store), store.fleet(), question, at=at, event=store.followed())
    finally:
        store.close()


def all_twins(store: TwinStore) -> list[TwinRow]:
    """Every twin of a hub, page by page."""
    rows = store.twins()
    while len(rows) % 1000 == 0 and rows and (more := store.twins(rows[-1].shadow.device)):
        rows += more
    return rows


def _played(question: WhatIf, made: Fork, *, quiet: bool) -> list[Future]:
    from rich.progress import Progress

    console = Console(stderr=True, quiet=quiet or not sys.stderr.isatty())
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("futures", total=question.futures)
        return play(question, made, lambda _: bar.advance(task))


def _show(said: Answer, made: Fork) -> None:
    table = Table("", "5 %", "median", "95 %", "mean")
    rows: tuple[tuple[str, Spread, float, str], ...] = (
        ("a round, s", said.round_s, 1.0, ".2f"),
        ("the run, s", said.run_s, 1.0, ".1f"),
        ("updates a round", said.counted, 1.0, ".1f"),
        ("up a round, MB", said.bytes_up, 1e-6, ".3f"),
        ("down a round, MB", said.bytes_down, 1e-6, ".3f"),
    )
    for name, each, scale, form in rows:
        values = (each.low, each.median, each.high, each.mean)
        table.add_row(name, *(format(value * scale, form) for value in values))
    console = Console()
    console.print(table)
    console.print(
        f"{said.futures} futures of {said.devices} devices: {said.closed:.1%} of rounds closed, "
        f"{said.finished:.1%} of runs finished"
    )
    for device, why in made.left_out.items():
        console.print(f"left out: {device}: {why}", markup=False)
    console.print(
        f"twins as of event {said.provenance.event}; question "
        f"{said.provenance.question_sha256[:12]}, seed {said.provenance.seed}"
    )
