# ruff: noqa: ARG002 - each model looks at what decides it: the round, the time, or neither
"""Recorded traces: when real devices were there, from a CSV or a Parquet file.

A file has a line (a row) for each time that a device was on, with columns `device`, `on_s` and
`off_s`: any name, and two times in seconds. Other columns are not read.
"""

import csv
import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from federation.errors import ConfigError, DataError
from simulations.presence.model import Mask

COLUMNS = ("device", "on_s", "off_s")
"""What a trace's columns are called."""

Times = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """When each recorded device was on; what touches or overlaps is one time.

    Attributes:
        first: (devices + 1,), where the times of each device begin.
        on_s: All beginnings, device by device, in order.
        off_s: All ends.
    """

    first: npt.NDArray[np.int64]
    on_s: Times
    off_s: Times

    @property
    def devices(self) -> int:
        """How many devices were recorded."""
        return len(self.first) - 1


def read_trace(path: Path) -> Trace:
    """Reads a trace, the devices in the order of their first lines.

    Raises:
        ConfigError: no such file, one that ends neither in .csv nor in .parquet, or Parquet
            where pyarrow is not installed.
        DataError: columns that are missing, times that are none, or an end before its beginning.
    """
    readers = {".csv": _read_csv, ".parquet": _read_parquet}
    if (read := readers.get(path.suffix.lower())) is None:
        raise ConfigError(f"trace {path} is neither .csv nor .parquet; give one of these")
    if not path.is_file():
        raise ConfigError(f"there is no trace {path}; create it or correct the path")
    devices, on_s, off_s = read(path)
    if not len(devices):
        raise DataError(f"trace {path} has no times; expected one at least: record some")
    wrong = np.flatnonzero(~((on_s >= 0.0) & (off_s > on_s) & np.isfinite(off_s)))
    if len(wrong):
        row = int(wrong[0])
        raise DataError(
            f"trace {path}, row {row + 1}: on_s is {on_s[row]:g} and off_s {off_s[row]:g}; "
            "expected two times from 0, the lower first: correct it"
        )
    return _merged(devices, on_s, off_s)


class Recorded:
    """A fleet that is there as devices of a trace were, which repeats for ever.

    Device i is there as the trace's device i modulo their number. A fleet larger than the trace
    has therefore devices that come and go together, unless `shift_s` says how far apart in time
    one turn through the trace is from the next.
    """

    def __init__(
        self, trace: Trace, devices: int, period_s: float = 0.0, shift_s: float = 0.0
    ) -> None:
        last_s = float(trace.off_s.max())
        self._period_s = period_s or last_s
        if self._period_s < last_s:
            raise ConfigError(
                f"availability.trace_period_s is {period_s}; the trace ends at {last_s:g}: give "
                "as much or more"
            )
        self._trace, self._devices, self._shift_s = trace, devices, shift_s
        whose = np.repeat(np.arange(trace.devices), np.diff(trace.first))
        # Device by device and in order within each: sorted, so that one search finds all.
        self._begins = whose * self._period_s + trace.on_s

    def on(self, number: int, now: float) -> Mask:
        """Those whose recorded device was on at this time of the trace."""
        trace = self._trace
        places = np.arange(self._devices if self._shift_s else trace.devices)
        turns, whose = np.divmod(places, trace.devices)
        at_s = (now + turns * self._shift_s) % self._period_s
        entries = np.searchsorted(self._begins, whose * self._period_s + at_s, "right") - 1
        there: Mask = (entries >= trace.first[whose]) & (at_s < trace.off_s[entries])
        return np.resize(there, self._devices)

    def is_on(self, place: int, number: int, now: float) -> bool:
        """Whether its recorded device was on at this time of the trace."""
        on_s, off_s, at_s = self._seen(place, now)
        entry = int(np.searchsorted(on_s, at_s, "right")) - 1
        return entry >= 0 and at_s < off_s[entry]

    def leaves_at(self, place: int, number: int, now: float) -> float:
        """The end of this time on, over the end of the trace where that begins with one."""
        on_s, off_s, at_s = self._seen(place, now)
        entry = int(np.searchsorted(on_s, at_s, "right")) - 1
        if entry < 0 or at_s >= off_s[entry]:
            return now
        lasts_s = float(off_s[entry]) - at_s
        if off_s[entry] < self._period_s or on_s[0] > 0.0:
            return now + lasts_s
        # On at the end and at the beginning: one time, and with one entry for ever.
        return math.inf if len(on_s) == 1 else now + lasts_s + float(off_s[0])

    def returns_at(self, place: int, number: int, now: float) -> float:
        """Now, or the next beginning of a time on."""
        if self.is_on(place, number, now):
            return now
        on_s, _, at_s = self._seen(place, now)
        entry = int(np.searchsorted(on_s, at_s, "right"))
        wait_s = on_s[entry] - at_s if entry < len(on_s) else self._period_s - at_s + on_s[0]
        return now + float(wait_s)

    def _seen(self, place: int, now: float) -> tuple[Times, Times, float]:
        """The times of its recorded device, and the time of the trace."""
        turn, whose = divmod(place, self._trace.devices)
        own = slice(*self._trace.first[whose : whose + 2].tolist())
        at_s = (now + turn * self._shift_s) % self._period_s
        return self._trace.on_s[own], self._trace.off_s[own], at_s


def _merged(devices: Sequence[Any], on_s: Times, off_s: Times) -> Trace:
    numbers: dict[Any, int] = {}
    whose = np.array([numbers.setdefault(device, len(numbers)) for device in devices])
    order = np.lexsort((on_s, whose))
    whose, on_s, off_s = whose[order], on_s[order], off_s[order]
    # The latest end so far, device by device: a time that begins after it is a new one.
    base = whose * (2.0 * off_s.max())
    reach = np.maximum.accumulate(off_s + base) - base
    is_new = np.concatenate([[True], (whose[1:] != whose[:-1]) | (on_s[1:] > reach[:-1])])
    begins = np.flatnonzero(is_new)
    ends = np.append(begins[1:], len(on_s)) - 1
    counts = np.bincount(whose[begins], minlength=len(numbers))
    first = np.concatenate([[0], np.cumsum(counts)])
    return Trace(first.astype(np.int64), on_s[begins], reach[ends])


def _read_csv(path: Path) -> tuple[Sequence[Any], Times, Times]:
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            rows = csv.DictReader(lines)
            _check_columns(path, rows.fieldnames or [])
            devices: list[str] = []
            times: list[tuple[float, float]] = []
            for row in rows:
                devices.append(row["device"])
                times.append((_time(path, rows.line_num, row, "on_s"),
                              _time(path, rows.line_num, row, "off_s")))  # fmt: skip
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"trace {path} cannot be read ({error}); write it again") from error
    both = np.array(times, np.float64).reshape(-1, 2)
    return devices, both[:, 0].copy(), both[:, 1].copy()


def _time(path: Path, line: int, row: dict[str, Any], column: str) -> float:
    try:
        return float(row[column])
    except (TypeError, ValueError) as error:
        raise DataError(
            f"trace {path}, line {line}: {column} is {row[column]!r}; expected seconds: correct it"
        ) from error


def _read_parquet(path: Path) -> tuple[Sequence[Any], Times, Times]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ConfigError(
            f"trace {path} is Parquet, which pyarrow reads, and that is not installed: "
            "pip install pyarrow, or give the trace as CSV"
        ) from error
    try:
        _check_columns(path, parquet.read_schema(path).names)
        table = parquet.read_table(path, columns=list(COLUMNS))
        on_s, off_s = (np.array(table[name].to_numpy(), np.float64) for name in COLUMNS[1:])
    except (OSError, ValueError, TypeError) as error:  # pyarrow's own errors are among these
        raise DataError(f"trace {path} cannot be read ({error}); write it again") from error
    return table["device"].to_pylist(), on_s, off_s


def _check_columns(path: Path, found: Sequence[str]) -> None:
    if missing := [name for name in COLUMNS if name not in found]:
        raise DataError(
            f"trace {path} has no column {missing[0]!r}; expected {', '.join(COLUMNS)}: add it"
        )
