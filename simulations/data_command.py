"""`headwater-sim data`: lists the data sets and brings one into the cache."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from rich.table import Table

from federation.datasets.cached import cache_folder, cached_file, fetch
from federation.datasets.catalogue import CATALOGUE, Entry, find_entry
from federation.datasets.fetching import Progress as OnProgress
from federation.errors import DataError

app = typer.Typer(help="Bring real data sets into the cache.", no_args_is_help=True)

Cache = Annotated[
    Path | None,
    typer.Option(help="Folder of the cache. [default: $HEADWATER_CACHE, else ~/.cache/headwater]"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and no progress.")]


@app.command(name="list")
def list_sets(cache: Cache = None, as_json: AsJson = False) -> None:
    """Show the data sets and which are there; --json adds their sources and licences."""
    folder = cache or cache_folder(os.environ)
    facts = [_describe(entry, folder) for entry in CATALOGUE]
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    table = Table("name", "what", "clients", "to fetch", "there")
    for fact in facts:
        size = f"{fact['package_bytes'] / 1e6:.0f} MB" if fact["package_bytes"] else "-"
        clients, there = str(fact["clients"] or "-"), "yes" if fact["cached"] else "no"
        table.add_row(fact["name"], fact["about"], clients, size, there)
    Console().print(table)


@app.command(name="fetch")
def fetch_set(
    name: Annotated[str, typer.Argument(help="A name that `data list` shows.")],
    cache: Cache = None,
    package: Annotated[
        Path | None, typer.Option(help="The package file, if you have it already.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Bring one data set: its pinned package is checked, converted and cached."""
    folder = cache or cache_folder(os.environ)
    began_s = time.monotonic()
    try:
        entry = find_entry(name)
        there_already = cached_file(name, cache=folder).exists()
        with _reporting(quiet=as_json) as on_progress:
            kept = fetch(name, cache=folder, on_progress=on_progress, package=package)
    except DataError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    facts = _describe(entry, folder) | {
        "fetched": not there_already,
        "seconds": round(time.monotonic() - began_s, 2),
    }
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    elif entry.package is None:
        typer.echo(f"{name} needs no fetch: it comes with scikit-learn")
    elif there_already:
        typer.echo(f"{name} is there already: {kept}")
    else:
        typer.echo(
            f"{name}: {entry.samples:,} samples, {kept.stat().st_size / 1e6:.1f} MB in "
            f"{facts['seconds']:.1f} s: {kept}"
        )


def _describe(entry: Entry, cache: Path) -> dict[str, Any]:
    kept = cached_file(entry.name, cache=cache)
    there = kept.exists()
    return {
        "name": entry.name,
        "about": entry.about,
        "samples": entry.samples,
        "shape": list(entry.shape),
        "classes": len(entry.labels),
        "clients": len(entry.client_names),
        "source": entry.source,
        "package_bytes": entry.package.size_bytes if entry.package else 0,
        "sha256": entry.package.sha256 if entry.package else None,
        "licence": entry.licence,
        "cached": there,
        "path": str(kept) if there else None,
        "cached_bytes": kept.stat().st_size if there else 0,
    }


@contextmanager
def _reporting(*, quiet: bool) -> Iterator[OnProgress]:
    """Gives what to call with progress: a bar on the error stream, or nothing."""
    if quiet:
        yield lambda _stage, _done, _total: None
        return
    columns = (TextColumn("{task.description:<12}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def show(stage: str, done_bytes: int, total_bytes: int) -> None:
            bar.update(task, description=escape(stage), completed=done_bytes, total=total_bytes)

        yield show
