"""What each picture shows: one drawing for one run, or for two on the same axes."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from simulations.reporting.look import DASHES, Look, style, whole_rounds
from simulations.reporting.measures import accuracies, rolling_jitter
from simulations.reporting.reading import RoundRow, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABELS = ("A", "B")
"""What two runs are called; the names in their files may be anything, and of any length."""

STATES = (
    "off",
    "on, not asked",
    "asked, counted",
    "asked, lost",
    "asked, late, failed or refused",
)
MANY = 60
"""More points than this are drawn without a mark at each."""

X: TypeAlias = Callable[[RoundRow], float]
Y: TypeAlias = Callable[[RoundRow], float]


def by_round(row: RoundRow) -> float:
    """A round's number."""
    return row.round


def by_time(row: RoundRow) -> float:
    """When a round was over, in virtual minutes."""
    return row.closed_s / 60


def draw_learning(figure: "Figure", look: Look, runs: Sequence[Run], x: X) -> None:
    """Accuracy above and loss below; a cross on the axis is a round that was abandoned."""
    above, below = figure.subplots(2, 1, sharex=True)
    for place, run in enumerate(runs):
        rows = [row for row, _ in accuracies(run.result.rounds)]
        xs = [0.0, *map(x, rows)]
        values = [run.result.initial_accuracy, *(value for _, value in accuracies(rows))]
        _curve(above, look, place, xs, [100 * value for value in values])
        losses = [(x(row), row.loss) for row in rows if row.loss is not None]
        _curve(below, look, place, [at for at, _ in losses], [loss for _, loss in losses])
        abandoned = [x(row) for row in run.result.rounds if row.accuracy is None]
        above.plot(abandoned, [0.0] * len(abandoned), "x", color=look.runs[place], clip_on=False)
    style(above, look, "accuracy, %")
    style(below, look, "loss, nats")
    _name_x(below, x)
    _name_runs(above, runs)


def draw_jitter(figure: "Figure", look: Look, runs: Sequence[Run]) -> None:
    """The standard deviation of the last accuracies, after each round."""
    axes = figure.subplots()
    for place, run in enumerate(runs):
        xs = [float(row.round) for row, _ in accuracies(run.result.rounds)]
        _curve(axes, look, place, xs, [100 * value for value in rolling_jitter(run.result.rounds)])
    style(axes, look, "jitter, points")
    whole_rounds(axes)
    _name_runs(axes, runs)


def draw_participation(figure: "Figure", look: Look, runs: Sequence[Run]) -> None:
    """How many were asked in each round, and what became of it, one upon the other."""
    all_axes = figure.subplots(len(runs), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for place, (axes, run) in enumerate(zip(all_axes, runs, strict=True)):
        rows = run.result.rounds
        counted = np.array([len(row.devices) for row in rows], float)
        lost = np.array([sum(d.status == "lost" for d in row.dropped) for row in rows], float)
        asked = np.maximum([row.asked for row in rows], counted + lost)
        floor = np.zeros(len(rows))
        for state, top in ((2, counted), (3, counted + lost), (4, asked)):
            axes.stairs(
                top,
                _edges(rows),
                baseline=floor,
                fill=True,
                color=look.states[state],
                label=STATES[state],
            )
            floor = top
        style(axes, look, _called("devices", place, runs))
    whole_rounds(all_axes[-1])
    handles, names = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=3)


def draw_fleet(figure: "Figure", look: Look, runs: Sequence[Run]) -> None:
    """The state of each device, a line, in each round, a column."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    all_axes = figure.subplots(len(runs), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    tables = [(place, run.fleet) for place, run in enumerate(runs) if run.fleet is not None]
    for (place, table), axes in zip(tables, all_axes, strict=True):
        rounds, devices = table.shape
        axes.imshow(
            table.T,
            aspect="auto",
            interpolation="nearest",
            cmap=ListedColormap(look.states),
            vmin=0,
            vmax=len(STATES) - 1,
            extent=(0.5, rounds + 0.5, devices - 0.5, -0.5),
        )
        axes.set_ylabel(_called("device, by place", place, runs))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    all_axes[0].set_xlim(0.5, max(len(table) for _, table in tables) + 0.5)
    all_axes[0].set_ylim(max(table.shape[1] for _, table in tables) - 0.5, -0.5)
    whole_rounds(all_axes[-1])
    patches = [
        Patch(facecolor=colour, edgecolor=look.faint, label=state)
        for colour, state in zip(look.states, STATES, strict=True)
    ]
    figure.legend(handles=patches, loc="outside upper center", ncols=len(STATES))


def draw_traffic(figure: "Figure", look: Look, runs: Sequence[Run]) -> None:
    """Megabytes of updates and models, added up from the first round on."""
    above, below = figure.subplots(2, 1, sharex=True)
    _sums(above, look, runs, lambda row: row.bytes_up / 1e6)
    _sums(below, look, runs, lambda row: row.bytes_down / 1e6)
    style(above, look, "MB of updates up")
    style(below, look, "MB of models down")
    whole_rounds(below)
    _name_runs(above, runs)


def draw_energy(figure: "Figure", look: Look, runs: Sequence[Run]) -> None:
    """Joules in each round, and all devices' seconds of training."""
    above, below = figure.subplots(2, 1, sharex=True)
    _steps(above, look, runs, lambda row: row.energy_j or 0.0)
    _steps(below, look, runs, lambda row: row.train_s or 0.0)
    style(above, look, "energy a round, J")
    style(below, look, "training a round,\ndevice-seconds")
    whole_rounds(below)
    _name_runs(above, runs)


def draw_times(figure: "Figure", look: Look, runs: Sequence[Run]) -> None:
    """Virtual seconds from the opening of each round to its end."""
    axes = figure.subplots()
    _steps(axes, look, runs, lambda row: max(row.closed_s - row.opened_s, 0.0))
    style(axes, look, "time of a round, virtual s")
    whole_rounds(axes)
    _name_runs(axes, runs)


def _curve(axes: "Axes", look: Look, place: int, xs: list[float], ys: list[float]) -> None:
    axes.plot(
        xs,
        ys,
        color=look.runs[place],
        linestyle=DASHES[place],
        marker="." if len(xs) <= MANY else None,
        label=LABELS[place],
    )


def _sums(axes: "Axes", look: Look, runs: Sequence[Run], value: Y) -> None:
    for place, run in enumerate(runs):
        sums = np.cumsum([0.0, *(value(row) for row in run.result.rounds)])
        _curve(axes, look, place, [0.0, *map(by_round, run.result.rounds)], list(sums))


def _steps(axes: "Axes", look: Look, runs: Sequence[Run], value: Y) -> None:
    """A step for each round: filled for one run, two outlines for two."""
    for place, run in enumerate(runs):
        axes.stairs(
            [value(row) for row in run.result.rounds],
            _edges(run.result.rounds),
            fill=len(runs) == 1,
            color=look.runs[place],
            linestyle=DASHES[place],
            linewidth=0.0 if len(runs) == 1 else 1.5,
            label=LABELS[place],
        )


def _edges(rows: Sequence[RoundRow]) -> list[float]:
    return [rows[0].round - 0.5, *(row.round + 0.5 for row in rows)]


def _called(label: str, place: int, runs: Sequence[Run]) -> str:
    return f"{LABELS[place]}: {label}" if len(runs) > 1 else label


def _name_runs(axes: "Axes", runs: Sequence[Run]) -> None:
    if len(runs) > 1:
        axes.legend(loc="best")


def _name_x(axes: "Axes", x: X) -> None:
    if x is by_time:
        axes.set_xlabel("virtual time, min")
    else:
        whole_rounds(axes)
