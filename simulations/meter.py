"""What a device spends: time, energy, bytes."""

from dataclasses import dataclass

from federation.errors import TrainingError
from federation.learning.data import LocalData
from federation.learning.fulfilment import training_part
from federation.learning.training import total_steps
from federation.protocol.messages import LocalPlan
from simulations.device_model import DeviceModel


@dataclass(slots=True)
class Spent:
    """What a device has spent, until somebody takes the account."""

    train_s: float = 0.0
    energy_j: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0

    def add(self, other: "Spent") -> None:
        """Count what was spent elsewhere, too."""
        self.train_s += other.train_s
        self.energy_j += other.energy_j
        self.bytes_up += other.bytes_up
        self.bytes_down += other.bytes_down


class Meter:
    """Measures one device; `spent` is what has come together since it was last taken.

    What gives joules has counted them as spent: hand them to `pay`, which empties the battery.
    """

    __slots__ = ("_body", "_counted", "_data", "_seconds_per_step", "spent")

    def __init__(self, model: DeviceModel, data: LocalData) -> None:
        self.spent = Spent()
        self._body, self._seconds_per_step = model.body, model.seconds_per_step
        self._data = data
        self._counted = (0, 0)

    def fits(self, plan: LocalPlan) -> bool:
        """Whether the device has memory enough to train this."""
        return self._body is None or self._body.fits(plan)

    def training_s(self, plan: LocalPlan) -> float:
        """How long this training takes."""
        steps, samples = self._steps(plan)
        if self._body is None:
            return steps * self._seconds_per_step
        return self._body.training_s(plan, steps, samples)

    def train(self, plan: LocalPlan, took_s: float, whole_s: float) -> float:
        """Count a training that went on so long of what the whole takes; the joules."""
        self.spent.train_s += took_s
        if self._body is None or whole_s <= 0.0:
            return 0.0
        joules = self._body.training_j(plan, *self._steps(plan)) * took_s / whole_s
        self.spent.energy_j += joules
        return joules

    def read(self, traffic: tuple[int, int]) -> float:
        """Count what was sent and received since last time, given all of it; the joules."""
        up, down = (now - before for now, before in zip(traffic, self._counted, strict=True))
        self._counted = traffic
        self.spent.bytes_up += up
        self.spent.bytes_down += down
        if self._body is None:
            return 0.0
        joules = self._body.transfer_j(up, down)
        self.spent.energy_j += joules
        return joules

    def take(self) -> Spent:
        """What was spent; the count begins anew."""
        spent, self.spent = self.spent, Spent()
        return spent

    def pay(self, joules: float, now: float) -> bool:
        """Take energy from the battery; False: that is empty now."""
        return self._body is None or joules <= 0.0 or self._body.spend(joules, now)

    def away_s(self, now: float) -> float | None:
        """How long an empty battery charges before the device is on again; None: for ever."""
        away_s = self._body.back_at(now) - now if self._body is not None else 0.0
        return away_s if away_s < float("inf") else None

    def _steps(self, plan: LocalPlan) -> tuple[int, int]:
        try:
            samples = training_part(self._data, plan).samples
            return total_steps(plan, samples), samples
        except TrainingError:
            return 0, 0  # The trainer will say what is wrong with the plan.
