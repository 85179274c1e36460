"""`headwater-sim report`: a run's folder as a page with pictures, or two side by side."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from federation.errors import ConfigError
from simulations.reporting.drawings import LABELS
from simulations.reporting.page import render_page, show_text
from simulations.reporting.pictures import Picture, pictures
from simulations.reporting.reading import Run, read_run

PAGE = "report.html"


class Report(msgspec.Struct, frozen=True):
    """What was written, and what the run's files did not have."""

    page: str
    pictures: tuple[str, ...]
    left_out: tuple[str, ...]


def render_report(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="What was --out of headwater-sim run.")
    ],
    beside: Annotated[
        Path | None, typer.Argument(metavar="[DIR2]", help="Another run, to compare with.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for page and pictures. [default: DIR/report]"),
    ] = None,
    print_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Render a run as report.html and PNGs: accuracy, jitter, who dropped, bytes, energy, time.

    The page needs no other file and no network. With a second folder, both runs are drawn on
    the same axes and their differences stand in a table.
    """
    report = write_report([folder] if beside is None else [folder, beside], out)
    if print_json:
        sys.stdout.write(msgspec.json.encode(report).decode() + "\n")
        return
    sys.stdout.write(f"page      {report.page}\n")
    sys.stdout.write(f"pictures  {len(report.pictures)} beside it\n")
    for note in report.left_out:
        sys.stdout.write(f"left out  {show_text(note)}\n")


def write_report(folders: Sequence[Path], out: Path | None = None) -> Report:
    """Write the page and the pictures of one run or two into `out`.

    Where `out` is None it is `report` in the first run's folder, or for two runs
    `report-beside-` and the second folder's name.

    Raises:
        ConfigError: a folder that is of no run, or one that cannot be written to.
    """
    runs = [read_run(folder) for folder in folders]
    if out is None:
        second = f"-beside-{folders[1].resolve().name}" if len(folders) > 1 else ""
        out = folders[0] / f"report{second}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        found = pictures(runs)
        for picture in found:
            (out / picture.file).write_bytes(picture.light)
        (out / PAGE).write_text(render_page(runs, found), encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot write to {out}: {error.strerror}; give another folder with --out"
        ) from error
    return Report(str(out / PAGE), _files(out, found), _left_out(runs))


def _files(out: Path, found: Sequence[Picture]) -> tuple[str, ...]:
    return tuple(str(out / picture.file) for picture in found)


def _left_out(runs: Sequence[Run]) -> tuple[str, ...]:
    pairs = zip(LABELS, runs, strict=False)
    return tuple(
        f"of {label}, {note}" if len(runs) > 1 else note
        for label, run in pairs
        for note in run.left_out
    )
