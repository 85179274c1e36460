"""Why does nothing happen, why was that device not asked: the record, put into words."""

import msgspec

from cloud.queries import AttemptRow, RoundRow, RunStatus
from cloud.store import Store


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """What `headwater-hub why RUN` says.

    `waiting` is the reason of the present wait and `remaining_s` how long it may last at most
    (none: nothing is waited for). `not_asked` gives a reason for each device that the newest
    round left out, `dropped` for each it asked in vain, and `abandoned` for each round of the
    run that gave no model.
    """

    run: str
    status: str
    round: int
    waiting: str
    remaining_s: float | None
    not_asked: dict[str, str]
    open: dict[str, str]
    dropped: dict[str, str]
    abandoned: dict[str, str]


def explain(store: Store, run: str, now: float) -> Explanation:
    """Why this run is where it is.

    Raises:
        ConfigError: there is no such run.
        StoreError: the record cannot be read.
    """
    status = store.run_status(run)
    newest = [row for row in store.rounds(run) if row.number == status.round]
    attempts = store.attempts(run, status.round) if newest else []
    return Explanation(
        run=run,
        status=status.status,
        round=status.round,
        waiting=_waiting(status),
        remaining_s=_remaining_s(status, now),
        not_asked=store.excluded(run, status.round) if newest else {},
        open={
            a.device: a.status for a in attempts if a.status in ("assigned", "accepted", "training")
        },
        dropped=_dropped(attempts),
        abandoned=_abandoned(store.rounds(run)),
    )


def _waiting(status: RunStatus) -> str:
    if status.status == "requested":
        return "the hub has not opened it yet: it is not running, or another run is active"
    if status.status != "active":
        return f"nothing; the run is {status.status}: {status.reason}"
    return status.wait.reason if status.wait is not None else "nothing; a round is about to open"


def _remaining_s(status: RunStatus, now: float) -> float | None:
    if status.status != "active" or status.wait is None:
        return None
    return max(status.wait.until - now, 0.0)


def _dropped(attempts: list[AttemptRow]) -> dict[str, str]:
    gone = ("declined", "failed", "lost", "refused", "cancelled")
    return {
        a.device: f"{a.status}: {a.reason}" if a.reason else a.status
        for a in attempts
        if a.status in gone
    }


def _abandoned(rounds: list[RoundRow]) -> dict[str, str]:
    return {str(row.number): row.reason for row in rounds if row.status == "abandoned"}
