"""What each device was asked for, gave and spent, added up from `attempts.csv`."""

import csv
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from federation.errors import DataError

NAME = "attempts.csv"
NUMBERS = ("opened_s", "ended_s", "train_s", "energy_j", "bytes_up", "bytes_down")
COLUMNS = ("round", "device", *NUMBERS)

Counted = Mapping[int, Set[str]]
"""By round, the devices whose update is in its model."""


@dataclass(slots=True)
class DeviceAccount:
    """One device over a whole run. `busy_s` is from being asked to the end of each attempt.

    What is None was not recorded.
    """

    device: str
    asked: int = 0
    counted: int = 0
    energy_j: float | None = None
    bytes_up: float | None = None
    bytes_down: float | None = None
    train_s: float | None = None
    busy_s: float | None = None

    @property
    def share(self) -> float:
        """Of the updates it was asked for, how many counted, 0 to 1."""
        return self.counted / self.asked


def read_accounts(path: Path, counted: Counted) -> list[DeviceAccount]:
    """One account for each device that was asked, in the order in which they first were.

    The file is read line by line: memory grows with its devices and not with its rounds.

    Raises:
        DataError: it cannot be read, lacks a column, or holds what is no number.
    """
    accounts: dict[str, DeviceAccount] = {}
    try:
        with path.open(encoding="utf-8", errors="replace", newline="") as lines:
            for round_, device, numbers in _rows(lines):
                account = accounts.get(device)
                if account is None:
                    account = accounts[device] = DeviceAccount(
                        device, 0, 0, 0.0, 0.0, 0.0, 0.0, 0.0
                    )
                account.asked += 1
                account.counted += device in counted.get(round_, ())
                _add(account, numbers)
    except (OSError, csv.Error) as error:
        raise DataError(f"{NAME} cannot be read: {error}; run the scenario again") from error
    return list(accounts.values())


def accounts_without_file(
    counted: Counted, dropped: Iterable[tuple[int, str]]
) -> list[DeviceAccount]:
    """The same from the rounds alone: how often asked and counted, and nothing of what it cost."""
    accounts: dict[str, DeviceAccount] = {}
    pairs = [(number, name) for number, names in counted.items() for name in sorted(names)]
    for is_counted, entries in ((True, pairs), (False, dropped)):
        for _, device in entries:
            account = accounts.setdefault(device, DeviceAccount(device))
            account.asked += 1
            account.counted += is_counted
    return sorted(accounts.values(), key=lambda account: account.device)


def worst_and_best(
    accounts: Sequence[DeviceAccount], most: int
) -> tuple[list[DeviceAccount], list[DeviceAccount]]:
    """The devices whose updates counted least and most often of those asked for.

    Where the share is the same, those that were asked more often come first, then the ones
    that spent more energy among the worst, and less among the best. No device is in both.
    """
    worst = sorted(accounts, key=lambda a: (a.share, -a.asked, -(a.energy_j or 0.0), a.device))
    best = sorted(accounts, key=lambda a: (-a.share, -a.asked, a.energy_j or 0.0, a.device))
    if len(accounts) <= 2 * most:
        return worst, []
    return worst[:most], best[:most]


def _rows(lines: Iterable[str]) -> Iterator[tuple[int, str, list[float]]]:
    reader = csv.reader(lines)
    header = next(reader, [])
    missing = [name for name in COLUMNS if name not in header]
    if missing:
        raise DataError(
            f"{NAME} lacks the column {missing[0]}; it is of another version: "
            "run the scenario again"
        )
    round_at, device_at, *places = (header.index(name) for name in COLUMNS)
    for row in reader:
        where = f"{NAME} line {reader.line_num}"
        if len(row) != len(header):
            raise DataError(
                f"{where} has {len(row)} values; the header has {len(header)}: "
                "it is cut off or damaged, run the scenario again"
            )
        numbers = [_number(row[place], header[place], where) for place in places]
        yield int(_number(row[round_at], "round", where)), row[device_at], numbers


def _number(text: str, column: str, where: str) -> float:
    """A cell; an empty one is 0, for an attempt that did not get that far."""
    try:
        value = float(text) if text else 0.0
    except ValueError:
        value = math.nan
    if not 0.0 <= value <= 1e18:
        raise DataError(
            f"{where}: {column} is {text[:40]!r}; expected a number of 0 or more: "
            "run the scenario again"
        )
    return value


def _add(account: DeviceAccount, numbers: Sequence[float]) -> None:
    opened_s, ended_s, train_s, energy_j, bytes_up, bytes_down = numbers
    account.busy_s = (account.busy_s or 0.0) + max(ended_s - opened_s, 0.0)
    account.train_s = (account.train_s or 0.0) + train_s
    account.energy_j = (account.energy_j or 0.0) + energy_j
    account.bytes_up = (account.bytes_up or 0.0) + bytes_up
    account.bytes_down = (account.bytes_down or 0.0) + bytes_down
