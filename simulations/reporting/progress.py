"""How far a run is, live, on the error stream."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from simulations.report import RoundResult
from simulations.reporting.measures import percent, seconds

WIDE = 100
"""Columns a terminal must have for all that there is to tell."""


@contextmanager
def run_progress(
    name: str, rounds: int, *, quiet: bool, console: Console | None = None
) -> Iterator[Callable[[RoundResult], None]]:
    """Gives what to call with each round: a bar, or nothing where nobody looks.

    The bar has the round, accuracy and the time left, and on a wide terminal the virtual time,
    how many devices were asked so far and how many of them did not count.
    """
    console = console or Console(stderr=True)
    is_shown = console.is_terminal and not quiet
    with Progress(
        *_columns(is_wide=console.width >= WIDE),
        console=console,
        transient=True,
        refresh_per_second=4,
        disable=not is_shown,
    ) as bar:
        told: dict[str, Any] = {"accuracy": "", "devices": "", "virtual": ""}
        task = bar.add_task(escape(name), total=rounds, **told)
        asked = counted = 0

        def show(row: RoundResult) -> None:
            nonlocal asked, counted
            asked, counted = asked + row.asked, counted + len(row.devices)
            if row.accuracy is not None:
                told["accuracy"] = f"accuracy {percent(row.accuracy)}"
            told["devices"] = f"{asked} asked, {asked - counted} dropped"
            told["virtual"] = f"{seconds(row.closed_s)} simulated"
            bar.update(task, completed=row.round, refresh=False, **told)

        yield show


def _columns(*, is_wide: bool) -> list[ProgressColumn]:
    columns: list[ProgressColumn] = [
        TextColumn("{task.description}"),
        BarColumn(bar_width=None if is_wide else 10),
        MofNCompleteColumn(),
        TextColumn("{task.fields[accuracy]}"),
    ]
    if is_wide:
        columns += [TextColumn("{task.fields[devices]}"), TextColumn("{task.fields[virtual]}")]
    return [*columns, TimeRemainingColumn(compact=True), TextColumn("left")]
