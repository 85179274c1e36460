"""`headwater-sim peers`: run a scenario of peers without a hub."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from federation.datasets.cached import cache_folder
from federation.errors import ConfigError

if TYPE_CHECKING:
    from simulations.peering import PeerResult


def run_peers(
    scenario: Annotated[str, typer.Argument(help="A TOML file, or the name of a shipped one.")],
    out: Annotated[Path, typer.Option(help="Folder for result.json; made when absent.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Run peers without a hub: honest, liars, concepts, or a scenario of your own."""
    import torch

    from simulations.peering import PeerRound, read_peer_scenario, simulate_peers

    torch.set_num_threads(1)  # The models are small, and bits must not depend on the machine.
    plan = read_peer_scenario(scenario)
    console = Console(stderr=True)

    def show(row: PeerRound) -> None:
        if console.is_terminal and not as_json:
            console.print(f"round {row.round}: accuracy {row.accuracy:.3f}", end="\r")

    try:
        out.mkdir(parents=True, exist_ok=True)
        result = simulate_peers(plan, cache=cache_folder(os.environ), on_round=show)
        text = msgspec.json.format(msgspec.json.encode(result)).decode()
        (out / "result.json").write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot write to {out}: {error.strerror}; give another folder with --out"
        ) from error
    if as_json:
        sys.stdout.write(msgspec.json.encode(result).decode() + "\n")
    else:
        _show(result)
    if not result.is_finished:
        raise typer.Exit(1)


def _show(result: "PeerResult") -> None:
    table = Table("round", "accuracy", "worst", "foreign mass")
    for row in result.rounds[-5:]:
        table.add_row(
            str(row.round), f"{row.accuracy:.3f}", f"{row.worst:.3f}", f"{row.foreign_mass:.3f}"
        )
    Console().print(table)
