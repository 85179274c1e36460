"""`headwater-hub`: serve a fleet, start and stop runs, and ask how they are."""

import logging
import os
import random
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console

from cloud import showing
from cloud.config import HubConfig, RunPlan
from cloud.explaining import explain
from cloud.store import Store
from federation.config import read_config
from federation.errors import HeadwaterError
from federation.protocol.clock import steady_clock

app = typer.Typer(
    help="The hub of a fleet: rounds, record, broker.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

HubFile = Annotated[Path, typer.Option("--hub", help="The hub.toml of the hub that is meant.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command()
def serve(
    config: Annotated[Path, typer.Argument(help="The hub.toml.")],
    verbose: Annotated[bool, typer.Option(help="Log each step to standard error.")] = False,
) -> None:
    """Run the hub until it is told to stop (SIGTERM or Ctrl-C)."""
    from cloud.serving import serving

    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    # Alembic's own account of a migration is of no interest to who starts a hub.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    settings = _read_hub(config)
    with serving(settings, clock=steady_clock(), rng=random.Random()) as (runner, broker_url):  # noqa: S311 -- jitter
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: runner.stop())
        sys.stdout.write(f"hub is serving namespace {settings.namespace!r} on {broker_url}\n")
        sys.stdout.flush()
        runner.run()


@app.command()
def start(plan: Annotated[Path, typer.Argument(help="The run.toml.")], hub: HubFile) -> None:
    """Ask for a run; the hub opens it when the one before has ended."""
    run = _read_plan(plan)
    _store(hub).request_run(run)
    sys.stdout.write(f"run {run.name!r} of {run.rounds} rounds is asked for\n")


@app.command()
def stop(run: str, hub: HubFile) -> None:
    """Ask for the end of a run; the model of its last closed round stands."""
    _store(hub).request_stop(run)
    sys.stdout.write(f"run {run!r} is asked to stop\n")


@app.command()
def status(hub: HubFile, as_json: Json = False) -> None:
    """Show runs and devices."""
    store = _store(hub)
    runs, devices = store.runs(), store.devices()
    if as_json:
        _print_json({"runs": runs, "devices": devices})
        return
    console = Console()
    console.print(showing.runs_table(runs))
    console.print(showing.devices_table(devices, steady_clock()()))


@app.command()
def why(run: str, hub: HubFile, as_json: Json = False) -> None:
    """Say why a run waits, and why devices were not asked or dropped out."""
    explanation = explain(_store(hub), run, steady_clock()())
    if as_json:
        _print_json(explanation)
        return
    Console().print(showing.explanation_text(explanation))


def main() -> None:
    """The command line. Exit code 0: done; 2: something the user can mend."""
    try:
        app()
    except HeadwaterError as error:
        sys.stderr.write(f"headwater-hub: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _read_hub(path: Path) -> HubConfig:
    config = read_config(path, HubConfig)
    return msgspec.structs.replace(config, folder=(path.parent / config.folder).resolve())


def _read_plan(path: Path) -> RunPlan:
    plan = read_config(path, RunPlan)
    if plan.evaluation is None:
        return plan
    return msgspec.structs.replace(plan, evaluation=(path.parent / plan.evaluation).resolve())


def _store(hub: Path) -> Store:
    config = _read_hub(hub)
    if not config.database and not (config.folder / "hub.db").exists():
        raise HeadwaterError(
            f"no record in {config.folder}; start the hub once with: headwater-hub serve {hub}"
        )
    return Store(config.database_url)


def _print_json(value: Any) -> None:
    sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(value), indent=2))
    sys.stdout.buffer.write(os.linesep.encode())


if __name__ == "__main__":
    main()
