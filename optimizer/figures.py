# ruff: noqa: N806, N815 - capitals at the end of a name are the shape of its array
"""Seconds, joules, accuracy and cost of every column, from the records of users and server.

Shapes: N users, M students, K modes (padded), B unit counts, C = B + 1 unit counts with 0 first,
S server choices, R columns.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from optimizer.layout import OUT, Booleans, Floats, Layout
from optimizer.problem import Problem, User


@dataclass(frozen=True, slots=True, eq=False)
class Facts:
    """What is known of the users, gathered from their records; K modes, padded with infinity."""

    samples_N: Floats
    per_sample_NMK: Floats
    watts_NK: Floats
    goodput_NB: Floats
    radio_watts_N: Floats
    accuracy_NM: Floats
    twin_accuracy_NM: Floats
    unseen_N: Floats
    has_twin_N: Booleans
    absent_N: Floats
    memory_N: Floats
    budget_N: Floats
    min_accuracy_N: Floats
    is_required_N: Booleans
    availability_N: Floats
    battery_N: Floats
    overhead_N: Floats


@dataclass(frozen=True, slots=True, eq=False)
class Figures:
    """Seconds, joules and accuracy of every column, [N, R]."""

    seconds: Floats
    energy: Floats
    server_energy: Floats
    accuracy: Floats


def gather(problem: Problem, layout: Layout) -> Facts:
    """The users' records as arrays."""
    users = problem.users
    names = [student.name for student in problem.students]
    students, modes, _ = layout.device
    by_choice = np.argsort(np.array(problem.uplink_choices))
    goodput = _array([user.goodput_bytes_per_s for user in users], len(by_choice))
    twins = [user.twin.accuracy if user.twin is not None else {} for user in users]

    def column(field: str) -> Floats:
        return np.array([getattr(user, field) for user in users], float)

    return Facts(
        samples_N=column("samples") * problem.epochs,
        per_sample_NMK=_seconds_per_sample(users, names, modes, students),
        watts_NK=_watts(users, modes),
        goodput_NB=goodput[:, by_choice],
        radio_watts_N=column("radio_watts"),
        accuracy_NM=_array([[u.accuracy.get(m, np.nan) for m in names] for u in users], students),
        twin_accuracy_NM=_array([[t.get(m, np.nan) for m in names] for t in twins], students),
        unseen_N=np.array([u.twin.unseen_bytes if u.twin is not None else 0.0 for u in users]),
        has_twin_N=np.array([u.twin is not None for u in users], bool),
        absent_N=column("absent_accuracy"),
        memory_N=column("memory_bytes"),
        budget_N=column("energy_budget_j"),
        min_accuracy_N=column("min_accuracy"),
        is_required_N=np.array([u.is_required for u in users], bool),
        availability_N=column("availability"),
        battery_N=column("battery_price_per_j"),
        overhead_N=column("overhead_s"),
    )


def _array(rows: list[Any], width: int) -> Floats:
    return np.array(rows, float).reshape(len(rows), width)


def _seconds_per_sample(
    users: tuple[User, ...], names: list[str], modes: int, students: int
) -> Floats:
    nothing = [np.inf] * len(names)
    rows = [
        [
            *([mode.seconds_per_sample.get(name, np.inf) for name in names] for mode in user.modes),
            *([nothing] * (modes - len(user.modes))),
        ]
        for user in users
    ]
    return np.array(rows, float).reshape(len(users), modes, students).transpose(0, 2, 1)


def _watts(users: tuple[User, ...], modes: int) -> Floats:
    rows = [
        [*(mode.watts for mode in user.modes), *([0.0] * (modes - len(user.modes)))]
        for user in users
    ]
    return np.array(rows, float).reshape(len(users), modes)


def figure(problem: Problem, layout: Layout, facts: Facts) -> Figures:
    """What every column takes; seconds of infinity where something is not offered."""
    update_M = np.array([student.update_bytes for student in problem.students] or [0.0])
    upload_NMB = _upload_s(update_M[None, :, None], facts.goodput_NB[:, None, :])
    train_NMK = facts.per_sample_NMK * facts.samples_N[:, None, None]
    busy_NMK = train_NMK + facts.overhead_N[:, None, None]
    device_s = busy_NMK[:, :, :, None] + upload_NMB[:, :, None, :]
    train_j = np.where(np.isfinite(train_NMK), train_NMK, 0.0) * facts.watts_NK[:, None, :]
    radio_NMB = upload_NMB * facts.radio_watts_N[:, None, None]
    device_j = train_j[:, :, :, None] + np.nan_to_num(radio_NMB, posinf=0.0)[:, :, None, :]

    zero_N1 = np.zeros((len(facts.samples_N), 1))
    goodput_NC = np.concatenate([zero_N1, facts.goodput_NB], axis=1)
    sync_NC = _upload_s(facts.unseen_N[:, None], goodput_NC)
    work_NM = facts.samples_N[:, None] * _server_seconds(problem)
    units_S = layout.server_levels[1:]
    compute_NMS = work_NM[:, :, None] / units_S
    twin_s = compute_NMS[:, :, :, None] + sync_NC[:, None, None, :]
    sync_j = np.nan_to_num(sync_NC * facts.radio_watts_N[:, None], posinf=0.0)
    twin_j = np.broadcast_to(sync_j[:, None, None, :], twin_s.shape)
    with np.errstate(invalid="ignore"):  # No watts times for ever, where a student is not offered.
        server_j = np.nan_to_num(work_NM * problem.server.watts_per_unit, posinf=0.0)
    server_j = np.broadcast_to(server_j[:, :, None, None], twin_s.shape)

    expected_NM = facts.availability_N[:, None] * facts.accuracy_NM
    expected_NM = expected_NM + ((1.0 - facts.availability_N) * facts.absent_N)[:, None]
    accuracy = [
        np.broadcast_to(expected_NM[:, :, None, None], device_s.shape),
        np.broadcast_to(facts.twin_accuracy_NM[:, :, None, None], twin_s.shape),
        facts.absent_N[:, None],
    ]
    return Figures(
        seconds=_join([device_s, twin_s, zero_N1]),
        energy=_join([device_j, twin_j, zero_N1]),
        server_energy=_join([np.zeros_like(device_j), server_j, zero_N1]),
        accuracy=_join(accuracy),
    )


def _join(blocks: list[Floats]) -> Floats:
    rows = len(blocks[-1])
    return np.concatenate(
        [
            block.reshape(rows, -1) if rows else np.zeros((0, int(np.prod(block.shape[1:]))))
            for block in blocks
        ],
        axis=1,
    )


def _upload_s(size_bytes: Floats, goodput: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(size_bytes > 0.0, size_bytes / goodput, 0.0)


def _server_seconds(problem: Problem) -> Floats:
    table = problem.server.seconds_per_sample
    return np.array([table.get(student.name, np.inf) for student in problem.students] or [np.inf])


def rules(
    problem: Problem, layout: Layout, facts: Facts, figures: Figures, deadline_s: float
) -> dict[str, Booleans]:
    """By reason, the columns that may not be chosen, [N, R]; sitting out breaks no rule.

    The rules are in the order in which they take a user's options.
    """
    memory_M = np.array([student.memory_bytes for student in problem.students] or [0.0])
    is_device_R = layout.mode_R != OUT
    is_twin_R = (layout.student_R != OUT) & ~is_device_R
    not_sold_R = ~np.isin(layout.server_R, problem.server.choices)
    not_sold_R |= layout.server_R > problem.server.units
    units_G = {gateway.name: gateway.uplink_units for gateway in problem.gateways}
    units_N = np.array([units_G[user.gateway] for user in problem.users], float)
    kept_back_NR = is_twin_R & ~facts.has_twin_N[:, None]
    unknown_NR = np.isnan(figures.accuracy) | ~np.isfinite(figures.seconds)
    broken = {
        "privacy": kept_back_NR,
        "not offered": unknown_NR & ~kept_back_NR,
        "server units": np.broadcast_to(is_twin_R & not_sold_R, figures.seconds.shape),
        "uplink units": layout.uplink_R > units_N[:, None],
        "memory": is_device_R & (memory_M > facts.memory_N[:, None])[:, layout.student_R],
        "accuracy": figures.accuracy < facts.min_accuracy_N[:, None],
        "energy": figures.energy > facts.budget_N[:, None],
        "deadline": figures.seconds > deadline_s,
    }
    return {reason: mask & (layout.pair_R < layout.pairs - 1) for reason, mask in broken.items()}


def server_cost(problem: Problem) -> float:
    """What a joule of the server costs, before the mean over users."""
    weights = problem.weights
    return weights.energy * weights.server_energy / weights.energy_ref_j


def cost_of(problem: Problem, facts: Facts, raw: Figures) -> Floats:
    """What each column adds to the objective, but for the makespan."""
    weights = problem.weights
    per_joule_N = weights.energy / weights.energy_ref_j + facts.battery_N
    gap_NR = np.nan_to_num(problem.teacher_accuracy - raw.accuracy)
    # What takes for ever takes joules without end: such columns are barred, but a number first.
    cost_NR = np.minimum(raw.energy, 1e30) * per_joule_N[:, None]
    cost_NR += raw.server_energy * server_cost(problem)
    cost_NR += gap_NR * (weights.accuracy / weights.accuracy_ref)
    return np.asarray(cost_NR / max(1, len(problem.users)), float)
