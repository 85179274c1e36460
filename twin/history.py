"""A shadow as it was: at a revision or at a time, from the last snapshot and the changes since."""

from collections.abc import Iterable
from dataclasses import dataclass

from federation.errors import TwinError
from twin.shadow import Change, Shadow, apply

SNAPSHOT_EVERY = 50
"""A shadow is kept whole at every so many revisions: no look into the past replays more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """How much of the past is kept: the newest `changes`, and of those none older than `age_s`."""

    changes: int = 1000
    age_s: float = 90 * 24 * 3600.0


def needs_snapshot(revision: int) -> bool:
    """Whether a shadow of this revision is kept whole."""
    return revision % SNAPSHOT_EVERY == 0


def as_of_revision(snapshot: Shadow, changes: Iterable[Change], revision: int) -> Shadow:
    """Gives the shadow at a revision, from any earlier one.

    Raises:
        TwinError: the snapshot is later, or changes between the two are missing.
    """
    shadow = snapshot
    for change in changes:
        if shadow.revision < change.revision <= revision:
            shadow = apply(shadow, change)
    if shadow.revision != revision:
        raise TwinError(
            f"{snapshot.device} cannot be told at revision {revision}: what is kept of its past "
            f"leads to {shadow.revision}; ask for that, or a later one"
        )
    return shadow


def as_of_time(snapshot: Shadow, changes: Iterable[Change], at: float) -> Shadow:
    """Gives the shadow as the hub had it at a time, from one that is not of later.

    Raises:
        TwinError: changes between the two are missing.
    """
    shadow = snapshot
    for change in changes:
        if change.received_at > at:
            break
        if change.revision > shadow.revision:
            shadow = apply(shadow, change)
    return shadow
