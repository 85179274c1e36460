"""What became of each device that was asked and what that took, and who was there: as files."""

import csv
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from cloud.coordination.facts import (
    AttemptChanged,
    HubFact,
    RoundAbandoned,
    RoundClosed,
    RoundOpened,
    UpdateAccepted,
)
from simulations.presence.model import Presence
from simulations.world import World

COLUMNS = (
    "round", "place", "device", "status", "reason", "opened_s", "ended_s", "train_s", "energy_j",
    "bytes_up", "bytes_down",
)  # fmt: skip

OFF, IDLE, COUNTED, LOST, OTHER = range(5)
"""In `fleet.npy`: not there, there and not asked, asked and counted, asked and lost, or failed,
refused, called off or too late."""

MAX_PICTURED = 512
"""So many devices are in `fleet.npy`, the first of the fleet."""


class Diary:
    """Writes `attempts.csv` and, at the end, `fleet.npy` into a folder.

    A device's account of a round holds what it spent since it was last asked: a straggler's
    later steps stand in its next row.
    """

    def __init__(self, out: Path, world: World, presence: Presence) -> None:
        self._account = (0.0, 0.0)
        self._world, self._presence, self._out = world, presence, out
        self._file = (out / "attempts.csv").open("w", newline="", encoding="utf-8")
        self._rows = csv.writer(self._file)
        self._rows.writerow(COLUMNS)
        self._opened: RoundOpened | None = None
        self._fates: dict[str, tuple[str, str, float]] = {}
        self._pictures: list[npt.NDArray[np.uint8]] = []
        world.watch(self._observe)

    def spent(self) -> tuple[float, float]:
        """Joules and seconds of training that the devices of the last round took."""
        return self._account

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        width = min(len(self._world.devices), MAX_PICTURED)
        pictures = np.array(self._pictures, np.uint8).reshape(-1, width)
        np.save(self._out / "fleet.npy", pictures)

    def _observe(self, fact: HubFact) -> None:
        match fact:
            case RoundOpened():
                self._opened, self._fates = fact, {}
                on = self._presence.on(fact.round, fact.at)[:MAX_PICTURED]
                self._pictures.append(on.astype(np.uint8))
            case AttemptChanged():
                self._fates[fact.device] = (fact.status, fact.reason, fact.at)
            case UpdateAccepted():
                self._fates[fact.device] = ("received", "", fact.at)
            case RoundClosed(devices=devices) if self._opened is not None:
                self._write(self._opened, set(devices), fact.at)
            case RoundAbandoned() if self._opened is not None:
                self._write(self._opened, set(), fact.at)
            case _:
                pass

    def _write(self, opened: RoundOpened, counted: set[str], now: float) -> None:
        herd, picture = self._world.devices, self._pictures[-1]
        energy_j = train_s = 0.0
        for entry in opened.attempts:
            name, place = entry.device, herd.place_of(entry.device)
            status, reason, at = self._fates.get(name, ("assigned", "never answered", now))
            spent = herd.take_spent(name)
            if place < MAX_PICTURED:
                picture[place] = _code(status, is_counted=name in counted)
            self._rows.writerow(
                (
                    opened.round, place, name, status, reason, round(opened.at, 3), round(at, 3),
                    round(spent.train_s, 3), round(spent.energy_j, 4), spent.bytes_up,
                    spent.bytes_down,
                )
            )  # fmt: skip
            energy_j += spent.energy_j
            train_s += spent.train_s
        self._account = (energy_j, train_s)
        self._opened = None


def _code(status: str, *, is_counted: bool) -> int:
    if is_counted:
        return COUNTED
    return LOST if status in ("lost", "assigned") else OTHER
