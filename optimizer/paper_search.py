"""Plans of arXiv:2303.06155 without learning: enumeration, coordinate descent, one student."""

from dataclasses import replace

import numpy as np

from federation.errors import InvalidProblem
from optimizer.paper import ActionTable, PaperPlan, finish_plan, shared_cost, tabulate
from optimizer.paper_profile import PLACES, FloatArray, IntArray, PaperProfile, PaperUsers

MOST_PLANS = 2_000_000
"""Above so many plans enumeration is refused; it holds 3 numbers of 8 bytes for each."""


def enumerate_plans(profile: PaperProfile, users: PaperUsers) -> PaperPlan:
    """The optimum, by looking at every plan: 4,096 of them with 4 users and 4 students.

    Raises:
        InvalidProblem: with more than `MOST_PLANS` plans.
    """
    return _best_of(profile, users, np.arange(profile.actions))


def plan_with_student(profile: PaperProfile, users: PaperUsers, student: int) -> PaperPlan:
    """FL-Min and FL-Max: all users have this student, and each the best place for it.

    Departs from the paper: it does not say where its FL-Min and FL-Max train. With the best
    places their delays come near its own; with all on the device they are far above.
    """
    allowed = np.arange(PLACES * student, PLACES * (student + 1))
    return _best_of(profile, users, allowed)


def _best_of(profile: PaperProfile, users: PaperUsers, allowed: IntArray) -> PaperPlan:
    plans = len(allowed) ** len(users)
    if plans > MOST_PLANS:
        fault = (
            f"{len(users)} users with {len(allowed)} actions have more than {MOST_PLANS:,} plans"
            " to enumerate; use coordinate descent"
        )
        raise InvalidProblem([fault])
    table = tabulate(profile, users)
    server = _sum_over_plans(np.sqrt(table.server_work[:, allowed]))
    upload = _sum_over_plans(np.sqrt(table.upload[:, allowed]))
    value = shared_cost(profile, server, upload)
    value += _sum_over_plans(table.separable[:, allowed])
    best = np.unravel_index(int(value.argmin()), (len(allowed),) * len(users))
    return finish_plan(profile, users, allowed[np.asarray(best)], evaluations=plans)


def _sum_over_plans(values: FloatArray) -> FloatArray:
    """The sum over users of one action each, for all plans; the last user's action goes fastest."""
    sums = np.zeros(1)
    for of_user in values:
        sums = (sums[:, None] + of_user).reshape(-1)
    return sums


def descend(profile: PaperProfile, users: PaperUsers) -> PaperPlan:
    """A plan that no single user can better: each takes its best action until none changes.

    Users are tied by two sums only (`shared_cost`), so a step costs one user's actions, and the
    objective falls with each. It is done from three beginnings: where each user is best off with
    an equal share of everything, the same with everybody on the device, and with nobody there.
    """
    table = tabulate(profile, users)
    count = len(users)
    roots = np.sqrt(table.server_work), np.sqrt(table.upload)
    alike = shared_cost(profile, count * roots[0], count * roots[1]) / count + table.separable
    is_local = np.arange(profile.actions) % PLACES == 1
    beginnings = [alike, *(np.where(is_local == here, alike, np.inf) for here in (True, False))]
    found = [_descend_from(profile, table, begin.argmin(axis=1)) for begin in beginnings]
    plans = [finish_plan(profile, users, chosen, table=table) for chosen, _ in found]
    best = min(plans, key=lambda plan: plan.objective)
    return replace(best, evaluations=alike.size + sum(evaluations for _, evaluations in found))


def _descend_from(
    profile: PaperProfile, table: ActionTable, chosen: IntArray
) -> tuple[IntArray, int]:
    of_all = np.arange(len(chosen))
    server_roots, upload_roots = np.sqrt(table.server_work), np.sqrt(table.upload)
    server_sum = float(server_roots[of_all, chosen].sum())
    upload_sum = float(upload_roots[of_all, chosen].sum())
    evaluations = unchanged = user = 0
    while unchanged < len(chosen):
        server, upload, was = server_roots[user], upload_roots[user], int(chosen[user])
        value = table.separable[user] + shared_cost(
            profile, server_sum - server[was] + server, upload_sum - upload[was] + upload
        )
        evaluations += len(value)
        best = int(value.argmin())
        unchanged += 1
        if value[best] < value[was] - 1e-12:
            unchanged = 1
            chosen[user] = best
            server_sum += float(server[best] - server[was])
            upload_sum += float(upload[best] - upload[was])
        user = (user + 1) % len(chosen)
    return chosen, evaluations
