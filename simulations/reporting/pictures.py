"""The pictures of a report: which there are, what they say in words, and their files."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from simulations.reporting.drawings import (
    LABELS,
    STATES,
    by_round,
    by_time,
    draw_energy,
    draw_fleet,
    draw_jitter,
    draw_learning,
    draw_participation,
    draw_times,
    draw_traffic,
)
from simulations.reporting.look import DARK, LIGHT, Look, render
from simulations.reporting.measures import (
    accuracies,
    energy_j,
    joules,
    megabytes,
    percent,
    rolling_jitter,
    seconds,
)
from simulations.reporting.reading import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Draw: TypeAlias = "Callable[[Figure, Look, Sequence[Run]], None]"


NARROW_IN, WIDE_IN = 6.2, 11.0
"""Inches: on a page two narrow pictures stand beside each other, with text of the same size."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture on light and on dark paper, PNG; `alt` says what it shows to who cannot see it."""

    file: str
    title: str
    caption: str
    alt: str
    light: bytes
    dark: bytes
    is_wide: bool


@dataclass(frozen=True, slots=True)
class Sketch:
    """A picture that may be: `is_there` tells whether a run has what it needs."""

    file: str
    title: str
    caption: str
    draw: Draw
    is_there: Callable[[Run], bool]
    tell: Callable[[Run], str]
    height: float = 2.8


def pictures(runs: Sequence[Run]) -> list[Picture]:
    """All pictures for which one of the runs has the figures; of two, both on the same axes.

    Where one of two lacks them, the picture is of the other alone.
    """
    found = []
    for sketch in SKETCHES:
        there = [run for run in runs if sketch.is_there(run)]
        if there:
            found.append(_picture(sketch, runs, there))
    return found


def _picture(sketch: Sketch, runs: Sequence[Run], there: Sequence[Run]) -> Picture:
    words, caption = [], sketch.caption
    for label, run in zip(LABELS, runs, strict=False):
        if run in there:
            words.append(f"{label}: {sketch.tell(run)}" if len(runs) > 1 else sketch.tell(run))
        else:
            caption += f" Run {label} has no such figures."
    is_wide = sketch.draw is draw_fleet
    height = _fleet_height(there) if is_wide else sketch.height
    if len(there) > 1 and sketch.draw is draw_participation:
        height *= 1.6
    size = (WIDE_IN if is_wide else NARROW_IN, height)

    def draw(figure: "Figure", look: Look) -> None:
        sketch.draw(figure, look, there)

    return Picture(
        file=sketch.file,
        title=sketch.title,
        caption=caption,
        alt=f"{sketch.title}. {' '.join(words)}",
        light=render(draw, size, LIGHT),
        dark=render(draw, size, DARK),
        is_wide=is_wide,
    )


def _fleet_height(runs: Sequence[Run]) -> float:
    """Inches: so many that the lines of a big fleet stay apart, within a page."""
    tallest = max(int(run.fleet.shape[1]) for run in runs if run.fleet is not None)
    return 1.0 + len(runs) * min(max(tallest / 12, 1.8), 6.0 / len(runs) + 1.0)


def _tell_learning(run: Run) -> str:
    values = accuracies(run.result.rounds)
    best_row, best = max(values, key=lambda entry: entry[1])
    return (
        f"Accuracy goes from {percent(run.result.initial_accuracy)} untrained to "
        f"{percent(values[-1][1])} after round {values[-1][0].round}, "
        f"with its highest, {percent(best)}, after round {best_row.round}."
    )


def _tell_jitter(run: Run) -> str:
    return f"It is {100 * rolling_jitter(run.result.rounds)[-1]:.2f} points after the last round."


def _tell_participation(run: Run) -> str:
    asked = sum(row.asked for row in run.result.rounds)
    counted = sum(len(row.devices) for row in run.result.rounds)
    lost = sum(drop.status == "lost" for row in run.result.rounds for drop in row.dropped)
    return f"Of {asked} updates that were asked for, {counted} counted and {lost} were lost."


def _tell_fleet(run: Run) -> str:
    if run.fleet is None:
        return ""
    shares = np.bincount(run.fleet.ravel(), minlength=len(STATES)) / run.fleet.size
    rounds, devices = run.fleet.shape
    parts = [f"{state} {percent(share)}" for state, share in zip(STATES, shares, strict=True)]
    return f"{devices} devices over {rounds} rounds. Of all their rounds: {'; '.join(parts)}."


def _tell_traffic(run: Run) -> str:
    up = sum(row.bytes_up for row in run.result.rounds)
    down = sum(row.bytes_down for row in run.result.rounds)
    return f"In all {megabytes(up)} of updates and {megabytes(down)} of models."


def _tell_energy(run: Run) -> str:
    return f"In all {joules(energy_j(run) or 0.0)}."


def _tell_times(run: Run) -> str:
    times = [row.closed_s - row.opened_s for row in run.result.rounds]
    return f"The shortest takes {seconds(min(times))} and the longest {seconds(max(times))}."


def _has_rounds(run: Run) -> bool:
    return bool(run.result.rounds)


def _has_models(run: Run) -> bool:
    return bool(accuracies(run.result.rounds))


SKETCHES = (
    Sketch(
        "accuracy_by_round.png",
        "Accuracy and loss by round",
        "On held-out data. A cross marks a round that was abandoned.",
        partial(draw_learning, x=by_round),
        _has_models,
        _tell_learning,
        4.2,
    ),
    Sketch(
        "accuracy_by_time.png",
        "Accuracy and loss by virtual time",
        "The same, placed where each round ended on the virtual clock.",
        partial(draw_learning, x=by_time),
        _has_models,
        _tell_learning,
        4.2,
    ),
    Sketch(
        "jitter.png",
        "Jitter",
        "Standard deviation of the last 10 accuracies: how much it matters when training stops.",
        draw_jitter,
        _has_models,
        _tell_jitter,
    ),
    Sketch(
        "participation.png",
        "Who was asked, and what came of it",
        "Updates by round, one upon the other. Most that are late were cancelled because the "
        "round had enough.",
        draw_participation,
        _has_rounds,
        _tell_participation,
        2.9,
    ),
    Sketch(
        "fleet.png",
        "The fleet, round by round",
        "A line is a device, by its place in the fleet (the first 512), a column is a round.",
        draw_fleet,
        lambda run: run.fleet is not None,
        _tell_fleet,
    ),
    Sketch(
        "traffic.png",
        "Bytes",
        "Updates received and models sent, added up; an MB is a million bytes.",
        draw_traffic,
        _has_rounds,
        _tell_traffic,
        4.2,
    ),
    Sketch(
        "energy.png",
        "Energy and training",
        "Of all devices that were asked in a round, whether their update counted or not.",
        draw_energy,
        lambda run: bool(energy_j(run)),
        _tell_energy,
        4.2,
    ),
    Sketch(
        "round_time.png",
        "Time of rounds",
        "From the opening of a round to its end, on the virtual clock.",
        draw_times,
        _has_rounds,
        _tell_times,
    ),
)
