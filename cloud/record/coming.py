"""How devices that come and go change their table, for a whole batch of facts at once."""

from collections.abc import Sequence
from typing import Any, TypeAlias

from sqlalchemy import Connection, bindparam

from cloud.coordination import facts as f
from cloud.record import tables as t
from cloud.record.database import insert_into
from cloud.record.events import bounded_capability

MAX_EPOCH = 2**63 - 1
"""The largest integer of a database column; a letter may carry one bit more."""

Coming: TypeAlias = f.DeviceBorn | f.PresenceChanged


def record_comings(connection: Connection, facts: Sequence[Coming]) -> None:
    """Write these facts as if one after the other; a device never born has no presence."""
    born: dict[str, dict[str, Any]] = {}
    present: dict[str, dict[str, Any]] = {}
    for fact in facts:
        now_is: dict[str, Any] = {"epoch": min(fact.epoch, MAX_EPOCH), "changed_at": fact.at}
        if isinstance(fact, f.DeviceBorn):
            now_is |= {"device": fact.device, "state": "ready", "born_at": fact.at}
            now_is["capability"] = bounded_capability(fact.capability)
            born[fact.device] = now_is
        elif fact.device in born:
            born[fact.device] |= now_is | {"state": fact.state}
        else:
            present[fact.device] = now_is | {"key": fact.device, "state": fact.state}
    if present:
        connection.execute(_change_of_presence(), list(present.values()))
    if born:
        row = insert_into(connection, t.Device)
        columns = ("epoch", "state", "capability", "born_at", "changed_at")
        row = row.on_conflict_do_update(
            index_elements=["device"], set_={name: row.excluded[name] for name in columns}
        )
        connection.execute(row, list(born.values()))


def _change_of_presence() -> Any:
    names = ("epoch", "state", "changed_at")
    # The table, not its class: a class wants its own key among the parameters.
    table = t.Device.__table__
    return (
        table.update()  # type: ignore[attr-defined]
        .where(table.c.device == bindparam("key"))
        .values({name: bindparam(name) for name in names})
    )
