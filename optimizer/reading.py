# ruff: noqa: N806 - capitals at the end of a name are the shape of its array
"""Between the table's places and the names that people and devices know."""

import numpy as np

from optimizer.columns import Columns
from optimizer.plan import Choice, Plan, Prices, WhyStopped
from optimizer.pricing import Duals
from optimizer.sweep import Sweep, relative_gap


def duals_of(table: Columns, near: Prices | None) -> Duals | None:
    """Prices told before, at this table's places; those of other users' number are scaled."""
    if near is None or near.users == 0:
        return None
    gateways = [gateway.name for gateway in table.problem.gateways]
    share = near.users / max(1, table.users)
    uplink = [near.uplink.get(name, 0.0) * share for name in gateways]
    return Duals(
        np.array([*uplink, 0.0]),
        near.server * share,
        near.accuracy * share if table.is_floored else 0.0,
    )


def prices_of(table: Columns, duals: Duals, makespan_s: float) -> Prices:
    """Prices under the gateways' names, as they can be told to devices."""
    names = [gateway.name for gateway in table.problem.gateways]
    uplink = dict(zip(names, duals.uplink_G[:-1].tolist(), strict=True))
    return Prices(uplink, duals.server, duals.accuracy, table.time_price, makespan_s, table.users)


def plan_of(table: Columns, state: Sweep, lower: float, why: WhyStopped) -> Plan:
    """The best plan known, in names and units."""
    raw_N, rows = state.best.raw_N, np.arange(table.rows)
    makespan_s = float(table.seconds_NR[rows, raw_N].max(initial=0.0))
    choices = tuple(choice_of(table, row, int(raw_N[row])) for row in range(table.users))
    objective = state.best.objective + table.cost_offset
    bound = min(objective, lower + table.cost_offset)
    has_teacher = table.rows > table.users
    units = int(table.layout.server_R[raw_N[-1]]) if has_teacher else table.teacher_units_before
    teacher_s = float(table.seconds_NR[-1, raw_N[-1]]) if has_teacher else table.seconds_offset
    before_j = table.teacher_units_before * table.seconds_offset
    return Plan(
        choices=choices,
        makespan_s=makespan_s + table.seconds_offset,
        energy_j=float(table.energy_NR[rows, raw_N].sum()),
        server_energy_j=float(table.server_energy_NR[rows, raw_N].sum())
        + before_j * table.problem.server.watts_per_unit,
        accuracy=sum(choice.accuracy for choice in choices) / max(1, table.users),
        objective=objective,
        bound=bound,
        gap=relative_gap(objective, bound),
        prices=prices_of(table, state.duals, makespan_s),
        why_stopped=why,
        teacher_units=units,
        teacher_s=teacher_s,
    )


def choice_of(table: Columns, row: int, raw: int) -> Choice:
    """What a column (its place in R) has the user of a row do."""
    user, layout, problem = table.problem.users[row], table.layout, table.problem
    place, mode, student = layout.place_of(raw), int(layout.mode_R[raw]), int(layout.student_R[raw])
    accuracy = float(table.accuracy_NR[row, raw])
    if place == "out":
        return Choice(user.name, "out", accuracy=accuracy)
    sent = problem.students[student].update_bytes
    if place == "twin":
        sent = user.twin.unseen_bytes if user.twin is not None else 0.0
    return Choice(
        user=user.name,
        place=place,
        student=problem.students[student].name,
        mode=user.modes[mode].name if place == "device" else None,
        server_units=int(layout.server_R[raw]),
        uplink_units=int(layout.uplink_R[raw]),
        seconds=float(table.seconds_NR[row, raw]),
        energy_j=float(table.energy_NR[row, raw]),
        server_energy_j=float(table.server_energy_NR[row, raw]),
        accuracy=accuracy,
        bytes_up=float(sent),
    )
