"""Fits each device's physics to what a hub saw of it in real rounds; pure, and nothing invented.

The path of one part, on the hub's clock: asked, accepted after the letters' way there and back,
training once the base model is there, received when the update is whole. With d the delay of a
letter one way, B bits of a base and U bits of an update that travel in chunks:

    accepted - asked     = 2 d
    training - accepted  = 2 d + B / down
    received - training  = start + overhead + training seconds + 2 d + U / up

Small content rides in its letter: then the second is 0, and the third has no 2 d. `start` counts
for the first training of a process only. What the hub itself takes to record and to aggregate is
in d. Every figure is a median, so that under half of its observations may be anything at all.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import combinations

FEW = 3
"""A rate of a link is told from so many observations on, and a start from one."""

CLEARLY = 3.0
"""A time is told from noise where it is so many of its errors above 0."""

SLACK = 1.05
"""A device's clock may run so much faster than the hub's before its word is not believed."""

LARGEST = 2**63
"""Counts, sizes and moments are below this, as in the hub's record."""

_MAX_PAIRS = 5_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One device's part in one round as a hub saw it; times in seconds of the hub's clock.

    `seconds`, `steps` and `samples` are the device's own words of its training loop. A moment
    that was not seen is None. `opened_at` is when the first letter of the update came. With
    `down_chunks` or `up_chunks` 0 the content rode in its letter. `is_first`: nothing tells that
    this device's process has trained before. `is_whole`: no link was lost meanwhile, so that
    the moments are those of letters that were not late, and `is_first` is sure.
    """

    device: str
    round: int
    asked_at: float
    accepted_at: float | None = None
    training_at: float | None = None
    opened_at: float | None = None
    received_at: float | None = None
    seconds: float = 0.0
    steps: int = 0
    samples: int = 0
    down_bytes: int = 0
    down_chunks: int = 0
    up_bytes: int = 0
    up_chunks: int = 0
    is_first: bool = False
    is_whole: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Absence:
    """A device was away, in seconds of the hub's clock; `until_s` is infinite if for good.

    `is_restart` says whether its process began anew; None where nothing tells.
    """

    device: str
    from_s: float
    until_s: float
    is_restart: bool | None = None


@dataclass(frozen=True, slots=True)
class Figure:
    """A fitted number: a median, how far observations lie around it, and how many they are.

    `spread` is the median distance from the median, scaled to a normal distribution's standard
    deviation.
    """

    value: float
    spread: float
    count: int

    @property
    def error(self) -> float | None:
        """The standard error of the median, for normal noise; None for a single observation."""
        return 1.2533 * self.spread / math.sqrt(self.count) if self.count > 1 else None

    @property
    def is_clear(self) -> bool:
        """Whether the number is told from 0."""
        return self.count >= FEW and self.value > CLEARLY * (self.error or 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFit:
    """The physics of one device as far as its parts tell; `missing` says why a figure is None.

    `overhead_s` is what a training takes beside its loop, `start_s` what the first training of a
    process takes beyond that (its trainer's start). `delay_s` is one letter's way, one direction.
    `away_s` is how long it was away before it was back. `disbelieved` counts trainings whose
    reported numbers cannot be.
    """

    device: str
    seconds_per_step: Figure | None = None
    seconds_per_sample: Figure | None = None
    overhead_s: Figure | None = None
    start_s: Figure | None = None
    delay_s: Figure | None = None
    down_bps: Figure | None = None
    up_bps: Figure | None = None
    away_s: Figure | None = None
    disbelieved: int = 0
    missing: Mapping[str, str] = field(default_factory=dict)


FIGURES = tuple(each.name for each in fields(DeviceFit) if each.type == Figure | None)
"""The names of all figures of a fit."""


def figure_of(observations: Iterable[float]) -> Figure | None:
    """The median of the finite ones, with its spread and count; None where there is none."""
    values = sorted(value for value in observations if math.isfinite(value))
    if not values:
        return None
    middle = statistics.median(values)
    spread = 1.4826 * statistics.median(abs(value - middle) for value in values)
    return Figure(middle, spread, len(values))


def fit_fleet(parts: Sequence[Part], absences: Sequence[Absence] = ()) -> dict[str, DeviceFit]:
    """The physics of each device that any part or absence names, by name, in order."""
    names = sorted({part.device for part in parts} | {away.device for away in absences})
    return {
        name: fit_device(
            name,
            [part for part in parts if part.device == name],
            [away for away in absences if away.device == name],
        )
        for name in names
    }


def fit_device(name: str, parts: Sequence[Part], absences: Sequence[Absence] = ()) -> DeviceFit:
    """The physics of one device, from its own parts and absences; or of many as if of one."""
    missing: dict[str, str] = {}
    sound = [part for part in parts if is_sound(part)]
    told = [part for part in sound if is_believable(part)]

    def noted(figure: str, found: Figure | None, why: str) -> Figure | None:
        if found is None:
            missing[figure] = why
        return found

    delay = noted("delay_s", _delay_s(sound), "no part was accepted without a loss of link")
    known_delay_s = delay.value if delay else 0.0
    down = noted("down_bps", _down_bps(sound), "no fetch took clearly longer than its letters")
    up, why_no_up = _up_bps(told, known_delay_s)
    noted("up_bps", up, why_no_up)
    beside = [(part, _beside_loop_s(part, known_delay_s, up)) for part in told]
    overhead = noted(
        "overhead_s",
        figure_of(seconds for part, seconds in beside if not part.is_first),
        "no training was seen from its begin to its end in a process that had trained before",
    )
    return DeviceFit(
        device=name,
        seconds_per_step=noted("seconds_per_step", _rate(told, lambda p: p.steps), "no step told"),
        seconds_per_sample=noted(
            "seconds_per_sample", _rate(told, lambda p: p.samples), "no sample told"
        ),
        overhead_s=_not_negative(overhead),
        start_s=noted("start_s", _start_s(beside, overhead), _why_no_start(beside)),
        delay_s=_not_negative(delay),
        down_bps=down,
        up_bps=up,
        away_s=noted("away_s", _away_s(absences), "it was never away and back"),
        disbelieved=sum(part.received_at is not None for part in sound) - len(told),
        missing=missing,
    )


def completed(fit: DeviceFit, fleet: DeviceFit) -> DeviceFit:
    """The fit with the whole fleet's figures where its own are missing; `missing` still says so."""
    mine = {name: getattr(fit, name) or getattr(fleet, name) for name in FIGURES}
    return replace(fit, **mine)


def is_sound(part: Part) -> bool:
    """Whether the moments of a part are numbers in their order, and its sizes can be."""
    moments = (part.asked_at, part.accepted_at, part.training_at, part.opened_at, part.received_at)
    seen = [moment for moment in moments if moment is not None]
    sizes = (part.down_bytes, part.up_bytes, part.down_chunks, part.up_chunks)
    can_be = all(0 <= size < LARGEST for size in sizes)
    return can_be and all(abs(at) < LARGEST for at in seen) and seen == sorted(seen)


def is_believable(part: Part) -> bool:
    """Whether what a device said of a finished training fits between asking and receiving."""
    if part.received_at is None or not all(0 <= n < LARGEST for n in (part.steps, part.samples)):
        return False
    longest_s = SLACK * (part.received_at - part.asked_at)
    return 0.0 <= part.seconds <= longest_s  # False for NaN, too.


def _delay_s(parts: Iterable[Part]) -> Figure | None:
    return figure_of(
        (part.accepted_at - part.asked_at) / 2
        for part in parts
        if part.is_whole and part.accepted_at is not None
    )


def _down_bps(parts: Iterable[Part]) -> Figure | None:
    """From each fetch less the letters' way of the same part: both have 2 d in them."""
    return _bps(
        (part.training_at - 2 * part.accepted_at + part.asked_at) / (8 * part.down_bytes)
        for part in parts
        if part.is_whole
        and part.down_chunks
        and part.down_bytes
        and part.accepted_at is not None
        and part.training_at is not None
    )


def _up_bps(parts: Iterable[Part], delay_s: float) -> tuple[Figure | None, str]:
    """From uploads whose begin was seen, else from updates of different sizes; or why not."""
    whole = [part for part in parts if part.is_whole and part.up_bytes and part.received_at]
    seen = [part for part in whole if part.opened_at is not None and part.up_chunks]
    if seen:
        rate = _bps(
            ((part.received_at or 0.0) - (part.opened_at or 0.0) - 2 * delay_s)
            / (8 * part.up_bytes)
            for part in seen
        )
        return rate, "no upload took clearly longer than its letters"
    ends = [
        (8.0 * part.up_bytes, _beside_loop_s(part, delay_s, None))
        for part in whole
        if not part.is_first
    ]
    if len({bits for bits, _ in ends}) < 2:
        return None, "all updates are of one size: what they take is in overhead_s"
    # Theil's slope: the median over all pairs of different sizes.
    pairs = list(combinations(ends, 2))
    chosen = pairs[:: max(1, len(pairs) // _MAX_PAIRS)]
    slopes = [(t - s) / (u - b) for (b, s), (u, t) in chosen if u != b]
    rate = _bps(slopes, count=len(ends))
    return rate, "larger updates did not take clearly longer: what they take is in overhead_s"


def _bps(seconds_per_bit: Iterable[float], count: int | None = None) -> Figure | None:
    found = figure_of(seconds_per_bit)
    if found is None:
        return None
    found = replace(found, count=min(found.count, count or found.count))
    if not found.is_clear or found.value < 1 / LARGEST:
        return None
    return Figure(1 / found.value, found.spread / found.value / found.value, found.count)


def _beside_loop_s(part: Part, delay_s: float, up_bps: Figure | None) -> float:
    """What a training took beside its loop and its update's way; NaN where that was not seen."""
    if not part.is_whole or part.training_at is None or part.received_at is None:
        return math.nan
    letters_s = 2 * delay_s if part.up_chunks else 0.0
    upload_s = 8 * part.up_bytes / up_bps.value if up_bps else 0.0
    return part.received_at - part.training_at - part.seconds - letters_s - upload_s


def _rate(parts: Iterable[Part], count: Callable[[Part], int]) -> Figure | None:
    return figure_of(
        part.seconds / count(part) for part in parts if count(part) > 0 and part.seconds > 0
    )


def _start_s(beside: Sequence[tuple[Part, float]], overhead: Figure | None) -> Figure | None:
    usual_s = overhead.value if overhead else 0.0
    return _not_negative(figure_of(s - usual_s for part, s in beside if part.is_first))


def _why_no_start(beside: Sequence[tuple[Part, float]]) -> str:
    firsts = sum(part.is_first for part, _ in beside)
    return f"none of {firsts} first trainings was seen from its begin to its end"


def _away_s(absences: Iterable[Absence]) -> Figure | None:
    times = (away.until_s - away.from_s for away in absences)
    return figure_of(time_s for time_s in times if time_s >= 0)


def _not_negative(figure: Figure | None) -> Figure | None:
    return replace(figure, value=max(figure.value, 0.0)) if figure else None
