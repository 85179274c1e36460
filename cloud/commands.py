"""The verbs of `headwater-hub`: serve a fleet, start and stop runs, and ask how they are."""

import logging
import os
import random
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import msgspec
import typer
from rich.console import Console, RenderableType

from cloud import showing
from cloud.config import HubConfig, RunPlan
from cloud.explaining import explain
from cloud.holder import find_holder
from cloud.record.store import Store
from cloud.teaching_command import teach
from cloud.trainers.command import train
from cloud.twins.command import twins
from federation.config import read_config
from federation.errors import ConfigError
from federation.protocol.clock import steady_clock

app = typer.Typer(
    help="The hub of a fleet: rounds, record, broker.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

DEFAULT = Path("hub.toml")
VARIABLE = "HEADWATER_HUB"

HubArgument = Annotated[Path, typer.Argument(help="The hub's file.", envvar=VARIABLE)]
HubOption = Annotated[Path, typer.Option("--hub", help="The hub's file.", envvar=VARIABLE)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command()
def serve(
    config: HubArgument = DEFAULT,
    verbose: Annotated[bool, typer.Option("--verbose", help="Log each step.")] = False,
) -> None:
    """Run the hub until it is told to stop (SIGTERM or Ctrl-C)."""
    from cloud.serving import serving

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end_now)
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    # Alembic's own account of a migration is of no interest to who starts a hub.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    settings = read_hub(config)
    with serving(settings, clock=steady_clock(), rng=random.Random()) as (runner, broker_url):  # noqa: S311 -- jitter
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: runner.stop())
        _say(f"hub is serving namespace {settings.namespace!r} on {broker_url}")
        runner.run()


app.command()(train)
app.command()(twins)
app.command()(teach)


@app.command()
def start(
    plan: Annotated[Path, typer.Argument(help="The run's file, run.toml.")],
    hub: HubOption = DEFAULT,
) -> None:
    """Ask for a run; the hub opens it when the one before has ended."""
    config = read_hub(hub)
    run = _read_plan(plan, config)
    with _record(config, hub) as store:
        ahead = [r.plan.name for r in store.runs() if r.status in ("requested", "active")]
        store.request_run(run)
    _say(f"run {run.name!r} of {run.rounds} rounds is asked for; see: headwater-hub why {run.name}")
    if find_holder(config.folder) is None:
        _say(f"no hub is running here; it begins with: headwater-hub serve {hub}")
    elif ahead:
        _say(f"it begins after {', '.join(ahead)}")


@app.command()
def stop(run: str, hub: HubOption = DEFAULT) -> None:
    """Ask for the end of a run; the model of its last closed round stands."""
    config = read_hub(hub)
    with _record(config, hub) as store:
        store.request_stop(run)
    when = "soon" if find_holder(config.folder) else "when the hub is running again"
    _say(f"run {run!r} is asked to stop, and will {when}")


@app.command()
def status(hub: HubOption = DEFAULT, as_json: Json = False) -> None:
    """Show the hub, its runs and its devices."""
    config = read_hub(hub)
    holder = find_holder(config.folder)
    with _record(config, hub) as store:
        found = showing.Status(hub=holder, runs=store.runs(), devices=store.devices())
    _show(found, showing.status_text(found, steady_clock()()), as_json=as_json)


@app.command()
def why(run: str, hub: HubOption = DEFAULT, as_json: Json = False) -> None:
    """Say why a run waits, and why devices were not asked or dropped out."""
    config = read_hub(hub)
    holder = find_holder(config.folder)
    with _record(config, hub) as store:
        found = explain(store, run, holder, steady_clock()())
    _show(found, showing.explanation_text(found), as_json=as_json)


def _end_now(*_: object) -> NoReturn:
    """Nothing is served yet: end, and take down what has come up so far."""
    sys.exit(0)


def read_hub(path: Path) -> HubConfig:
    """The hub's configuration in this file, its folder resolved.

    Raises:
        ConfigError: no such file, or something wrong in it.
    """
    if not path.exists():
        raise ConfigError(
            f"there is no hub's file {path}; a TOML file was expected, and an empty one will do: "
            f"name it with --hub or {VARIABLE}, or change to its folder"
        )
    config = read_config(path, HubConfig)
    return msgspec.structs.replace(config, folder=(path.parent / config.folder).resolve())


def _read_plan(path: Path, hub: HubConfig) -> RunPlan:
    """The plan in a file, so checked that the hub can begin with it."""
    plan = read_config(path, RunPlan)
    if plan.evaluation is not None:
        folder = (path.parent / plan.evaluation).resolve()
        plan = msgspec.structs.replace(plan, evaluation=folder)
    try:
        _check_plan(plan, hub)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return plan


def _check_plan(plan: RunPlan, hub: HubConfig) -> None:
    from federation.learning.models import sizes_of

    sizes_of(plan.model)
    # A record on another machine is of a hub that may have the folder where we do not.
    if plan.evaluation is not None and not hub.database and not plan.evaluation.is_dir():
        raise ConfigError(
            f"evaluation {plan.evaluation} is not a folder; one with .npz or .csv files was "
            "expected: create it, or leave the key out"
        )


@contextmanager
def _record(config: HubConfig, hub: Path) -> Iterator[Store]:
    if not config.database and not (config.folder / "hub.db").exists():
        raise ConfigError(
            f"no hub ever ran in {config.folder}; its record was expected there: "
            f"start it once with: headwater-hub serve {hub}"
        )
    store = Store(config.database_url)
    try:
        yield store
    finally:
        store.close()


def _show(value: Any, text: RenderableType, *, as_json: bool) -> None:
    if as_json:
        encoded = msgspec.json.encode(value, enc_hook=str)
        _say(msgspec.json.format(encoded, indent=2).decode())
        return
    # A pipe has no width: whoever reads it wants each line whole. No markup: devices gave words.
    width = None if sys.stdout.isatty() else 1000
    console = Console(width=width, markup=False, emoji=False, highlight=False)
    with console.capture() as capture:
        console.print(text)
    _say("\n".join(line.rstrip() for line in capture.get().splitlines()))


def _say(line: str) -> None:
    try:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our words has gone, as `head` does; Python shall not try again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
