"""The planning problem of arXiv:2303.06155 as printed: delays, objective, and its convex step.

Each user has a student and a place of training. The server's CPU and the uplink's bandwidth are
divided among all users.

An action `a` of a user is student `a // 2`; it trains on the device if `a % 2`, else at the
server. The paper says once that x = 0 is the device; its equations, and we, have it the other
way round.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from optimizer.paper_profile import PLACES, FloatArray, IntArray, PaperProfile, PaperUsers


@dataclass(frozen=True, slots=True)
class ActionTable:
    """What each action of each user comes to, before resources are divided: users by actions.

    `server_work` is in GHz·s; `upload` in MHz·s: seconds when given 1 MHz; `device_s` in seconds.
    Accuracies are those of an action, whoever takes it.
    `separable` is the part of the objective that no division of resources changes.
    """

    server_work: FloatArray
    upload: FloatArray
    device_s: FloatArray
    own_accuracy: FloatArray
    full_accuracy: FloatArray
    price: FloatArray
    separable: FloatArray


def tabulate(profile: PaperProfile, users: PaperUsers) -> ActionTable:
    """The delays of Eq. 1-5 as amounts of work, for every action of every user."""

    def of_students(name: str) -> FloatArray:
        return np.repeat([float(getattr(each, name)) for each in profile.students], PLACES)

    is_local = np.arange(profile.actions) % PLACES
    work = of_students("work_ghz_s")
    bits = of_students("size_mbit") + is_local * profile.label_mbit
    bits_per_hz = np.log2(1 + profile.power_w * users.gain / profile.noise_w)
    server_work = profile.teacher_work_ghz_s + (1 - is_local) * work
    device_s = is_local * work / users.device_ghz[:, None]
    price = profile.price_weight * server_work
    own, full = of_students("own_accuracy"), of_students("full_accuracy")
    worth = profile.own_weight * own + profile.full_weight * full
    shape = (len(users), profile.actions)
    return ActionTable(
        server_work=np.broadcast_to(server_work, shape),
        upload=bits / bits_per_hz[:, None],
        device_s=device_s,
        own_accuracy=own,
        full_accuracy=full,
        price=np.broadcast_to(price, shape),
        separable=profile.delay_weight * device_s + price - worth,
    )


def divide_resources(
    profile: PaperProfile, server_work: FloatArray, upload: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """The convex step (Problem 3) in closed form: GHz and MHz of each user.

    The price of CPU (time x frequency) is a constant, so all CPU is spent, in proportion to the
    roots of the work: Cauchy-Schwarz. Bandwidth is bought until its price
    `bandwidth_weight + lambda` equals what it saves; lambda is 0 unless the band is used up.
    """
    roots = np.sqrt(server_work)
    server_ghz = profile.server_ghz * roots / roots.sum()
    roots = np.sqrt(upload)
    bandwidth_mhz = profile.bandwidth_mhz * roots / roots.sum()
    if profile.bandwidth_weight > 0:
        wanted = np.sqrt(profile.delay_weight * upload / profile.bandwidth_weight)
        bandwidth_mhz = np.minimum(bandwidth_mhz, wanted)
    return server_ghz, bandwidth_mhz


def shared_cost(
    profile: PaperProfile, server_roots: FloatArray, upload_roots: FloatArray
) -> FloatArray:
    """What the convex step comes to: all of the objective that is not separable.

    It depends on two numbers only: the sums over users of the roots of server work and of
    uploads.
    """
    server = profile.delay_weight * server_roots**2 / profile.server_ghz
    full_band = (
        profile.delay_weight * upload_roots**2 / profile.bandwidth_mhz
        + profile.bandwidth_weight * profile.bandwidth_mhz
    )
    if profile.bandwidth_weight == 0:
        return server + full_band
    root = np.sqrt(profile.delay_weight * profile.bandwidth_weight)
    band_is_spare = (
        upload_roots * np.sqrt(profile.delay_weight / profile.bandwidth_weight)
        <= profile.bandwidth_mhz
    )
    return server + np.where(band_is_spare, 2 * root * upload_roots, full_band)


@dataclass(frozen=True, slots=True)
class PaperPlan:
    """Who trains what, where and with how much; figures are means over users, as in the tables.

    `objective` is Eq. 6 divided by the number of users; `objective_unpriced` leaves out what the
    server's CPU costs, as the figures of Tables 3 and 4 do. `evaluations` says how many values
    of the objective were looked at to find the plan.
    """

    actions: tuple[int, ...]
    server_ghz: tuple[float, ...] = field(repr=False)
    bandwidth_mhz: tuple[float, ...] = field(repr=False)
    objective: float
    objective_unpriced: float
    delay_s: float
    own_accuracy: float
    full_accuracy: float
    evaluations: int

    @property
    def students(self) -> IntArray:
        """The student of each user, as its place in the profile."""
        return np.asarray(self.actions) // PLACES

    @property
    def is_local(self) -> npt.NDArray[np.bool_]:
        """Whether each user's student trains on the device."""
        is_local: npt.NDArray[np.bool_] = np.asarray(self.actions) % PLACES == 1
        return is_local


def finish_plan(
    profile: PaperProfile,
    users: PaperUsers,
    actions: Sequence[int] | IntArray,
    *,
    table: ActionTable | None = None,
    shares: tuple[FloatArray, FloatArray] | None = None,
    evaluations: int = 1,
) -> PaperPlan:
    """The plan of these actions, with the best division of resources or with given `shares`.

    `table` is that of `tabulate`, for those who have it already.
    """
    table = table or tabulate(profile, users)
    chosen = np.asarray(actions, dtype=np.int64)
    at = (np.arange(len(users)), chosen)
    work, upload = table.server_work[at], table.upload[at]
    server_ghz, bandwidth_mhz = shares or divide_resources(profile, work, upload)
    delays = work / server_ghz + upload / bandwidth_mhz
    costs = (
        profile.delay_weight * delays
        + profile.bandwidth_weight * bandwidth_mhz
        + table.separable[at]
    )
    return PaperPlan(
        actions=tuple(chosen.tolist()),
        server_ghz=tuple(server_ghz.tolist()),
        bandwidth_mhz=tuple(bandwidth_mhz.tolist()),
        objective=float(costs.mean()),
        objective_unpriced=float((costs - table.price[at]).mean()),
        delay_s=float((delays + table.device_s[at]).mean()),
        own_accuracy=float(table.own_accuracy[chosen].mean()),
        full_accuracy=float(table.full_accuracy[chosen].mean()),
        evaluations=evaluations,
    )
