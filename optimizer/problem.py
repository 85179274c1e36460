"""The planning problem of one round: who could train what, where, how fast and at what price.

Every figure is plain, so that it may come from a twin's forecast, a measurement or a formula:
seconds for each sample, watts, bytes for each second. Names link the records.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Student:
    """A model that devices can be given: what an update of it weighs, what training it needs."""

    name: str
    update_bytes: float
    memory_bytes: float = 0.0


@dataclass(frozen=True, slots=True)
class PowerMode:
    """One way a device can run: a frequency or a named mode.

    `seconds_per_sample` holds, by student, forward and backward of one sample; a student that
    is absent is not offered in this mode. `watts` is drawn while it trains.
    """

    name: str
    seconds_per_sample: Mapping[str, float]
    watts: float


@dataclass(frozen=True, slots=True)
class TwinOffer:
    """What the twin can do in the device's place.

    `accuracy` holds, by student, the share of right answers expected of training there.
    `unseen_bytes` of new data have to reach the twin first.
    """

    accuracy: Mapping[str, float]
    unseen_bytes: float = 0.0


@dataclass(frozen=True, slots=True)
class User:
    """A device and its owner's rules, for one round.

    `goodput_bytes_per_s` has an entry for each of the problem's `uplink_choices`. `accuracy` holds,
    by student, the expected share of right answers after training on the device;
    `absent_accuracy` is what remains when the user sits the round out. `twin` is None where
    the owner keeps the data on the device. `availability` is the probability that the device
    finishes a round that it was given: a device's accuracy counts with it, that of sitting out
    with the rest. `battery_price_per_j` is added to the user's cost for each joule of the device.
    `overhead_s` is time of the round that is neither training nor sending.
    """

    name: str
    gateway: str
    samples: int
    modes: tuple[PowerMode, ...]
    goodput_bytes_per_s: tuple[float, ...]
    accuracy: Mapping[str, float]
    radio_watts: float = 0.0
    absent_accuracy: float = 0.0
    twin: TwinOffer | None = None
    memory_bytes: float = math.inf
    energy_budget_j: float = math.inf
    min_accuracy: float = 0.0
    is_required: bool = False
    availability: float = 1.0
    battery_price_per_j: float = 0.0
    overhead_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Gateway:
    """A shared uplink: resource blocks, or hundredths of its measured goodput."""

    name: str
    uplink_units: int


@dataclass(frozen=True, slots=True)
class Server:
    """Where twins train. `seconds_per_sample` is that of one unit; s units take 1/s of it."""

    units: int
    choices: tuple[int, ...] = (1, 2, 4, 8)
    seconds_per_sample: Mapping[str, float] = field(default_factory=dict)
    watts_per_unit: float = 0.0


@dataclass(frozen=True, slots=True)
class Teacher:
    """The hub's own training in this round: `unit_seconds` on one server unit.

    Pipelined, it trains beside the students and its time enters the makespan's maximum. With
    `is_sequential` it trains before them with the most of its `choices`, and its time is added.
    """

    unit_seconds: float
    choices: tuple[int, ...] = (1, 2, 4, 8)
    is_sequential: bool = False


@dataclass(frozen=True, slots=True)
class Weights:
    """What the objective makes of a plan.

    objective = makespan * T / time_ref_s + mean over users of [energy * (device joules
    + server_energy * server joules) / energy_ref_j + accuracy * gap / accuracy_ref
    + the user's battery price], the gap being the teacher's accuracy less the user's.
    """

    makespan: float = 1.0
    energy: float = 1.0
    accuracy: float = 1.0
    server_energy: float = 0.1
    time_ref_s: float = 30.0
    energy_ref_j: float = 3.0
    accuracy_ref: float = 0.1


@dataclass(frozen=True, slots=True)
class Problem:
    """One round to be planned. `epochs` passes are made over each user's samples.

    `accuracy_floor` is the least mean accuracy over all users, sitting out included.
    """

    users: tuple[User, ...]
    gateways: tuple[Gateway, ...]
    students: tuple[Student, ...]
    server: Server
    uplink_choices: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16)
    teacher: Teacher | None = None
    teacher_accuracy: float = 1.0
    weights: Weights = field(default_factory=Weights)
    deadline_s: float = math.inf
    accuracy_floor: float | None = None
    epochs: float = 1.0
