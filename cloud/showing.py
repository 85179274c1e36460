"""The hub's record as tables and sentences for a terminal."""

from collections.abc import Mapping
from typing import Any, Literal

import msgspec
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from cloud.coordination.run import parse_attempt
from cloud.explaining import Explanation, absences, ago
from cloud.holder import Holder
from cloud.record.queries import DeviceRow, RunStatus

MANY = 20
"""A list of devices or rounds longer than this is cut; `--json` has them all."""


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """What `headwater-hub status` says; `hub` is the hub at work, none if none is."""

    hub: Holder | None
    runs: list[RunStatus]
    devices: list[DeviceRow]


def status_text(status: Status, now: float) -> Group:
    """The hub, its runs, its devices."""
    parts: list[RenderableType] = [_hub_line(status.hub, now), Text()]
    if status.runs:
        parts.append(_runs_table(status.runs))
    else:
        parts.append(Text("No run was asked for yet; ask with: headwater-hub start run.toml"))
    parts.append(Text())
    if status.devices:
        parts.append(_devices_table(status.devices, status.hub, now))
    else:
        parts.append(
            Text("No device was heard of yet; run on each: headwater-agent run agent.toml")
        )
    return Group(*parts)


def _hub_line(hub: Holder | None, now: float) -> Text:
    if hub is None:
        return Text("Hub is not running; this is how it left things. Start it: headwater-hub serve")
    return Text(f"Hub is running (process {hub.pid}, started {ago(now - hub.since)}); {hub.broker}")


def _table(*columns: tuple[str, Literal["left", "right"]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name, justify in columns:
        table.add_column(name, justify=justify, overflow="fold")
    return table


def _runs_table(runs: list[RunStatus]) -> Table:
    table = _table(
        ("RUN", "left"),
        ("STATUS", "left"),
        ("ROUND", "right"),
        ("ACCURACY", "right"),
        ("MB UP", "right"),
        ("MB DOWN", "right"),
        ("WHY", "left"),
    )
    for run in runs:
        accuracy = f"{run.accuracy:.1%}" if run.accuracy is not None else "-"
        table.add_row(
            run.plan.name,
            run.status,
            f"{run.round}/{run.plan.rounds}",
            accuracy,
            f"{run.bytes_up / 1e6:.1f}",
            f"{run.bytes_down / 1e6:.1f}",
            _why_in_short(run),
        )
    return table


def _why_in_short(run: RunStatus) -> str:
    if run.status == "requested":
        return "waits for its turn"
    if run.status == "active":
        return run.wait.reason if run.wait is not None else ""
    return run.reason


def _devices_table(devices: list[DeviceRow], hub: Holder | None, now: float) -> Table:
    table = _table(
        ("DEVICE", "left"), ("STATE", "left"), ("SINCE", "left"), ("TASK", "left"), ("WHY", "left")
    )
    absent = absences(devices, hub) if hub is not None else {}
    for device in devices:
        doing = f" ({device.task_status})" if device.task_status else ""
        table.add_row(
            device.device,
            device.state,
            ago(now - device.changed_at),
            f"{_task(device.task)}{doing}",
            device.task_reason or absent.get(device.device, ""),
        )
    return table


def _task(attempt: str | None) -> str:
    parsed = parse_attempt(attempt) if attempt is not None else None
    return f"{parsed[0]}, round {parsed[1]}" if parsed is not None else "-"


def explanation_text(explanation: Explanation) -> Group:
    """The answer to `why`, in sentences."""
    waits = f"It waits for {explanation.waiting}"
    if explanation.remaining_s is not None:
        waits += f" (at most {explanation.remaining_s:.0f} s more)"
    run, number, rounds = explanation.run, explanation.round, explanation.rounds
    parts: list[RenderableType] = [
        Text(f"Run {run} is {explanation.status}: round {number} of {rounds}."),
        Text(f"{waits}."),
    ]
    if explanation.advice:
        parts.append(Text(explanation.advice))
    if explanation.received:
        parts.append(Text(f"Received in round {number}: {_cut_names(explanation.received)}"))
    parts += _section(f"Still open in round {number}", explanation.open)
    parts += _section(f"Asked in vain in round {number}", explanation.dropped)
    parts += _section(f"Not asked in round {number}", explanation.not_asked)
    parts += _section("Not there now", explanation.not_there)
    parts += _section("Dropped out of rounds shortly before", explanation.fell_out)
    parts += _section("Rounds that gave no model", explanation.abandoned, newest_first=True)
    return Group(*parts)


def _section(
    title: str, entries: Mapping[str, str], *, newest_first: bool = False
) -> list[RenderableType]:
    if not entries:
        return []
    items = sorted(entries.items(), key=lambda item: int(item[0]) if newest_first else item[0])
    shown: list[tuple[str, str]] = (items[::-1] if newest_first else items)[:MANY]
    table: Any = Table.grid(padding=(0, 2))
    for name, reason in shown:
        table.add_row(name, reason)
    if len(items) > len(shown):
        table.add_row("...", f"and {len(items) - len(shown)} more: see --json")
    return [Text(), Text(f"{title}:"), Padding(table, (0, 0, 0, 2))]


def _cut_names(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - MANY} more" if len(names) > MANY else ""
    return ", ".join(names[:MANY]) + more
