"""`headwater-sim`: run a scenario, compare variants of one, list those that come along."""

import sys
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from federation.errors import HeadwaterError
from simulations import data_command
from simulations.comparison.command import run_comparison
from simulations.demo.command import run_demo
from simulations.fitting_command import fit_fleet
from simulations.methods import show_methods
from simulations.peering_command import run_peers
from simulations.reporting.command import render_report
from simulations.run_command import run_scenario
from simulations.scenario import SHIPPED, shipped_scenarios
from simulations.swarm.command import run_swarm

app = typer.Typer(
    help="Simulate fleets that lose devices, links, the broker and the hub.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data_command.app, name="data")
app.command(name="run")(run_scenario)
app.command(name="demo")(run_demo)
app.command(name="compare")(run_comparison)
app.command(name="peers")(run_peers)
app.command(name="methods")(show_methods)
app.command(name="report")(render_report)
app.command(name="fit")(fit_fleet)
app.command(name="swarm")(run_swarm)


@app.command()
def scenarios(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
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
