"""`headwater-sim run`: one scenario, in one process or several, resumable at any moment."""

import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from federation.datasets.cached import cache_folder
from federation.errors import ConfigError
from federation.protocol.codec import digest_of
from simulations.fleet import FleetData, fleet_data
from simulations.report import Result, as_builtins, as_json, versions
from simulations.reporting.progress import run_progress
from simulations.scenario import Scenario, find_scenario, read_scenario
from simulations.simulation import simulate, trainer_of
from simulations.workshop import InProcess, Processes, RayWorkshop, Remembered


def run_scenario(
    scenario: Annotated[str, typer.Argument(help="A TOML file, or the name of a shipped one.")],
    out: Annotated[Path, typer.Option(help="Folder for the result; made when absent.")],
    seed: Annotated[int | None, typer.Option(help="In place of the scenario's seed.")] = None,
    workers: Annotated[
        str,
        typer.Option(help="How many processes train; or 'ray', or the address of a Ray cluster."),
    ] = "1",
    exact: Annotated[
        bool, typer.Option("--exact", help="The bits of real devices, not within 1e-5 of them.")
    ] = False,
    resumable: Annotated[
        bool, typer.Option(help="Keep a journal in --out, so that a killed run can go on.")
    ] = True,
    as_json_only: Annotated[
        bool, typer.Option("--json", help="Print one JSON object and no progress.")
    ] = False,
) -> None:
    """Run a scenario; begun again after Ctrl-C or a kill, it goes on where it was.

    Leaves result.json, curves.png, attempts.csv, fleet.npy, events.jsonl and the model in --out.
    See them with: headwater-sim report DIR
    """
    import torch

    torch.set_num_threads(1)  # The models are small, and bits must not depend on the machine.
    plan = read_scenario(find_scenario(scenario))
    plan = plan if seed is None else msgspec.structs.replace(plan, seed=seed)
    began_s = time.monotonic()
    data = fleet_data(plan, cache=cache_folder(os.environ))
    place = _Place(workers, exact=exact)
    with run_progress(plan.run.name, plan.run.rounds, quiet=as_json_only) as on_round:
        if resumable:
            workshop = Remembered(place.open(plan, data), out, owner=_owner(plan, place))
            result = simulate(
                plan, out, cache=Path(), data=data, workshop=workshop, on_round=on_round
            )
            workshop.forget()
        else:
            inside = place.open(plan, data, in_place=plan.shares_memory)
            result = simulate(
                plan, out, cache=Path(), data=data, workshop=inside, on_round=on_round
            )
            inside.close()
    if as_json_only:
        sys.stdout.write(msgspec.json.encode(as_builtins(result)).decode() + "\n")
    else:
        _show(result, out, time.monotonic() - began_s)
    if result.status != "finished":
        raise typer.Exit(1)


class _Place:
    """Where the trainings are done.

    Raises:
        ConfigError: it is neither a number from 1 on, nor Ray, nor an address.
    """

    def __init__(self, workers: str, *, exact: bool) -> None:
        self.exact = exact
        self._address = workers if ":" in workers else None
        self._is_ray = workers == "ray" or self._address is not None
        if not self._is_ray and not (workers.isdecimal() and int(workers) >= 1):
            raise ConfigError(
                f"--workers is {workers!r}; expected a number from 1 on, 'ray', or the address "
                "of a Ray cluster such as ray://host:10001"
            )
        self._workers = (os.cpu_count() or 1) if self._is_ray else int(workers)

    def open(
        self, plan: Scenario, data: FleetData, *, in_place: bool = False
    ) -> InProcess | Processes | RayWorkshop:
        train, held = trainer_of(plan, data), data.devices
        if self._is_ray:
            return RayWorkshop(
                held, workers=self._workers, address=self._address, exact=self.exact, train=train
            )
        if self._workers > 1:
            return Processes(held, workers=self._workers, exact=self.exact, train=train)
        return InProcess(held, exact=self.exact, train=train, accelerator="auto", in_place=in_place)


def _owner(plan: Scenario, place: _Place) -> str:
    """Names all that decides the bits of a run."""
    decides = [as_json(plan), as_json(versions()), str(place.exact).encode()]
    return f"{plan.run.name}, seed {plan.seed}, settings {digest_of(b' '.join(decides))[:16]}"


def _show(result: Result, out: Path, wall_s: float) -> None:
    rows = result.rounds
    asked, counted = sum(row.asked for row in rows), sum(len(row.devices) for row in rows)
    fates = Counter(row.status for row in rows)
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("run", f"{result.run.name}: {result.status} ({escape(result.reason)})")
    final = "none" if result.accuracy is None else f"{result.accuracy:.3f}"
    table.add_row("accuracy", f"{final} on held-out data, {result.initial_accuracy:.3f} untrained")
    table.add_row("rounds", f"{fates['closed']} closed, {fates['abandoned']} abandoned")
    table.add_row("updates", f"{counted} counted of {asked} asked for")
    for reason, count in list(result.drop_reasons.items())[:5]:
        table.add_row("", f"{count} not: {escape(reason)}")
    up, down = result.wire_up_bytes / 1e6, result.wire_down_bytes / 1e6
    table.add_row("traffic", f"{up:.1f} MB up, {down:.1f} MB down")
    if energy_j := sum(row.energy_j for row in rows):
        table.add_row("energy", f"{energy_j / 1e3:.2f} kJ on devices")
    table.add_row("time", f"{result.virtual_s:.1f} s simulated in {wall_s:.1f} s")
    table.add_row("files", escape(str(out)))
    table.add_row("", f"a page of it: headwater-sim report {escape(str(out))}")
    Console().print(table)
