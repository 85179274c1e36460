"""`headwater-sim`: run a scenario, compare variants of one, list those that come along."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from federation.errors import HeadwaterError
from simulations.comparison.command import run_comparison
from simulations.data import command as data_command
from simulations.data.datasets import cache_folder
from simulations.demo.command import run_demo
from simulations.methods import show_methods
from simulations.peering_command import run_peers
from simulations.report import Result, RoundResult, as_builtins
from simulations.scenario import SHIPPED, Scenario, find_scenario, read_scenario, shipped_scenarios
from simulations.swarm.command import run_swarm

app = typer.Typer(
    help="Simulate fleets that lose devices, links, the broker and the hub.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data_command.app, name="data")
app.command(name="demo")(run_demo)
app.command(name="compare")(run_comparison)
app.command(name="peers")(run_peers)
app.command(name="methods")(show_methods)
app.command(name="swarm")(run_swarm)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and no progress.")]


@app.command()
def run(
    scenario: Annotated[str, typer.Argument(help="A TOML file, or the name of a shipped one.")],
    out: Annotated[Path, typer.Option(help="Folder for the result; made when absent.")],
    seed: Annotated[int | None, typer.Option(help="In place of the scenario's seed.")] = None,
    as_json: AsJson = False,
) -> None:
    """Run a scenario; leaves result.json, curves.png, events.jsonl and the model in --out."""
    plan = read_scenario(find_scenario(scenario))
    began_s = time.monotonic()
    result = _simulate(plan, out, seed, quiet=as_json)
    if as_json:
        sys.stdout.write(msgspec.json.encode(as_builtins(result)).decode() + "\n")
    else:
        _show(result, out, time.monotonic() - began_s)
    if result.status != "finished":
        raise typer.Exit(1)


@app.command()
def scenarios(as_json: AsJson = False) -> None:
    """List the scenarios that come along; those of peers are for `headwater-sim peers`."""
    shipped = {name: _about(path) for name, path in shipped_scenarios().items()}
    peers = {path.stem: path for path in sorted((SHIPPED / "peers").glob("*.toml"))}
    for name, path in peers.items():
        shipped[name] = f"{_about(path)} Run: headwater-sim peers {name} --out DIR"
    if as_json:
        sys.stdout.write(msgspec.json.encode(shipped).decode() + "\n")
        return
    table = Table("name", "what")
    for name, about in shipped.items():
        table.add_row(name, escape(about))
    Console().print(table)


def main() -> None:
    """The command; errors are one line on standard error, and exit code 2."""
    try:
        app(standalone_mode=True)
    except HeadwaterError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _simulate(plan: Scenario, out: Path, seed: int | None, *, quiet: bool) -> Result:
    import torch

    from simulations.simulation import simulate

    torch.set_num_threads(1)  # The models are small, and bits must not depend on the machine.
    with _progress(plan, quiet=quiet) as on_round:
        return simulate(plan, out, cache=cache_folder(os.environ), seed=seed, on_round=on_round)


@contextmanager
def _progress(plan: Scenario, *, quiet: bool) -> Iterator[Callable[[RoundResult], None]]:
    """Gives what to call with each round: a bar on the error stream, or nothing."""
    if quiet:
        yield lambda _: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(plan.run.name, total=plan.run.rounds)

        def show(row: RoundResult) -> None:
            accuracy = "" if row.accuracy is None else f" accuracy {row.accuracy:.3f}"
            bar.update(task, completed=row.round, description=f"{plan.run.name}{accuracy}")

        yield show


def _show(result: Result, out: Path, wall_s: float) -> None:
    rows = result.rounds
    asked, counted = sum(row.asked for row in rows), sum(len(row.devices) for row in rows)
    closed = sum(row.status == "closed" for row in rows)
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("run", f"{result.run.name}: {result.status} ({escape(result.reason)})")
    final = "none" if result.accuracy is None else f"{result.accuracy:.3f}"
    table.add_row("accuracy", f"{final} on held-out data, {result.initial_accuracy:.3f} untrained")
    table.add_row("rounds", f"{closed} closed, {len(rows) - closed} abandoned")
    table.add_row("updates", f"{counted} counted of {asked} asked for")
    for reason, count in list(result.drop_reasons.items())[:5]:
        table.add_row("", f"{count} not: {escape(reason)}")
    up, down = result.wire_up_bytes / 1e6, result.wire_down_bytes / 1e6
    table.add_row("traffic", f"{up:.1f} MB up, {down:.1f} MB down")
    table.add_row("time", f"{result.virtual_s:.1f} s simulated in {wall_s:.1f} s")
    table.add_row("files", escape(str(out)))
    Console().print(table)


def _about(path: Path) -> str:
    """The comment at the head of a scenario's file."""
    words = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        words.append(line.removeprefix("#").strip())
    return " ".join(words)


if __name__ == "__main__":
    main()
