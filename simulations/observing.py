"""Reads a hub's event log into what it saw of each device: the records that `twin.fitting` takes.

The log tells a lost link from a restarted process by what comes after it only: an update of a
training that the loss cut short, which arrives as the device is back, was trained meanwhile.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard

import msgspec

from cloud.config import HubConfig, RunPlan
from cloud.record.queries import EventRow
from cloud.record.store import Store
from federation.errors import ConfigError
from federation.protocol.messages import INLINE_BYTES
from twin.fitting import Absence, Part

AT_ONCE_S = 1.0
"""An update that comes so soon after its device's return, beside its way, was ready before it."""

_PAGE = 5_000
_RESTARTED = "the hub has restarted"


class RoundTimes(msgspec.Struct, frozen=True, kw_only=True):
    """When a round opened and ended, in seconds since the run opened, and how."""

    number: int
    status: str
    opened_s: float
    ended_s: float
    asked: int

    @property
    def lasted_s(self) -> float:
        """From its opening to its end."""
        return self.ended_s - self.opened_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What a hub saw of one run. Times are seconds since the run opened.

    `joined_s` says when each device was first heard of; before the run is below 0. The hub's
    own absences are those that fell into a round; between two rounds nothing tells of them.
    """

    run: str
    parts: tuple[Part, ...]
    absences: tuple[Absence, ...]
    hub_absences: tuple[Absence, ...]
    joined_s: dict[str, float]
    levels: dict[str, int]
    rounds: tuple[RoundTimes, ...]


def read_hub(folder: Path, run: str = "") -> tuple[RunPlan, Observed]:
    """The plan of a run of this hub's folder and what the hub saw of it (without `run`: the last).

    Raises:
        ConfigError: no hub's record is there, or no such run in it.
        StoreError: the record cannot be read.
    """
    if not (folder / "hub.db").is_file():
        raise ConfigError(
            f"there is no hub.db in {folder}; the folder of a hub was expected: "
            "name the folder that its hub.toml names"
        )
    store = Store(HubConfig(folder=folder).database_url)
    try:
        known = store.runs()
        if not known:
            raise ConfigError(f"the hub of {folder} has had no run; let one finish first")
        status = store.run_status(run) if run else known[-1]
        return status.plan, observe(read_events(store), status.plan.name)
    finally:
        store.close()


def read_events(store: Store) -> Iterator[EventRow]:
    """The whole log in order, a page at a time."""
    last = 0
    while page := store.events(None, last, _PAGE):
        yield from page
        last = page[-1].id


def read_log(lines: Iterable[bytes]) -> Iterator[EventRow]:
    """The same of the lines of an `events.jsonl`, as a simulation leaves it.

    Raises:
        ConfigError: a line that is no event.
    """
    for number, line in enumerate(lines, start=1):
        try:
            said = msgspec.json.decode(line, type=dict[str, Any])
            yield msgspec.convert({"id": number, **said}, EventRow)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"line {number} is no event ({error}); expected a line of events.jsonl: "
                "give the file as a simulation left it"
            ) from error


def observe(events: Iterable[EventRow], run: str) -> Observed:
    """What the log says of this run. Entries that make no sense are passed over."""
    watch = _Watch(run)
    for event in events:
        watch.take(event)
    return watch.observed()


@dataclass(slots=True)
class _Device:
    """What is known of a device so far.

    `cut_short` is the attempt that its absence interrupted. `way_s` is what its last training
    took beside its loop. With `is_doubtful` nothing tells whether its process has trained: it
    may have begun anew, and gone on with that attempt.
    """

    has_trained: bool = False
    is_doubtful: bool = False
    away_since: float | None = None
    cut_short: tuple[int, str] | None = None
    back_at: float = -math.inf
    way_s: float = 0.0
    last_absence: int | None = None


@dataclass(slots=True)
class _Watch:
    """Goes through a log once."""

    run: str
    began: float | None = None
    base_sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    devices: dict[str, _Device] = field(default_factory=dict)
    levels: dict[str, int] = field(default_factory=dict)
    joined: dict[str, float] = field(default_factory=dict)
    parts: dict[tuple[int, str], Part] = field(default_factory=dict)
    open: set[tuple[int, str]] = field(default_factory=set)
    absences: list[Absence] = field(default_factory=list)
    hub_absences: list[Absence] = field(default_factory=list)
    rounds: dict[int, RoundTimes] = field(default_factory=dict)
    last_at: float = -math.inf

    def take(self, event: EventRow) -> None:
        """Take one entry of the log in."""
        if event.run not in ("", self.run):
            self._pass_over(event)
            return
        match event.kind:
            case "run-opened":
                self.began = event.at
                self._learn_base(event.detail)
            case "device-born":
                self._on_born(event)
            case "presence-changed" if event.detail.get("state") != "ready":
                self._on_lost(event)
            case "round-opened":
                self._on_opened(event)
            case "attempt-changed":
                self._on_changed(event)
            case "update-accepted":
                self._on_update(event)
            case "update-refused":
                self._on_late(event)
            case "round-closed" | "round-abandoned":
                self._on_ended(event)
            case _:
                pass
        self.last_at = event.at

    def observed(self) -> Observed:
        """All of it, in seconds since the run opened."""
        began = self.began or 0.0
        gone = [
            Absence(device=name, from_s=known.away_since, until_s=math.inf)
            for name, known in self.devices.items()
            if known.away_since is not None
        ]
        return Observed(
            run=self.run,
            parts=tuple(_since(part, began) for part in self.parts.values()),
            absences=tuple(_shifted(away, began) for away in [*self.absences, *gone]),
            hub_absences=tuple(_shifted(away, began) for away in self.hub_absences),
            joined_s={name: at - began for name, at in self.joined.items()},
            levels=self.levels,
            rounds=tuple(
                msgspec.structs.replace(
                    row, opened_s=row.opened_s - began, ended_s=row.ended_s - began
                )
                for row in self.rounds.values()
                if math.isfinite(row.ended_s)
            ),
        )

    def _pass_over(self, event: EventRow) -> None:
        """Of other runs it counts only that a process has trained."""
        if event.kind == "attempt-changed" and event.detail.get("status") == "training":
            self.devices.setdefault(event.device, _Device()).has_trained = True

    # Devices come and go ------------------------------------------------------------------

    def _on_born(self, event: EventRow) -> None:
        name, at = event.device, event.at
        self.joined.setdefault(name, at)
        capability = event.detail.get("capability")
        if isinstance(capability, dict) and isinstance(capability.get("level"), int):
            self.levels[name] = capability["level"]
        known = self.devices.setdefault(name, _Device())
        self._disturb(name)
        if known.away_since is None:
            return
        self.absences.append(Absence(device=name, from_s=known.away_since, until_s=at))
        known.last_absence, known.is_doubtful = len(self.absences) - 1, True
        if known.cut_short is not None:
            # Unless its update shows in a moment that it trained on meanwhile.
            self.absences[-1] = replace(self.absences[-1], is_restart=True)
        known.away_since, known.back_at = None, at

    def _on_lost(self, event: EventRow) -> None:
        known = self.devices.setdefault(event.device, _Device())
        if known.away_since is not None:
            return
        known.away_since = event.at
        attempts = [place for place in self.open if place[1] == event.device]
        known.cut_short = attempts[0] if attempts else None
        self._disturb(event.device)

    def _disturb(self, device: str) -> None:
        for place in [place for place in self.open if place[1] == device]:
            self.parts[place] = replace(self.parts[place], is_whole=False)

    # Rounds -------------------------------------------------------------------------------

    def _learn_base(self, detail: dict[str, Any]) -> None:
        content = detail.get("content")
        if isinstance(content, dict) and isinstance(content.get("digest"), str):
            self.base_sizes[content["digest"]] = _size(content)

    def _on_opened(self, event: EventRow) -> None:
        number, named = event.round, event.detail.get("attempts")
        asked = [name for name in named if isinstance(name, str)] if _is_list(named) else []
        size, chunks = self.base_sizes.get(str(event.detail.get("base")), (0, 0))
        self.rounds[number] = RoundTimes(
            number=number, status="open", opened_s=event.at, ended_s=math.inf, asked=len(asked)
        )
        self.open = {(number, name) for name in asked}
        for name in asked:
            known = self.devices.setdefault(name, _Device())
            self.parts[number, name] = Part(
                device=name,
                round=number,
                asked_at=event.at,
                down_bytes=size,
                down_chunks=chunks,
                is_first=not known.has_trained,
                is_whole=not known.is_doubtful,
            )

    def _on_changed(self, event: EventRow) -> None:
        place, status = (event.round, event.device), event.detail.get("status")
        part = self.parts.get(place)
        if part is None:
            return
        if status == "accepted" and part.accepted_at is None:
            part = replace(part, accepted_at=event.at)
        elif status == "training" and part.training_at is None:
            part = replace(part, training_at=event.at)
            if part.accepted_at is None:  # All rode within the letter: so it says one word.
                part = replace(part, accepted_at=event.at)
            if part.accepted_at == event.at:  # Nothing was fetched: all rides within letters.
                part = replace(part, down_chunks=0)
            known = self.devices[event.device]
            known.has_trained, known.is_doubtful = True, False
        elif status == "lost":
            part = replace(part, is_whole=False)
            if event.detail.get("reason") == _RESTARTED:
                self._on_hub_back(event.at)
        self.parts[place] = part

    def _on_hub_back(self, at: float) -> None:
        """The hub says so of each device at one time; it was last there when it last wrote."""
        if not self.hub_absences or self.hub_absences[-1].until_s != at:
            away = Absence(device="hub", from_s=self.last_at, until_s=at, is_restart=True)
            self.hub_absences.append(away)

    def _on_update(self, event: EventRow) -> None:
        part = self.parts.get((event.round, event.device))
        report, content = event.detail.get("report"), event.detail.get("content")
        if part is None or not isinstance(report, dict) or not isinstance(content, dict):
            return
        size, chunks = _size(content)
        self.parts[event.round, event.device] = replace(
            part,
            received_at=event.at,
            seconds=_number(report.get("seconds")),
            steps=_count(report.get("steps")),
            samples=_count(report.get("samples")),
            up_bytes=size,
            up_chunks=chunks if part.down_chunks else 0,
        )
        self._on_late(event)
        self.open.discard((event.round, event.device))
        seconds = _number(report.get("seconds"))
        if part.is_whole and part.training_at is not None and seconds >= 0:
            known = self.devices.setdefault(event.device, _Device())
            known.way_s = max(event.at - part.training_at - seconds, 0.0)

    def _on_late(self, event: EventRow) -> None:
        """An update: if it was ready when its device came back, its process had lived on."""
        known = self.devices.get(event.device)
        if known is None or known.cut_short is None or known.away_since is not None:
            return
        if event.at - known.back_at <= AT_ONCE_S + known.way_s and known.last_absence is not None:
            lived_on = replace(self.absences[known.last_absence], is_restart=False)
            self.absences[known.last_absence] = lived_on
        known.cut_short, known.is_doubtful = None, False

    def _on_ended(self, event: EventRow) -> None:
        row = self.rounds.get(event.round)
        if row is not None:
            status = event.kind.removeprefix("round-")
            ended = msgspec.structs.replace(row, status=status, ended_s=event.at)
            self.rounds[event.round] = ended
        self._learn_base(event.detail)
        self.open = set()


def _since(part: Part, began: float) -> Part:
    moments = {
        name: at - began
        for name in ("asked_at", "accepted_at", "training_at", "opened_at", "received_at")
        if (at := getattr(part, name)) is not None
    }
    return replace(part, **moments)


def _shifted(away: Absence, began: float) -> Absence:
    return replace(away, from_s=away.from_s - began, until_s=away.until_s - began)


def _size(content: dict[str, Any]) -> tuple[int, int]:
    """Bytes and chunks of a content; no chunks where it rides in its letter."""
    size, chunk_bytes = content.get("size"), content.get("chunk_bytes")
    if not isinstance(size, int) or not isinstance(chunk_bytes, int) or chunk_bytes < 1:
        return 0, 0
    return size, 0 if size <= INLINE_BYTES else -(-size // chunk_bytes)


def _is_list(value: object) -> TypeGuard[list[object]]:
    return isinstance(value, list)


def _count(value: object) -> int:
    return value if isinstance(value, int) else -1


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan
