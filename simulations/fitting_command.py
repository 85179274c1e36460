"""`headwater-sim fit`: a scenario whose devices are as the hub of a real fleet saw them."""

import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cloud.config import RunPlan
from federation.errors import ConfigError
from simulations.observing import Observed, read_hub
from simulations.replaying import delay_range_s
from simulations.scenario import Scenario
from simulations.tables import DeviceClass, DevicePlan, FleetPlan, LinkPlan
from twin.fitting import FIGURES, DeviceFit, Figure, Part, completed, fit_device
from twin.fitting import fit_fleet as fit_all

MAX_CLASSES = 64
"""Where more devices than these were seen, those that are alike in speed share a class."""

_HEADINGS = {
    "seconds_per_step": ("step, ms", 1e3),
    "seconds_per_sample": ("sample, ms", 1e3),
    "overhead_s": ("overhead, ms", 1e3),
    "start_s": ("start, s", 1.0),
    "delay_s": ("delay, ms", 1e3),
    "down_bps": ("down, Mbit/s", 1e-6),
    "up_bps": ("up, Mbit/s", 1e-6),
    "away_s": ("away, s", 1.0),
}
"""What each figure is called, and what it is multiplied by to be shown."""


def fit_fleet(
    hub: Annotated[Path, typer.Argument(help="The folder of a hub: where its hub.db is.")],
    out: Annotated[Path, typer.Option(help="The scenario's file, to be written.")],
    run: Annotated[str, typer.Option(help="Which run of the hub. [default: the last]")] = "",
    data: Annotated[
        str,
        typer.Option(
            help="What the simulated devices hold: a set, or a folder of samples. "
            "[default: the samples that the hub measures models on]"
        ),
    ] = "",
    devices: Annotated[
        int, typer.Option(min=0, help="How many devices to simulate; 0: as many as were seen.")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Fit devices to what a hub has seen of them, and write a scenario of devices like these.

    Prints each figure with its standard error and how many observations it rests on; what the
    log does not tell is left out, and said.
    """
    plan, seen = read_hub(hub, run)
    fits = fit_all(seen.parts, seen.absences)
    fleet = fit_device("fleet", seen.parts, seen.absences)
    scenario = fitted_scenario(plan, seen, data=data, devices=devices)
    _write(out, scenario, fleet, hub)
    if as_json:
        said: dict[str, Any] = {
            "scenario": str(out),
            "devices": [_as_builtins(fit) for fit in fits.values()],
        }
        said["fleet"] = _as_builtins(fleet)
        sys.stdout.write(msgspec.json.encode(said).decode() + "\n")
        return
    console = Console()
    console.print(_table([*fits.values(), fleet]))
    for name, why in fleet.missing.items():
        console.print(f"{name} is not told: {escape(why)}", soft_wrap=True)
    if fleet.disbelieved:
        console.print(f"{fleet.disbelieved} trainings were left out: their reports cannot be")
    console.print(f"scenario of {scenario.fleet.devices} devices: {escape(str(out))}")


def fitted_scenario(plan: RunPlan, seen: Observed, *, data: str = "", devices: int = 0) -> Scenario:
    """The run again with a fleet whose classes are the devices that were seen.

    Each device holds as many samples as half of them had at least, drawn from `data`, or from
    what the hub measures models on: then times mean what they say, and accuracy does not. A
    training's overhead is spread over the steps of this plan; a trainer's start, which a run
    sees once, is left out.

    Raises:
        ConfigError: no device finished a training, so that nothing is known of any; or there
            are no data to take.
    """
    groups = _groups(seen.parts)
    if not groups:
        raise ConfigError(
            f"no device finished a training of run {plan.name!r} that can be believed; "
            "let a round or two close, and fit again"
        )
    fleet = fit_device("fleet", seen.parts, seen.absences)
    low_s, high_s = delay_range_s(fleet.delay_s)
    whole = sum(len(names) for names in groups)
    classes = []
    for names in groups:
        parts = [part for part in seen.parts if part.device in names]
        fit = completed(fit_device(names[0], parts), fleet)
        level = max(seen.levels.get(name, 0) for name in names)
        classes.append(_class(fit, parts, len(names) / whole, level))
    return Scenario(
        run=plan,
        fleet=_fleet_plan(plan, seen, data, devices or whole),
        link=LinkPlan(delay_s=(_short(low_s), _short(high_s))),
        device=DevicePlan(classes=tuple(classes)),
        seed=plan.seed,
    )


def _as_builtins(fit: DeviceFit) -> dict[str, Any]:
    """A fit with the error of each figure beside it."""
    said: dict[str, Any] = msgspec.to_builtins(fit)
    for name in FIGURES:
        if (figure := getattr(fit, name)) is not None:
            said[name]["error"] = figure.error
    return said


def _fleet_plan(plan: RunPlan, seen: Observed, data: str, devices: int) -> FleetPlan:
    held = sorted(part.samples for part in seen.parts if part.received_at is not None)
    samples = max(held[len(held) // 2], 1)
    folder = Path(data) if data else plan.evaluation
    if folder is not None and folder.is_dir():
        return FleetPlan(
            devices=devices, folder=folder.resolve(), samples=samples, partition="drawn"
        )
    if not data:
        raise ConfigError(
            f"run {plan.name!r} has no held-out data here, and devices must hold something; "
            "name a set or a folder with --data"
        )
    return FleetPlan(devices=devices, data=data, samples=samples, partition="drawn")


def _class(fit: DeviceFit, parts: Sequence[Part], share: float, level: int) -> DeviceClass:
    steps = sorted(part.steps for part in parts if part.received_at is not None)
    usual = max(steps[len(steps) // 2], 1) if steps else 1
    step_s = _value(fit.seconds_per_step) + _value(fit.overhead_s) / usual
    return DeviceClass(
        share=share,
        level=level,
        step_s=_short(step_s),
        up_bps=_short(fit.up_bps.value) if fit.up_bps else None,
        down_bps=_short(fit.down_bps.value) if fit.down_bps else None,
    )


def _groups(parts: Sequence[Part]) -> list[list[str]]:
    """The devices that trained, quickest first, in as many groups as there may be classes."""
    fits = fit_all([part for part in parts if part.received_at is not None])
    known = {n: f.seconds_per_step.value for n, f in fits.items() if f.seconds_per_step}
    names = sorted(known, key=lambda name: (known[name], name))
    count = min(len(names), MAX_CLASSES)
    edges = [round(place * len(names) / count) for place in range(count + 1)] if count else [0]
    return [names[low:high] for low, high in pairwise(edges)]


def _write(out: Path, scenario: Scenario, fleet: DeviceFit, hub: Path) -> None:
    seen = fleet.seconds_per_step.count if fleet.seconds_per_step else 0
    lines = [
        f"# Devices as the hub of {hub} saw them in run {scenario.run.name!r}: {seen} trainings.",
        "# A trainer's start is not in it, and neither are the samples that they held.",
    ]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes("\n".join(lines).encode() + b"\n\n" + msgspec.toml.encode(_told(scenario)))
    except OSError as error:
        raise ConfigError(
            f"cannot write {out}: {error.strerror}; give another file with --out"
        ) from error


def _told(value: Any) -> Any:
    """A record as a table of what differs from its defaults."""
    if isinstance(value, msgspec.Struct):
        given = {
            each.name: getattr(value, each.name)
            for each in msgspec.structs.fields(value)
            if getattr(value, each.name) != each.default
        }
        return {name: _told(item) for name, item in given.items() if item is not None}
    if isinstance(value, Mapping):
        return {key: _told(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_told(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _table(fits: Sequence[DeviceFit]) -> Table:
    shown = [name for name in FIGURES if any(getattr(fit, name) for fit in fits)]
    table = Table("device", caption="median ± its standard error (observations)")
    for name in shown:
        table.add_column(_HEADINGS[name][0], justify="right")
    for fit in fits:
        cells = [_cell(getattr(fit, name), _HEADINGS[name][1]) for name in shown]
        table.add_row(escape(fit.device), *cells)
    return table


def _cell(figure: Figure | None, unit: float) -> str:
    if figure is None:
        return "-"
    error = "" if figure.error is None else f" ± {figure.error * unit:.2g}"
    return f"{figure.value * unit:.4g}{error} ({figure.count})"


def _value(figure: Figure | None) -> float:
    return figure.value if figure else 0.0


def _short(value: float) -> float:
    return float(f"{value:.5g}")
