"""The demo's fleet: who of the watch data wears which device, and who is held out.

Ten devices, seven people, a device never holding two of them; three people whom no device sees
say how well the fleet does for somebody new.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from federation.datasets.cached import DataSet
from federation.errors import DataError
from federation.learning.data import LocalData
from federation.protocol.messages import LocalPlan, ModelSpec

HELD_OUT = ("person-08", "person-09", "person-10")
"""The last three by number: a rule, not the luckiest three.

Of three such choices tried, it showed the smallest lead of the fleet over devices alone: 0.761
to 0.529 after 20 rounds, against 0.744 to 0.499 with the first three held out and 0.802 to 0.526
with 4 to 6 (conv1d of 16 filters, 2 epochs, batch 32, rate 0.05, momentum 0.9, seed 0). The plan
was picked among a few by looking at these people, so the figures flatter it slightly.
"""

SPEC = ModelSpec(name="conv1d", sizes={"filters": 16})
"""The demo's model: 8,631 weights."""

PLAN = LocalPlan(model=SPEC, epochs=2, batch_size=32, learning_rate=0.05, momentum=0.9, seed=0)
"""How each device trains in a round."""

BOTH_ARMS = 3
"""So many people, the first by number, wear a device on each arm; the others wear one."""

_GRAVITY_G, _TURN_RAD_S = 1.0, 3.0


@dataclass(frozen=True)
class WristFleet:
    """The data of each device, and that of the people no device sees.

    `person_of` names who wears each device.
    """

    devices: dict[str, LocalData]
    held_out: LocalData
    person_of: dict[str, str]


def wrist_fleet(data: DataSet, held_out: tuple[str, ...] = HELD_OUT) -> WristFleet:
    """Spreads the people of `data` over devices, all but those held out.

    Nothing is drawn: the same data give the same fleet. Samples are scaled by `scale_motion`.

    Raises:
        DataError: The set has no people and arms, or none of them is called so.
    """
    if data.client is None or data.part is None:
        raise DataError(
            f"{data.name} does not say whose samples are whose; a set with people and arms was "
            "expected; use watch"
        )
    if unknown := sorted(set(held_out) - set(data.client_names)):
        raise DataError(
            f"nobody in {data.name} is called '{unknown[0]}'; known are "
            f"{', '.join(data.client_names)}; hold out one of these"
        )
    x = scale_motion(data.x)
    devices: dict[str, LocalData] = {}
    person_of: dict[str, str] = {}
    wearers = [name for name in data.client_names if name not in held_out]
    for place, person in enumerate(wearers):
        whose = data.client == data.client_names.index(person)
        arms = [data.part == arm for arm in range(len(data.part_names))]
        for arm in arms if place < BOTH_ARMS else [np.ones_like(whose)]:
            device = f"wrist-{len(devices) + 1:02d}"
            devices[device] = LocalData(x[whose & arm], data.y[whose & arm])
            person_of[device] = person
    unseen = np.isin(data.client, [data.client_names.index(person) for person in held_out])
    return WristFleet(devices, LocalData(x[unseen], data.y[unseen]), person_of)


def scale_motion(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Brings windows (N, time, 6) of g and rad/s near one, by constants of physics.

    Statistics of the data would tell a device about other people; gravity and a brisk turn of
    the wrist do not.
    """
    units: npt.NDArray[np.float32] = np.array([_GRAVITY_G] * 3 + [_TURN_RAD_S] * 3, np.float32)
    return x / units
