"""Which devices fail in the middle of a round, at which phase, and for how long."""

from dataclasses import dataclass

from simulations.draws import key_of, uniform
from simulations.tables import PHASES, FailurePlan


@dataclass(frozen=True, slots=True)
class Failure:
    """A device is killed at this phase of its attempt, and starts again after `away_s`."""

    phase: str
    away_s: float


class Failures:
    """Draws by device and round alone: asked twice, or not at all, they are the same."""

    def __init__(self, plan: FailurePlan, seed: int) -> None:
        self._plan = plan
        weights = plan.phases or dict.fromkeys(PHASES, 1.0)
        whole, so_far = sum(weights.values()), 0.0
        self._steps: list[tuple[float, str]] = []
        for phase in PHASES:
            if (weight := weights.get(phase, 0.0)) > 0.0:
                so_far += weight / whole
                self._steps.append((so_far, phase))
        self._keys = tuple(
            key_of(seed, f"failures/{what}") for what in ("whether", "phase", "away")
        )

    def failure_of(self, place: int, number: int) -> Failure | None:
        """What befalls a device that is asked in round `number`; None: nothing.

        Args:
            place: Of the device, in the fleet's order.
            number: Of the round, from 1.
        """
        if uniform(self._keys[0], place, number) >= self._plan.chance:
            return None
        drawn = uniform(self._keys[1], place, number)
        # Rounded, the steps may end just below 1.
        phase = next((name for step, name in self._steps if drawn < step), self._steps[-1][1])
        low, high = self._plan.away_s
        return Failure(phase, low + (high - low) * uniform(self._keys[2], place, number))
