"""`headwater-sim compare`: variants of one scenario, the same seeds for all, resumable."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TypeAlias

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from federation.datasets.cached import cache_folder
from federation.errors import ConfigError
from simulations.comparison.crew import News, RoundDone, RunDone, run_trials
from simulations.comparison.figures import (
    Comparison,
    RunFigures,
    default_target,
    variant_figures,
)
from simulations.comparison.showing import HEADINGS, as_table, cells, plot
from simulations.comparison.trial import Trial, choose_variants, kept_figures, plan_trials
from simulations.report import as_json, versions
from simulations.scenario import Scenario, Variant, find_scenario, read_scenario

Figures: TypeAlias = Mapping[tuple[str, int], RunFigures]
Say: TypeAlias = Callable[[str], None]


def run_comparison(
    scenario: Annotated[str, typer.Argument(help="A TOML file, or the name of a shipped one.")],
    out: Annotated[Path, typer.Option(help="Folder for the files; made when absent.")],
    methods: Annotated[
        str,
        typer.Option(
            help="Variants or methods, separated by commas; the first is compared with. "
            "[default: all variants of the scenario]"
        ),
    ] = "",
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, from the scenario's on.")] = 3,
    jobs: Annotated[int, typer.Option(min=1, help="How many runs at a time.")] = 1,
    target: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Accuracy to count rounds and bytes to, a share. "
            "[default: the first's accuracy less 0.01]",
        ),
    ] = None,
    print_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object and no progress.")
    ] = False,
) -> None:
    """Run variants of a scenario with the same seeds, and compare them.

    Leaves table.md, comparison.json, comparison.png and a folder for each run in --out. Runs
    that are there already, with the same settings, are not run again.
    """
    plan = read_scenario(find_scenario(scenario))
    variants = choose_variants(plan, [name.strip() for name in methods.split(",") if name.strip()])
    figures = _figures(plan_trials(plan, variants, seeds), out, jobs, quiet=print_json)
    comparison = compare(plan, variants, seeds, figures, target)
    write_comparison(comparison, out)
    if print_json:
        sys.stdout.write(msgspec.json.encode(comparison).decode() + "\n")
    else:
        _show(comparison, out)


def compare(
    scenario: Scenario,
    variants: Sequence[Variant],
    seeds: int,
    figures: Figures,
    target: float | None,
) -> Comparison:
    """What variants came to, each paired with the first by seed."""
    runs = {
        variant.name: [figures[variant.name, seed] for seed in range(seeds)] for variant in variants
    }
    first = runs[variants[0].name]
    wanted = default_target(first) if target is None else target
    return Comparison(
        scenario=scenario.run.name,
        rounds=scenario.run.rounds,
        seeds=tuple(range(seeds)),
        target=wanted,
        variants=tuple(variant_figures(v, runs[v.name], first, wanted) for v in variants),
        runs=tuple(run for variant in variants for run in runs[variant.name]),
        versions=versions(),
    )


def write_comparison(comparison: Comparison, out: Path) -> None:
    """Write `table.md`, `comparison.json` and `comparison.png`.

    Raises:
        ConfigError: the folder cannot be written to.
    """
    try:
        (out / "table.md").write_text(as_table(comparison), encoding="utf-8")
        (out / "comparison.json").write_bytes(as_json(comparison))
        plot(comparison, out / "comparison.png")
    except OSError as error:
        raise ConfigError(
            f"cannot write to {out}: {error.strerror}; give another folder with --out"
        ) from error


def _figures(trials: Sequence[Trial], out: Path, jobs: int, *, quiet: bool) -> Figures:
    """The figures of all trials: of those that are there, and of those that are run now."""
    figures: dict[tuple[str, int], RunFigures] = {}
    missing: list[Trial] = []
    again: list[str] = []
    for trial in trials:
        kept, why = kept_figures(trial, out)
        if kept is None:
            missing.append(trial)
        else:
            figures[trial.variant.name, trial.seed] = kept
        if why:
            again.append(f"{trial.variant.name} seed {trial.seed} is run again: {why}")
    with _progress(missing, quiet=quiet) as (say, show):
        if figures:
            say(f"{len(figures)} of {len(trials)} runs are there already")
        for line in again:
            say(line)

        def tell(news: News) -> None:
            show(news)
            if isinstance(news, RunDone):
                done = news.figures
                figures[done.variant, done.seed] = done
                say(
                    f"{done.variant} seed {done.seed}: {done.status}, "
                    f"accuracy {done.accuracy:.3f} (jitter {done.jitter:.3f})"
                )

        run_trials(missing, out, cache=cache_folder(os.environ), jobs=jobs, tell=tell)
    return figures


@contextmanager
def _progress(
    trials: Sequence[Trial], *, quiet: bool
) -> Iterator[tuple[Say, Callable[[News], None]]]:
    """What to call with a line and with news: both go to the error stream, or nowhere."""
    console = Console(stderr=True, quiet=quiet)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("rounds"),
        TimeRemainingColumn(),
    )
    total = sum(trial.scenario.run.rounds for trial in trials)
    done: dict[tuple[str, int], int] = {}
    is_shown = console.is_terminal and not quiet
    with Progress(*columns, console=console, transient=True, disable=not is_shown) as bar:
        task = bar.add_task("comparing", total=total)

        def show(news: News) -> None:
            if isinstance(news, RoundDone):
                done[news.variant, news.seed] = news.round
                name = escape(f"{news.variant} seed {news.seed}")
                bar.update(task, description=name, completed=sum(done.values()))

        yield lambda line: console.print(escape(line), highlight=False, soft_wrap=True), show


def _show(comparison: Comparison, out: Path) -> None:
    # What is piped has no width of its own, and a table cut to 80 columns is no table.
    console = Console(width=None if sys.stdout.isatty() else 140)
    table = Table(*HEADINGS, box=None, pad_edge=False)
    for variant in comparison.variants:
        table.add_row(*map(escape, cells(variant, len(comparison.seeds))))
    console.print(table)
    for variant in comparison.variants:
        for note in variant.unfinished:
            console.print(escape(f"{variant.name}, {note}"), highlight=False)
    console.print(f"target {100 * comparison.target:.1f} %; files: {escape(str(out))}")
