# ruff: noqa: N806 - capitals at the end of a name are the shape of its array
"""What a device decides for itself when the hub is away: its best column at the last prices."""

from dataclasses import replace

import numpy as np

from optimizer.columns import BIG, tabulate
from optimizer.plan import Choice, Prices
from optimizer.problem import Gateway, Problem
from optimizer.reading import choice_of


def decide_alone(problem: Problem, name: str, prices: Prices, *, with_twin: bool = False) -> Choice:
    """The column of one user that costs least at prices told before.

    At the optimum's prices this is the user's part of a plan that fits the capacities; with old
    prices it nearly fits. A makespan beyond the prices' own is paid by the second.

    Args:
        problem: The offers; all other users may be left out of it.
        name: The user's.
        prices: Those of the last plan.
        with_twin: Whether the twin can be asked; with the hub away it cannot.

    Raises:
        KeyError: `problem` has no user of this name.
    """
    user = next((each for each in problem.users if each.name == name), None)
    if user is None:
        raise KeyError(name)
    if not with_twin:
        user = replace(user, twin=None)
    gateways = tuple(
        gateway if gateway.name == user.gateway else Gateway(gateway.name, 0)
        for gateway in problem.gateways
    )
    own = replace(problem, users=(user,), gateways=gateways, teacher=None, accuracy_floor=None)
    table = tabulate(own)
    layout = table.layout
    allowed_R = table.cost_NR[0] < BIG
    seconds_R = np.where(allowed_R, table.seconds_NR[0], 0.0)
    paid_R = table.cost_NR[0] / prices.users
    paid_R = paid_R + prices.uplink.get(user.gateway, 0.0) * layout.uplink_R
    paid_R += prices.server * layout.server_R
    paid_R -= prices.accuracy * np.nan_to_num(table.accuracy_NR[0])
    paid_R += prices.second * np.maximum(0.0, seconds_R - prices.makespan_s)
    return choice_of(table, 0, int(np.where(allowed_R, paid_R, np.inf).argmin()))
