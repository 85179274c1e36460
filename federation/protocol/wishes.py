"""What a hub may desire of a device, beside training: two letters, and the keys they know.

`DesiredState` is always whole, and so is its answer: whoever missed some has missed nothing. A
device obeys a newer version only, key by key, and says of each whether it is `applied`,
`rejected: ...` or `unsupported`. A hub may desire keys that a device does not know yet.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

import msgspec

from federation.errors import ProtocolError

APPLIED, UNSUPPORTED, REJECTED = "applied", "unsupported", "rejected"

DAY_S, HOUR_S = 86_400.0, 3600.0


class DesiredState(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="letter", tag="desired-state"
):
    """All that the hub desires of a device; `version` grows with every change."""

    version: int
    document: dict[str, Any]


class ReportedState(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="letter", tag="reported-state"
):
    """All that a device says of how it is set up.

    `applied` is the version it obeys (0: none ever came) and `results` what it made of each key.
    `document` has its `settings` in effect and, where its owner gave them, the figures of its
    `energy`.
    """

    applied: int = 0
    results: dict[str, str] = {}
    document: dict[str, Any] = {}


OfTwins: TypeAlias = DesiredState | ReportedState


def objection_to(key: str, value: Any) -> str | None:
    """Why no device can obey this; empty where one can, None where the key is not known.

    Known are:
        enabled: Whether the device trains at all.
        heartbeat_s: Seconds between two signs of life, 1 to 86,400.
        allowed_hours: Begin and end of the hours of the day (UTC) in which it begins to train;
            over midnight where the first is the later.
        max_bytes_per_day: What models and updates may come to in a day (UTC).
    """
    check = _CHECKS.get(key)
    return None if check is None else check(value)


def check_wishes(document: Mapping[str, Any]) -> None:
    """See that each known key has a value that can be obeyed.

    Raises:
        ProtocolError: one has not.
    """
    for key, value in document.items():
        if why := objection_to(key, value):
            raise ProtocolError(why)


def is_within(hours: tuple[float, float], now: float) -> bool:
    """Whether a moment, in seconds since 1970, is within these hours of the day (UTC)."""
    begin, end = hours
    hour = now % DAY_S / HOUR_S
    return begin <= hour < end if begin <= end else hour >= begin or hour < end


def _enabled(value: Any) -> str:
    return "" if isinstance(value, bool) else f"enabled is {value!r}; expected true or false"


def _heartbeat(value: Any) -> str:
    fits = _is_number(value) and 1.0 <= value <= DAY_S
    return "" if fits else f"heartbeat_s is {value!r}; expected 1 to {DAY_S:g} seconds"


def _hours(value: Any) -> str:
    fits = (
        isinstance(value, list)
        and len(value) == 2
        and all(_is_number(hour) and 0.0 <= hour <= 24.0 for hour in value)
    )
    return "" if fits else f"allowed_hours is {value!r}; expected two hours from 0 to 24"


def _bytes(value: Any) -> str:
    fits = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return "" if fits else f"max_bytes_per_day is {value!r}; expected a whole number from 0 on"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_CHECKS: Mapping[str, Callable[[Any], str]] = MappingProxyType(
    {
        "enabled": _enabled,
        "heartbeat_s": _heartbeat,
        "allowed_hours": _hours,
        "max_bytes_per_day": _bytes,
    }
)
