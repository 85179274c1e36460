"""Why does nothing happen, why was that device not asked: the record, put into words."""

import math
from collections.abc import Iterable

import msgspec

from cloud.coordination.rounds import OPEN
from cloud.holder import Holder
from cloud.record.queries import AttemptRow, DeviceRow, RoundRow, RunStatus
from cloud.record.store import Store

RECENT_ROUNDS = 10
"""How many rounds before the newest are looked at for devices that fell out."""

_FELL_OUT = ("declined", "failed", "lost", "refused")


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """What `headwater-hub why RUN` says.

    `waiting` is the reason of the present wait, `remaining_s` how long it may last at most
    (none: nothing is waited for, or nobody knows), and `advice` what the operator may do. All
    that follows gives a sentence for each device, and for each abandoned round: `received` and
    `open` were asked in the newest round, `dropped` were asked in it in vain, `not_asked` were
    left out of it, `not_there` could not be asked now, and `fell_out` dropped out of one of the
    rounds shortly before.
    """

    run: str
    status: str
    round: int
    rounds: int
    is_hub_running: bool
    waiting: str
    remaining_s: float | None
    advice: str
    received: tuple[str, ...]
    open: dict[str, str]
    dropped: dict[str, str]
    not_asked: dict[str, str]
    not_there: dict[str, str]
    fell_out: dict[str, str]
    abandoned: dict[str, str]


def explain(store: Store, run: str, holder: Holder | None, now: float) -> Explanation:
    """Why this run is where it is; `holder` is the hub at work, if one is.

    Raises:
        ConfigError: there is no such run.
        StoreError: the record cannot be read.
    """
    status = store.run_status(run)
    rounds = store.rounds(run)
    newest = rounds[-1] if rounds else None
    attempts = store.attempts(run, newest.number) if newest else []
    absent = absences(store.devices(), holder)
    is_gathering = status.status == "active" and not status.is_open
    waiting, remaining_s, advice = _wait(store, status, newest, absent, holder, now)
    return Explanation(
        run=run,
        status=status.status,
        round=status.round,
        rounds=status.plan.rounds,
        is_hub_running=holder is not None,
        waiting=waiting,
        remaining_s=remaining_s,
        advice=advice,
        received=() if is_gathering else _received(attempts),
        open=_open(attempts, absent, status, now) if status.is_open else {},
        dropped={} if is_gathering else _dropped(attempts, status, now),
        not_asked=store.excluded(run, newest.number) if newest and not is_gathering else {},
        not_there={name: why for name, why in absent.items() if why} if is_gathering else {},
        fell_out=_fell_out(store, rounds if is_gathering else rounds[:-1]),
        abandoned={str(row.number): row.reason for row in rounds if row.status == "abandoned"},
    )


def absences(devices: Iterable[DeviceRow], holder: Holder | None) -> dict[str, str]:
    """Of every known device why it could not be asked now; empty where it could."""
    return {entry.device: _absence(entry, holder) for entry in devices}


def _absence(device: DeviceRow, holder: Holder | None) -> str:
    reasons = {
        "lost": "its link was lost",
        "disconnected": "it said goodbye",
    }
    if device.state != "ready":
        return reasons.get(device.state, f"it is {device.state}")
    if holder is None:
        return "no hub is running that could ask it"
    if max(device.born_at, device.changed_at) < holder.since:
        return "not heard of since the hub started"
    return "" if device.capability.trains else "it does not train, it only infers"


Wait = tuple[str, float | None, str]
"""What is waited for, for how many seconds at most, and what the operator may do."""


def _wait(
    store: Store,
    status: RunStatus,
    newest: RoundRow | None,
    absent: dict[str, str],
    holder: Holder | None,
    now: float,
) -> Wait:
    if status.status not in ("requested", "active"):
        return f"nothing: it is {status.status} ({status.reason})", None, ""
    if holder is None:
        return (
            "a hub: none is running here",
            None,
            "Start it with `headwater-hub serve`; the run goes on where it was.",
        )
    if status.status == "requested":
        return _wait_in_queue(store, status)
    if newest is not None and status.is_open:
        return _wait_for_updates(newest, status, now)
    return _wait_for_devices(absent, status, now)


def _wait_in_queue(store: Store, status: RunStatus) -> Wait:
    ahead = []
    for other in store.runs():
        if other.plan.name == status.plan.name:
            break
        if other.status in ("requested", "active"):
            ahead.append(f"{other.plan.name} (round {other.round} of {other.plan.rounds})")
    if not ahead:
        return "its beginning, which comes in a moment", None, ""
    advice = "One run is active at a time; `headwater-hub stop RUN` ends one before its time."
    return f"the end of {', '.join(ahead)}", None, advice


def _wait_for_updates(newest: RoundRow, status: RunStatus, now: float) -> Wait:
    policy = status.plan.policy
    target = min(policy.devices_per_round, newest.asked)
    waiting = (
        f"updates: {newest.received} of {target} are in; "
        f"at the deadline the round makes do with {policy.quorum}"
    )
    deadline = min(newest.deadline, now + policy.deadline_s)
    return waiting, max(deadline - now, 0.0), ""


def _wait_for_devices(absent: dict[str, str], status: RunStatus, now: float) -> Wait:
    policy = status.plan.policy
    there = sum(1 for why in absent.values() if not why)
    waiting = f"devices: {there} of {policy.wanted} are there"
    # The record keeps the end of the first such wait; each of those that follow is as long.
    until = status.wait.until if status.wait is not None else now
    if policy.gather_s > 0 and until < now:
        until += math.ceil((now - until) / policy.gather_s) * policy.gather_s
    remaining_s = max(until - now, 0.0)
    if there >= policy.quorum:
        return f"{waiting}; after that it begins with {policy.quorum} or more", remaining_s, ""
    advice = (
        f"Switch on more devices, or ask for a run with a smaller policy.quorum; after "
        f"{policy.max_abandoned + 1} waits of {policy.gather_s:g} s in vain the run fails."
    )
    return f"{waiting}; a round needs {policy.quorum}", remaining_s, advice


def _received(attempts: list[AttemptRow]) -> tuple[str, ...]:
    return tuple(entry.device for entry in attempts if entry.status == "received")


def _open(
    attempts: list[AttemptRow], absent: dict[str, str], status: RunStatus, now: float
) -> dict[str, str]:
    doing = {
        "assigned": "was asked {}, and has not answered yet",
        "accepted": "accepted {}, and fetches the model",
        "training": "began to train {}",
    }
    found = {}
    for entry in attempts:
        if entry.status in OPEN:
            said = doing[entry.status].format(ago(now - entry.changed_at))
            why = absent.get(entry.device, "")
            found[entry.device] = f"{said}; {why}" if why else said
        elif entry.status == "lost" and (left_s := _grace_s(entry, status, now)) > 0:
            found[entry.device] = f"{entry.reason}; waited for at most {left_s:.0f} s more"
    return found


def _grace_s(entry: AttemptRow, status: RunStatus, now: float) -> float:
    return entry.changed_at + status.plan.policy.lost_grace_s - now


def _dropped(attempts: list[AttemptRow], status: RunStatus, now: float) -> dict[str, str]:
    found = {}
    for entry in attempts:
        if entry.status == "lost" and status.is_open and _grace_s(entry, status, now) > 0:
            continue
        if entry.status in (*_FELL_OUT, "cancelled"):
            found[entry.device] = _fate(entry)
    return found


def _fell_out(store: Store, rounds: list[RoundRow]) -> dict[str, str]:
    """The devices that dropped out of recent rounds: how often, and what was the last reason."""
    recent = rounds[-RECENT_ROUNDS:]
    times: dict[str, int] = {}
    last: dict[str, str] = {}
    for row in recent:
        for entry in store.attempts(row.run, row.number):
            if entry.status in _FELL_OUT:
                times[entry.device] = times.get(entry.device, 0) + 1
                last[entry.device] = f"round {row.number}: {_fate(entry)}"
    return {
        device: f"{said} ({times[device]} of the last {len(recent)} rounds)"
        for device, said in last.items()
    }


def _fate(entry: AttemptRow) -> str:
    return f"{entry.status}: {entry.reason}" if entry.reason else entry.status


def ago(seconds: float) -> str:
    """A time past in the largest unit that is not zero."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} s ago"
