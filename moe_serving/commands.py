"""The verbs of `headwater-moe`: serve models, and show what there is to serve."""

import logging
import os
import random
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from federation.protocol.clock import steady_clock
from moe_serving.config import admin_token, data_token, read_moe_config
from moe_serving.repository import models, open_version, versions

app = typer.Typer(
    help="Big models at the hub: serve them to devices and people.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

UNFINISHED = 3
"""Exit code when the grace period was over before every accepted request was finished."""

Config = Annotated[Path, typer.Argument(help="The server's file, moe.toml.")]


@app.command()
def serve(
    config: Config = Path("moe.toml"),
    verbose: Annotated[bool, typer.Option("--verbose", help="Log each step.")] = False,
) -> None:
    """Serve the models of a repository until told to stop (SIGTERM or Ctrl-C).

    Exit code 0: everything accepted was finished; 3: the grace period was too short for that.
    """
    import torch

    from moe_serving.serving.server import MoeServer

    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    settings = read_moe_config(config)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    server = MoeServer(
        settings,
        data_token=data_token(),
        admin_token=admin_token(),
        broker_password=os.environ.get("HEADWATER_PASSWORD", ""),
        clock=steady_clock(),
        rng=random.Random(),  # noqa: S311 -- jitter
    )
    server.start()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop())
    served = ", ".join(f"{each.name} ({each.version})" for each in server.host.hosted())
    _say(f"serving {served or 'no model yet'} on {server.url}")
    raise typer.Exit(UNFINISHED if server.run() else 0)


@app.command()
def show(
    repository: Annotated[Path, typer.Argument(help="The folder that models were published in.")],
) -> None:
    """Show the models of a repository and check every byte of their newest versions."""
    for name in models(repository):
        found = open_version(repository, name)
        others = len(versions(repository, name)) - 1
        note = f", {found.about.note}" if found.about.note else ""
        _say(f"{name} {found.version} ({found.about.kind}{note}), {others} earlier")


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
