"""What planning answers: who does what, what it costs, and how far from the best it can be."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

Place: TypeAlias = Literal["device", "twin", "out"]

WhyStopped: TypeAlias = Literal["optimal", "tolerance", "time limit", "no progress", "no solver"]
"""Why planning ended: proven best; the gap is small enough; time is over; the bound cannot be
raised further by prices and no solver was asked; the solver failed or is not installed."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What one user does. Joules are the device's own; `bytes_up` travel to the gateway."""

    user: str
    place: Place
    student: str | None = None
    mode: str | None = None
    server_units: int = 0
    uplink_units: int = 0
    seconds: float = 0.0
    energy_j: float = 0.0
    server_energy_j: float = 0.0
    accuracy: float = 0.0
    bytes_up: float = 0.0


@dataclass(frozen=True, slots=True)
class Prices:
    """What one more unit is worth, in units of the objective; 0 is a resource that is not short.

    `uplink` is by gateway, `accuracy` for one more of the sum of accuracies that the floor asks.
    `second` is the price of a second of makespan, `makespan_s` what the plan aims at. With
    `users`, over which costs are averaged, a device can decide for itself.
    """

    uplink: Mapping[str, float]
    server: float
    accuracy: float
    second: float
    makespan_s: float
    users: int


@dataclass(frozen=True, slots=True)
class Plan:
    """A round's plan, one choice for each user in the problem's order.

    No plan has an objective below `bound`; `gap` is (objective - bound) / |objective|.
    `energy_j` is the devices' together, `accuracy` the mean over all users (0 without any).
    """

    choices: tuple[Choice, ...]
    makespan_s: float
    energy_j: float
    server_energy_j: float
    accuracy: float
    objective: float
    bound: float
    gap: float
    prices: Prices
    why_stopped: WhyStopped
    teacher_units: int = 0
    teacher_s: float = 0.0
