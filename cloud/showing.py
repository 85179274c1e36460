"""The hub's record as tables and sentences for a terminal."""

from rich.console import Group
from rich.table import Table
from rich.text import Text

from cloud.explaining import Explanation
from cloud.queries import DeviceRow, RunStatus


def runs_table(runs: list[RunStatus]) -> Table:
    """One row a run."""
    table = Table(title="Runs", title_justify="left")
    for name, justify in (("run", "left"), ("status", "left"), ("round", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type] # literal widened
    table.add_column("held-out", justify="right")
    table.add_column("up / down MB", justify="right")
    table.add_column("waits for")
    for run in runs:
        newest = run.evaluations[-1] if run.evaluations else None
        accuracy = f"{newest.correct / newest.samples:.1%}" if newest else "-"
        table.add_row(
            run.plan.name,
            run.status,
            f"{run.round}/{run.plan.rounds}",
            accuracy,
            f"{run.bytes_up / 1e6:.1f} / {run.bytes_down / 1e6:.1f}",
            run.wait.reason if run.status == "active" and run.wait else run.reason,
        )
    return table


def devices_table(devices: list[DeviceRow], now: float) -> Table:
    """One row a device."""
    table = Table(title="Devices", title_justify="left")
    for name in ("device", "state", "since", "task", "what of it"):
        table.add_column(name)
    for device in devices:
        task = device.task_status or "-"
        table.add_row(
            device.device,
            device.state,
            ago(now - device.changed_at),
            device.task or "-",
            f"{task}: {device.task_reason}" if device.task_reason else task,
        )
    return table


def explanation_text(explanation: Explanation) -> Group:
    """The answer to `why`, in sentences."""
    lines = [Text(f"Run {explanation.run} is {explanation.status}, round {explanation.round}.")]
    waits = f"It waits for: {explanation.waiting}"
    if explanation.remaining_s is not None:
        waits += f" (at most {explanation.remaining_s:.0f} s more)"
    lines.append(Text(waits))
    for title, entries in (
        ("Asked, and still open:", explanation.open),
        ("Asked in vain:", explanation.dropped),
        ("Not asked:", explanation.not_asked),
        ("Rounds that gave no model:", explanation.abandoned),
    ):
        if entries:
            lines.append(Text(title))
            lines += [Text(f"  {name}: {reason}") for name, reason in sorted(entries.items())]
    return Group(*lines)


def ago(seconds: float) -> str:
    """A time past in the largest unit that is not zero."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} s ago"

