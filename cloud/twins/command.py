"""`headwater-hub twins`: what the hub knows of its devices, and how well it foretells them."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from cloud.explaining import ago
from cloud.twins.store import TwinRow, TwinStore
from federation.errors import ConfigError
from federation.protocol.clock import steady_clock
from twin.calibration import Calibration
from twin.exports import figures
from twin.shadow import is_in_sync, presence, staleness, wanting

PAGE = 1000


def twins(
    device: Annotated[str, typer.Argument(help="One device, in full; else all.")] = "",
    hub: Annotated[
        Path, typer.Option("--hub", help="The hub's file.", envvar="HEADWATER_HUB")
    ] = Path("hub.toml"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show the twins: what devices report, what is desired, what is forecast and how well."""
    from cloud.commands import read_hub

    config = read_hub(hub)
    if not config.database and not (config.folder / "hub.db").exists():
        raise ConfigError(
            f"no hub ever ran in {config.folder}; its record was expected there: "
            f"start it once with: headwater-hub serve {hub}"
        )
    store, now = TwinStore(config.database_url), steady_clock()()
    try:
        # A hub that is not running has left no end of its log unread for long.
        while store.follow(PAGE):
            pass
        rows = [store.twin(device)] if device else _all(store)
    finally:
        store.close()
    if as_json:
        shown: list[dict[str, Any]] = [_plain(row, now) for row in rows]
        text = msgspec.json.format(msgspec.json.encode({"twins": shown}), indent=2).decode()
        sys.stdout.write(text + "\n")
        return
    _print(twin_text(rows[0], now) if device else twins_table(rows, now))


def twins_table(rows: Sequence[TwinRow], now: float) -> RenderableType:
    """All twins, a line each."""
    if not rows:
        return Text("No device was heard of yet; run on each: headwater-agent run agent.toml")
    table = _table("DEVICE", "STATE", "WISHES", "ROUNDS", "IN TIME", "ERROR", "BRIER", "WEIGHT")
    for row in rows:
        model, record = row.model, row.model.calibration
        table.add_row(
            row.shadow.device,
            _state(row, now),
            _wishes(row),
            str(sum(model.outcomes.values())),
            f"{model.in_time.mean():.0%}" if model.in_time.count else "-",
            _share(record.median_error),
            _score(record.brier),
            f"{record.weight:.2f}",
        )
    return table


def twin_text(row: TwinRow, now: float) -> RenderableType:
    """One twin: its documents, how fresh they are, what is estimated, and how well."""
    shadow = row.shadow
    table = _table("FEATURE", "FRESH", "REPORTED")
    fresh = staleness(shadow, now)
    for name, value in shadow.reported.state.items():
        table.add_row(name, fresh.get(name, "-"), _compact(value))
    estimated = _table("ESTIMATED", "MEDIAN", "DEVIATION", "COUNT")
    for name, figure in _estimates(row):
        deviation = f"{figure['variance'] ** 0.5:.4g}"
        estimated.add_row(name, f"{figure['median']:.4g}", deviation, str(figure["count"]))
    parts: list[RenderableType] = [
        Text(f"{shadow.device}, revision {shadow.revision}: {_state(row, now)}"),
        Text(f"Desired (version {shadow.desired.version}): {_compact(shadow.desired.state)}"),
    ]
    if missing := wanting(shadow):
        parts.append(Text(f"Not in effect: {_compact(missing)}"))
    parts += [Text(), table, Text(), estimated, Text()]
    parts.append(Text(_judgement(row.model.calibration)))
    return Group(*parts)


def _judgement(record: Calibration) -> str:
    if not record.said:
        return "Nothing that it forecast has come to an end yet."
    bias = f"{record.bias:+.0%}" if record.bias is not None else "-"
    return (
        f"Of its last {len(record.said)} forecasts: median error {_share(record.median_error)}, "
        f"bias {bias}, Brier score {_score(record.brier)} (base rate {_score(record.base_brier)}); "
        f"it weighs {record.weight:.2f}"
    )


def _estimates(row: TwinRow) -> list[tuple[str, dict[str, Any]]]:
    found: list[tuple[str, dict[str, Any]]] = []
    for name, value in figures(row.model).items():
        if isinstance(value, dict) and "variance" in value:
            found.append((name, value))
        elif name == "seconds_per_sample":
            found += [(f"{name} {family}", figure) for family, figure in value.items()]
    return found


def _state(row: TwinRow, now: float) -> str:
    is_there, away_s = presence(row.shadow, now)
    state = row.shadow.reported.state.get("connection", {}).get("state", "unknown")
    return "there" if is_there else f"{state} for {ago(away_s).removesuffix(' ago')}"


def _wishes(row: TwinRow) -> str:
    if not row.shadow.desired.version:
        return "-"
    if not is_in_sync(row.shadow):
        return "waiting"
    return "in effect" if not wanting(row.shadow) else "in part"


def _plain(row: TwinRow, now: float) -> dict[str, Any]:
    shadow: dict[str, Any] = msgspec.to_builtins(row.shadow)
    return {**shadow, "freshness": staleness(row.shadow, now), "model": figures(row.model)}


def _all(store: TwinStore) -> list[TwinRow]:
    rows = store.twins(limit=PAGE)
    while rows and len(rows) % PAGE == 0:
        more = store.twins(rows[-1].shadow.device, PAGE)
        if not more:
            break
        rows += more
    return rows


def _compact(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


def _print(text: RenderableType) -> None:
    width = None if sys.stdout.isatty() else 1000
    console = Console(width=width, markup=False, emoji=False, highlight=False)
    with console.capture() as capture:
        console.print(text)
    lines = capture.get().splitlines()
    sys.stdout.write("\n".join(line.rstrip() for line in lines) + "\n")
