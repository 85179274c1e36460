"""The constants of arXiv:2303.06155: its students, its weights, and users as it draws them."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from federation.errors import InvalidProblem

FloatArray: TypeAlias = npt.NDArray[np.float64]
IntArray: TypeAlias = npt.NDArray[np.int64]

PLACES = 2
"""A student trains on the device or at the server."""


@dataclass(frozen=True, slots=True)
class PaperStudent:
    """A student model: work of an epoch, size on the wire, and accuracies from 0 to 1.

    `own_accuracy` is on the user's own classes, `full_accuracy` on those of all users.
    """

    name: str
    work_ghz_s: float
    size_mbit: float
    own_accuracy: float
    full_accuracy: float


@dataclass(frozen=True, slots=True)
class PaperProfile:
    """Constants of the problem (Eq. 6-17), in GHz, MHz, Mbit and seconds.

    Departs from the paper: it does not print sizes, noise, the teacher's work or the weights.
    The defaults are calibrated: with them the exact optimum gives its Table 3. `noise_w` is that
    of the whole band whatever a user's share of it, as in the paper.

    Raises:
        InvalidProblem: naming every constant out of range.
    """

    students: tuple[PaperStudent, ...]
    teacher_work_ghz_s: float = 14.0
    label_mbit: float = 102.4
    power_w: float = 0.1
    noise_w: float = 4e-14
    bandwidth_mhz: float = 10.0
    server_ghz: float = 10.0
    delay_weight: float = 0.01
    price_weight: float = 0.008
    bandwidth_weight: float = 0.0
    own_weight: float = 1.0
    full_weight: float = 1.0

    def __post_init__(self) -> None:
        above_zero = (
            "teacher_work_ghz_s", "power_w", "noise_w", "bandwidth_mhz", "server_ghz",
            "delay_weight",
        )  # fmt: skip
        at_least_zero = (
            "label_mbit", "price_weight", "bandwidth_weight", "own_weight", "full_weight",
        )  # fmt: skip
        faults = [
            f"{name} is {getattr(self, name)}, expected a finite number above 0"
            for name in above_zero
            if not (np.isfinite(getattr(self, name)) and getattr(self, name) > 0)
        ]
        faults += [
            f"{name} is {getattr(self, name)}, expected a finite number of at least 0"
            for name in at_least_zero
            if not (np.isfinite(getattr(self, name)) and getattr(self, name) >= 0)
        ]
        if not self.students:
            faults.append("there are no students, expected at least one")
        for each in self.students:
            if not (0 < each.work_ghz_s < np.inf and 0 < each.size_mbit < np.inf):
                faults.append(f"student {each.name}: work and size must be finite and above 0")
            if not (0 <= each.own_accuracy <= 1 and 0 <= each.full_accuracy <= 1):
                faults.append(f"student {each.name}: accuracies must be from 0 to 1")
        if faults:
            raise InvalidProblem([f"profile: {fault}" for fault in faults])

    @property
    def actions(self) -> int:
        """How many actions a user has."""
        return PLACES * len(self.students)


@dataclass(frozen=True, slots=True)
class PaperUsers:
    """What differs between users: their own CPU, and the power gain of their channel.

    Raises:
        InvalidProblem: naming every user whose figures are not finite and above 0.
    """

    device_ghz: FloatArray
    gain: FloatArray

    def __post_init__(self) -> None:
        if self.device_ghz.ndim != 1 or self.device_ghz.shape != self.gain.shape:
            raise InvalidProblem(
                [
                    f"users: shapes {self.device_ghz.shape} of device_ghz and {self.gain.shape} of"
                    " gain, expected one figure a user in each"
                ]
            )
        if not len(self):
            raise InvalidProblem(["users: there are none, expected at least one"])
        faults = [
            f"user {i}: {name} is {values[i]}, expected a finite number above 0"
            for name, values in (("device_ghz", self.device_ghz), ("gain", self.gain))
            for i in np.flatnonzero(~(np.isfinite(values) & (values > 0))).tolist()
        ]
        if faults:
            raise InvalidProblem(faults)

    def __len__(self) -> int:
        return len(self.device_ghz)


_NAMES = ("VGG-8", "ResNet-8x4", "ResNet-14x4", "ResNet-26x4")
_WORK_GHZ_S = (6.83, 8.75, 12.27, 18.96)
_PARAMETERS_M = (3.965, 1.234, 2.784, 5.883)
_FULL_IID = (0.6271, 0.6813, 0.7184, 0.7255)
_FULL_NON_IID = (0.2360, 0.2581, 0.2848, 0.2873)
_OWN_NON_IID = (0.8653, 0.8946, 0.9098, 0.9014)


def paper_profile(split: Literal["non_iid", "iid"] = "non_iid") -> PaperProfile:
    """The profile of Tables 3 (four users of 25 classes each) and 4 (four equal quarters).

    Accuracies are those of the paper's distilled students (Tables 1 and 2). With equal quarters
    a user's own classes are all there are.
    """
    own, full = (_FULL_IID, _FULL_IID) if split == "iid" else (_OWN_NON_IID, _FULL_NON_IID)
    rows = zip(_NAMES, _WORK_GHZ_S, _PARAMETERS_M, own, full, strict=True)
    return PaperProfile(
        tuple(
            PaperStudent(name, work, 32 * millions, own_accuracy, full_accuracy)
            for name, work, millions, own_accuracy, full_accuracy in rows
        )
    )


def draw_users(rng: np.random.Generator, count: int = 4) -> PaperUsers:
    """Users of the paper's simulation: 0.5 to 2 GHz, and 10 to 100 m away with h = g0 / d^2.8."""
    device_ghz = rng.uniform(0.5, 2.0, count)
    distance_m = rng.uniform(10.0, 100.0, count)
    return PaperUsers(device_ghz, 1e-4 / distance_m**2.8)
