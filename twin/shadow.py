"""The shadow of a device: what is desired of it, what it reported, and how old each word is.

Two writers never share a part: the device alone writes `reported`, the hub alone `desired` and
`tags`. Each part has a version of its own, so that a device that reports often stands in nobody's
way who writes a wish (as in KubeEdge); `revision` counts the changes of all parts together.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, TypeAlias

import msgspec

from federation.errors import TwinConflictError, TwinError
from twin.merging import (
    JsonObject,
    check_document,
    check_patch,
    delta,
    difference,
    leaves,
    merge_patch,
)

PartName: TypeAlias = Literal["desired", "reported", "tags"]
Writer: TypeAlias = Literal["hub", "device"]

Source: TypeAlias = Literal["measured", "configured", "inferred", "simulated"]
"""Where a value is from: seen, set by a person, computed from others, or of no real device."""

Freshness: TypeAlias = Literal["live", "fresh", "stale", "lost", "presumed dead"]
"""From best to worst. Live: in its time to live, and the device is there."""

OWNER: Mapping[PartName, Writer] = MappingProxyType(
    {"desired": "hub", "tags": "hub", "reported": "device"}
)

LOST_S = 3600.0
"""A device that is away so long is lost: what it said has outlived its time to live for good."""

PRESUMED_DEAD_S = 30 * 24 * 3600.0

TIME_TO_LIVE_S: Mapping[str, float] = MappingProxyType(
    {
        "connection": math.inf,
        "hardware": 30 * 24 * 3600.0,
        "settings": 24 * 3600.0,
        "applied": 24 * 3600.0,
        "training": 7 * 24 * 3600.0,
    }
)
"""How long a reported feature, a key of the document's top, is believed without being repeated.

The broker tells the end of a connection by itself: that it is there stays true until then.
"""

USUAL_TIME_TO_LIVE_S = 24 * 3600.0


class Leaf(msgspec.Struct, frozen=True, kw_only=True):
    """When a value was true, on the hub's clock within `error_s`; when it came; where from."""

    at: float
    received_at: float
    source: Source
    error_s: float = 0.0


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """One document with its version; `leaves` are by JSON pointer."""

    version: int = 0
    state: JsonObject = {}
    leaves: dict[str, Leaf] = {}


class Shadow(msgspec.Struct, frozen=True, kw_only=True):
    """What is known and wished of one device."""

    device: str
    revision: int = 0
    created_at: float
    modified_at: float
    desired: Part = Part()
    reported: Part = Part()
    tags: Part = Part()

    def part(self, name: PartName) -> Part:
        """The part of this name."""
        found: Part = getattr(self, name)
        return found


class Edit(msgspec.Struct, frozen=True, kw_only=True):
    """A patch that somebody wants merged into a part. `received_at` is the hub's time.

    `actor` says who and `cause` why, for whoever reads the history.
    """

    writer: Writer
    part: PartName
    patch: JsonObject
    actor: str
    cause: str
    received_at: float
    source: Source = "configured"
    at: float | None = None
    error_s: float = 0.0


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """A patch that was merged: one revision of a shadow. The sum of all is the shadow."""

    device: str
    revision: int
    part: PartName
    version: int
    at: float
    received_at: float
    actor: str
    cause: str
    source: Source
    patch: JsonObject
    error_s: float = 0.0


def write(shadow: Shadow, edit: Edit, expected: int | None = None) -> tuple[Shadow, Change | None]:
    """Merge a patch into a part, if its writer may and nobody wrote in between.

    A patch that changes no value makes no revision, but what it repeats is young again.

    Args:
        shadow: As it is.
        edit: What is to change.
        expected: The version of the part that the writer has seen; None writes over any.

    Raises:
        TwinConflictError: the part has another version.
        TwinError: the part belongs to the other writer, or the patch or what comes of it
            cannot be kept.
    """
    if OWNER[edit.part] != edit.writer:
        raise TwinError(
            f"the {edit.writer} may not write what is {edit.part}; "
            f"only the {OWNER[edit.part]} may: write another part"
        )
    part = shadow.part(edit.part)
    if expected is not None and expected != part.version:
        raise TwinConflictError(
            f"{edit.part} of {shadow.device} has version {part.version}, and the patch was made "
            f"for {expected}: read it again and decide anew"
        )
    patch = check_patch(edit.patch)
    after = check_document(merge_patch(part.state, patch))
    effective = difference(part.state, after)
    at = edit.received_at if edit.at is None else edit.at
    if not effective:
        return _repeated(shadow, edit, at), None
    change = Change(
        device=shadow.device,
        revision=shadow.revision + 1,
        part=edit.part,
        version=part.version + 1,
        at=at,
        received_at=edit.received_at,
        actor=edit.actor,
        cause=edit.cause,
        source=edit.source,
        patch=effective,
        error_s=edit.error_s,
    )
    return _repeated(apply(shadow, change), edit, at), change


def apply(shadow: Shadow, change: Change) -> Shadow:
    """Gives the shadow after a change that once was made to it.

    Raises:
        TwinError: the change is not the next one.
    """
    if change.revision != shadow.revision + 1:
        raise TwinError(
            f"revision {change.revision} cannot follow {shadow.revision} of {shadow.device}: "
            "the history has a gap; begin from a later snapshot"
        )
    part = shadow.part(change.part)
    state = merge_patch(part.state, change.patch)
    leaf = Leaf(
        at=change.at,
        received_at=change.received_at,
        source=change.source,
        error_s=change.error_s,
    )
    said = {pointer for pointer, _ in leaves(change.patch)}
    kept = {
        pointer: leaf if pointer in said else part.leaves.get(pointer, leaf)
        for pointer, _ in leaves(state)
    }
    after = Part(version=change.version, state=state, leaves=kept)
    return msgspec.structs.replace(
        shadow,
        revision=change.revision,
        modified_at=change.received_at,
        **{change.part: after},
    )


def is_in_sync(shadow: Shadow) -> bool:
    """Whether the device said of the newest desired version what it made of each key."""
    if not shadow.desired.state and not shadow.desired.version:
        return True
    applied = shadow.reported.state.get("applied")
    return isinstance(applied, dict) and applied.get("version") == shadow.desired.version


def wanting(shadow: Shadow) -> JsonObject:
    """Gives what is desired and not in effect on the device as far as it said."""
    settings = shadow.reported.state.get("settings")
    return delta(shadow.desired.state, settings if isinstance(settings, dict) else {})


def freshness(age_s: float, time_to_live_s: float, *, is_there: bool, away_s: float) -> Freshness:
    """How far a value can be believed; with time alone it only gets worse."""
    if not is_there and away_s >= PRESUMED_DEAD_S:
        return "presumed dead"
    if age_s <= time_to_live_s:
        return "live" if is_there else "fresh"
    return "lost" if not is_there and away_s >= LOST_S else "stale"


def staleness(shadow: Shadow, now: float) -> dict[str, Freshness]:
    """How far each reported feature can be believed, from the oldest of its values."""
    oldest: dict[str, float] = {}
    for pointer, leaf in shadow.reported.leaves.items():
        feature = pointer.split("/", 2)[1].replace("~1", "/").replace("~0", "~")
        age_s = now - leaf.at + leaf.error_s
        oldest[feature] = max(oldest.get(feature, 0.0), age_s)
    is_there, away_s = presence(shadow, now)
    return {
        feature: freshness(
            age_s,
            TIME_TO_LIVE_S.get(feature, USUAL_TIME_TO_LIVE_S),
            is_there=is_there,
            away_s=away_s,
        )
        for feature, age_s in oldest.items()
    }


def presence(shadow: Shadow, now: float) -> tuple[bool, float]:
    """Whether the device is there, and else for how many seconds it has been away."""
    leaf = shadow.reported.leaves.get("/connection/state")
    connection = shadow.reported.state.get("connection", {})
    if leaf is None or connection.get("state") == "ready":
        return leaf is not None, 0.0
    return False, max(now - leaf.at, 0.0)


def _repeated(shadow: Shadow, edit: Edit, at: float) -> Shadow:
    """The shadow with what the patch says of it being young again."""
    part = shadow.part(edit.part)
    said = {pointer for pointer, value in leaves(edit.patch) if value is not None}
    leaf = Leaf(at=at, received_at=edit.received_at, source=edit.source, error_s=edit.error_s)
    young = dict.fromkeys(said & part.leaves.keys(), leaf)
    if not young:
        return shadow
    renewed = msgspec.structs.replace(part, leaves=part.leaves | young)
    return msgspec.structs.replace(shadow, **{edit.part: renewed})
