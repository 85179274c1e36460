"""The figures of a run, how they are written, and by how much two runs differ."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from simulations.report import LAST_ROUNDS
from simulations.reporting.reading import RoundRow, Run

ABSENT = "not recorded"


@dataclass(frozen=True, slots=True)
class Measure:
    """One figure: what it is, how it is found, and how a value and a difference are written."""

    name: str
    value: Callable[[Run], float | None]
    write: Callable[[float], str]
    write_change: Callable[[float], str] | None = None


def accuracies(rounds: Sequence[RoundRow]) -> list[tuple[RoundRow, float]]:
    """The rounds that gave a model, each with its accuracy."""
    return [(row, row.accuracy) for row in rounds if row.accuracy is not None]


def rolling_jitter(rounds: Sequence[RoundRow], last: int = LAST_ROUNDS) -> list[float]:
    """After each round that gave a model: the standard deviation of the last accuracies."""
    values = [accuracy for _, accuracy in accuracies(rounds)]
    return [
        statistics.pstdev(values[max(end - last, 0) : end]) for end in range(1, len(values) + 1)
    ]


def energy_j(run: Run) -> float | None:
    """The joules of all rounds; None where a round has none recorded."""
    return _total([row.energy_j for row in run.result.rounds])


def percent(share: float) -> str:
    """A share in percent."""
    return f"{100 * share:.1f} %"


def points(share: float) -> str:
    """A difference of shares, with its sign."""
    return f"{_sign(share)}{abs(100 * share):.1f} points"


def count(number: float) -> str:
    """A whole number with its thousands apart."""
    return f"{number:,.0f}"


def megabytes(size_bytes: float) -> str:
    """Bytes in MB of 10^6, and below a tenth of it in kB."""
    if abs(size_bytes) < 1e5:
        return f"{size_bytes / 1e3:,.1f} kB"
    return f"{size_bytes / 1e6:,.2f} MB"


def joules(energy: float) -> str:
    """Energy in J, or from 10 kJ on in kJ."""
    return f"{energy / 1e3:,.1f} kJ" if abs(energy) >= 1e4 else f"{energy:,.1f} J"


def seconds(duration_s: float) -> str:
    """A time in seconds, minutes, hours or days, whichever reads best."""
    for unit, length_s, from_s in (("d", 86400, 172800), ("h", 3600, 7200), ("min", 60, 300)):
        if abs(duration_s) >= from_s:
            return f"{duration_s / length_s:,.1f} {unit}"
    return f"{duration_s:,.1f} s"


def nats(loss: float) -> str:
    """A loss."""
    return f"{loss:.4f} nats"


def figures(runs: Sequence[Run]) -> list[list[str]]:
    """A row for each measure: its name, its value in each run, and of two the difference."""
    rows = []
    for measure in MEASURES:
        values = [measure.value(run) for run in runs]
        row = [measure.name, *(ABSENT if v is None else measure.write(v) for v in values)]
        if len(runs) == 2:
            row.append(_change(measure, *values))
        rows.append(row)
    return rows


def _change(measure: Measure, first: float | None, second: float | None) -> str:
    if first is None or second is None:
        return "cannot be told"
    change = second - first
    if change == 0.0:
        return "none"
    if measure.write_change is not None:
        return measure.write_change(change)
    sign = _sign(change)
    ratio = f" ({sign}{abs(100 * change / first):,.0f} %)" if first else ""
    return f"{sign}{measure.write(abs(change))}{ratio}"


def _sign(change: float) -> str:
    return "+" if change > 0.0 else "\N{MINUS SIGN}"


def _total(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(sum(known)) if known and len(known) == len(values) else None


def _last(run: Run) -> list[float]:
    return [accuracy for _, accuracy in accuracies(run.result.rounds)][-LAST_ROUNDS:]


def _mean_accuracy(run: Run) -> float | None:
    return statistics.fmean(last) if (last := _last(run)) else None


def _jitter(run: Run) -> float | None:
    return statistics.pstdev(last) if (last := _last(run)) else None


def _loss(run: Run) -> float | None:
    return next((row.loss for row in reversed(run.result.rounds) if row.loss is not None), None)


def _median_round_s(run: Run) -> float | None:
    times = [row.closed_s - row.opened_s for row in run.result.rounds]
    return statistics.median(times) if times else None


def _closed(run: Run) -> float:
    return sum(row.status == "closed" for row in run.result.rounds)


def _asked(run: Run) -> float:
    return sum(row.asked for row in run.result.rounds)


def _counted(run: Run) -> float:
    return sum(len(row.devices) for row in run.result.rounds)


def _counted_share(run: Run) -> float | None:
    return _counted(run) / asked if (asked := _asked(run)) else None


MEASURES = (
    Measure("Accuracy of the last model", lambda run: run.result.accuracy, percent, points),
    Measure(f"Accuracy, mean of the last {LAST_ROUNDS} models", _mean_accuracy, percent, points),
    Measure(
        f"Jitter, standard deviation of the last {LAST_ROUNDS} accuracies",
        _jitter,
        lambda share: f"{100 * share:.2f} points",
    ),
    Measure("Accuracy untrained", lambda run: run.result.initial_accuracy, percent, points),
    Measure("Loss of the last model", _loss, nats),
    Measure("Rounds closed", _closed, count),
    Measure("Rounds abandoned", lambda run: len(run.result.rounds) - _closed(run), count),
    Measure("Updates asked for", _asked, count),
    Measure("Updates counted", _counted, count),
    Measure("Share that counted", _counted_share, percent, points),
    Measure(
        "Interruptions of asked devices",
        lambda run: sum(row.interruptions for row in run.result.rounds),
        count,
    ),
    Measure("Updates received", lambda run: run.result.bytes_up, megabytes),
    Measure("Models sent", lambda run: run.result.bytes_down, megabytes),
    Measure("Whole traffic up", lambda run: run.result.wire_up_bytes, megabytes),
    Measure("Whole traffic down", lambda run: run.result.wire_down_bytes, megabytes),
    Measure("Energy of devices", energy_j, joules),
    Measure(
        "Training, all devices together",
        lambda run: _total([row.train_s for row in run.result.rounds]),
        seconds,
    ),
    Measure("Virtual time", lambda run: run.result.virtual_s, seconds),
    Measure("Median time of a round", _median_round_s, seconds),
)
