"""What the demonstration shows: a live table while it runs, a plot and a summary at its end."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text

from cloud.record.queries import DeviceRow, RoundRow, RunStatus
from cloud.record.store import Store

_MARKS = {
    "received": "[green]done[/]",
    "training": "[cyan]trains[/]",
    "accepted": "[cyan]fetches[/]",
    "assigned": "[yellow]asked[/]",
    "lost": "[red]lost[/]",
    "cancelled": "[yellow]called off[/]",
}


def live_view(
    store: Store,
    status: RunStatus,
    rounds: Sequence[RoundRow],
    people: Mapping[str, str],
    story: Sequence[tuple[int, str]],
) -> Group:
    """The whole picture of one moment."""
    return Group(
        _headline(status, rounds),
        _devices(store.devices(), people),
        _rounds(store, rounds),
        *[Text(f"round {number:2d}: {line}", style="bold red") for number, line in story[-8:]],
    )


def accuracy_of(row: RoundRow) -> float | None:
    """What a round's model was measured to be on the held-out people; None until it is."""
    if not row.evaluations:
        return None
    newest = row.evaluations[-1]
    return newest.correct / newest.samples


def _headline(status: RunStatus, rounds: Sequence[RoundRow]) -> Text:
    known = [accuracy for row in rounds if (accuracy := accuracy_of(row)) is not None]
    held_out = f"{known[-1]:.1%}" if known else "not yet known"
    up, down = status.bytes_up / 1e6, status.bytes_down / 1e6
    line = (
        f"round {status.round} of {status.plan.rounds}   held-out people: {held_out}   "
        f"up {up:.1f} MB, down {down:.1f} MB"
    )
    if status.status == "active" and status.wait is not None:
        line += f"\n{status.wait.reason}"
    return Text(line, style="bold")


def _devices(devices: Sequence[DeviceRow], people: Mapping[str, str]) -> Table:
    table = Table(title="Devices", title_justify="left", expand=False)
    for name in ("device", "worn by", "link", "this round", "why"):
        table.add_column(name)
    for row in devices:
        mark = _MARKS.get(row.task_status or "", row.task_status or "-")
        link = "[green]up[/]" if row.state == "ready" else f"[red]{row.state}[/]"
        reason = row.task_reason or ""
        table.add_row(row.device, people.get(row.device, "?"), link, mark, reason)
    return table


def _rounds(store: Store, rounds: Sequence[RoundRow]) -> Table:
    table = Table(title="Rounds", title_justify="left", expand=False)
    for name in ("round", "updates", "held-out", "seconds", "dropped, and why"):
        table.add_column(name, justify="left" if name.startswith("dropped") else "right")
    for row in rounds[-6:]:
        accuracy = accuracy_of(row)
        table.add_row(
            str(row.number),
            f"{row.received}/{row.asked}",
            "-" if accuracy is None else f"{accuracy:.1%}",
            "..." if row.ended_at is None else f"{row.ended_at - row.opened_at:.1f}",
            dropped_in(store, row),
        )
    return table


def dropped_in(store: Store, row: RoundRow) -> str:
    """Who was asked in vain in a round or not asked, each with the reason."""
    gone = ("lost", "failed", "refused", "declined", "cancelled")
    told = [
        f"{attempt.device}: {attempt.reason or attempt.status}"
        for attempt in store.attempts(row.run, row.number)
        if attempt.status in gone
    ]
    told += [f"{name}: {why}" for name, why in store.excluded(row.run, row.number).items()]
    return "; ".join(told) or "-"


def round_line(store: Store, row: RoundRow) -> str:
    """One closed round as one line of text, for a log."""
    accuracy = accuracy_of(row)
    measured = "   ?  " if accuracy is None else f"{accuracy:6.1%}"
    return (
        f"round {row.number:2d}  {row.received:2d}/{row.asked:2d} updates  held-out {measured}  "
        f"dropped {dropped_in(store, row)}"
    )


def draw_plot(
    file: Path,
    rounds: Sequence[RoundRow],
    alone: Mapping[str, float],
    story: Sequence[tuple[int, str]],
) -> None:
    """Accuracy by round beside what devices reach alone, and when what befell the fleet."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    known = [(row.number, accuracy_of(row)) for row in rounds if row.evaluations]
    upper.plot([n for n, _ in known], [a for _, a in known], "o-", label="the fleet together")
    mean = sum(alone.values()) / len(alone)
    upper.axhspan(min(alone.values()), max(alone.values()), alpha=0.15, color="tab:orange")
    label = f"devices alone: mean {mean:.0%}, band from worst to best"
    upper.axhline(mean, color="tab:orange", label=label)
    upper.set(ylabel="accuracy on people nobody saw", ylim=(0, 1))
    upper.grid(visible=True, alpha=0.3)
    upper.legend(loc="lower right")
    lower.bar([row.number for row in rounds], [row.received for row in rounds], color="tab:blue")
    lower.set(xlabel="round", ylabel="updates", ylim=(0, 11), xlim=(0, len(rounds) + 1))
    for place, (number, line) in enumerate(story):
        upper.axvline(number, color="tab:red", linestyle=":", linewidth=1)
        at = 0.03 + 0.05 * (place % 10)
        upper.annotate(line, (number + 0.1, at), fontsize=7, color="tab:red")
    figure.savefig(file, dpi=120)


def summary(
    final: float, alone: Mapping[str, float], status: RunStatus, seconds: float, file: Path
) -> Table:
    """The result in a few lines."""
    mean, best = sum(alone.values()) / len(alone), max(alone.values())
    table = Table(title="Result", title_justify="left", show_header=False)
    table.add_row("the fleet together, on people nobody saw", f"[bold green]{final:.1%}[/]")
    table.add_row("devices alone, mean (best)", f"{mean:.1%} ({best:.1%})")
    table.add_row("gained by learning together", f"[bold]{100 * (final - mean):+.1f} points[/]")
    traffic = f"{status.bytes_up / 1e6:.1f} MB up, {status.bytes_down / 1e6:.1f} MB down"
    table.add_row("model bytes", traffic)
    table.add_row("training took", f"{seconds:.0f} s")
    table.add_row("plot", str(file))
    return table
