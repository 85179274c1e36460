"""Fleets drawn at random, with the radio and processors of the literature.

Path loss, noise and power: 3GPP's urban macro cell as in Yang et al. (arXiv:1911.02417), section V;
processor energy kappa f^3 watts with kappa 1e-28; students like ResNet-8 to ResNet-56. A block is
180 kHz of LTE. Accuracies follow a power law in the samples.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from optimizer.problem import (
    Gateway,
    PowerMode,
    Problem,
    Server,
    Student,
    Teacher,
    TwinOffer,
    User,
    Weights,
)

UPLINK_CHOICES = (1, 2, 3, 4, 6, 8, 12, 16)

_CYCLES = {"resnet8": 4.8e6, "resnet20": 1.5e7, "resnet32": 2.6e7, "resnet56": 4.7e7}
_UPDATE_BITS = {"resnet8": 2.5e6, "resnet20": 8.6e6, "resnet32": 14.7e6, "resnet56": 27.2e6}
_TOP_ACCURACY = {"resnet8": 0.60, "resnet20": 0.70, "resnet32": 0.73, "resnet56": 0.75}
_DATA_NEED = {"resnet8": 0.02, "resnet20": 0.03, "resnet32": 0.035, "resnet56": 0.04}
_LARGEST_HZ = (0.6e9, 1.0e9, 1.5e9, 2.4e9)
_MEMORY_CLASS = (1, 2, 3, 4)
_STEPS = (0.4, 0.55, 0.7, 0.85, 1.0)
_KAPPA = 1e-28
_SAMPLE_BITS = 24.6e3
_TEACHER_ACCURACY = 0.76
_UNIT_HZ = 3e9
_BLOCK_HZ = 180e3
_TRANSMIT_W = 0.2
_MOST_EFFICIENCY = 7.4


@dataclass(frozen=True, slots=True)
class Setting:
    """What a drawn fleet is like; the defaults are those of the published tables."""

    users: int
    per_gateway: int = 50
    blocks_per_user: float = 2.0
    server_units_per_user: float = 0.6
    absent_accuracy: float = 0.4
    students: int = 4
    steps: int = 5
    uplink_choices: tuple[int, ...] = UPLINK_CHOICES
    server_choices: tuple[int, ...] = (1, 2, 4, 8)
    deadline_s: float = 120.0
    weights: Weights = field(default_factory=Weights)
    teacher: Teacher | None = None
    accuracy_floor: float | None = None


def draw(setting: Setting, rng: np.random.Generator) -> Problem:
    """A fleet of this setting."""
    names = tuple(_CYCLES)[: setting.students]
    gateways = math.ceil(setting.users / setting.per_gateway)
    served = [
        min(setting.per_gateway, setting.users - place * setting.per_gateway)
        for place in range(gateways)
    ]
    return Problem(
        users=tuple(_draw_user(setting, names, place, rng) for place in range(setting.users)),
        gateways=tuple(
            Gateway(f"gateway-{place}", math.ceil(setting.blocks_per_user * users))
            for place, users in enumerate(served)
        ),
        students=tuple(
            Student(name, update_bytes=_UPDATE_BITS[name] / 8.0, memory_bytes=float(tier))
            for tier, name in enumerate(names, start=1)
        ),
        server=Server(
            units=math.ceil(setting.server_units_per_user * setting.users),
            choices=setting.server_choices,
            seconds_per_sample={name: _CYCLES[name] / _UNIT_HZ for name in names},
            watts_per_unit=_KAPPA * _UNIT_HZ**3,
        ),
        uplink_choices=setting.uplink_choices,
        teacher=setting.teacher,
        teacher_accuracy=_TEACHER_ACCURACY,
        weights=setting.weights,
        deadline_s=setting.deadline_s,
        accuracy_floor=setting.accuracy_floor,
    )


def _draw_user(
    setting: Setting, names: tuple[str, ...], place: int, rng: np.random.Generator
) -> User:
    tier = int(rng.integers(len(_LARGEST_HZ)))
    samples = int(rng.integers(100, 1001))
    unseen = float(rng.uniform(0.05, 0.6))
    fidelity = float(rng.uniform(0.5, 1.0))
    spread = 1.0 / math.sqrt(samples / 500.0)
    accuracy = {name: max(0.0, _TOP_ACCURACY[name] - _DATA_NEED[name] * spread) for name in names}
    at_twin = {name: max(0.0, each - 0.05 * (1.0 - fidelity)) for name, each in accuracy.items()}
    is_allowed = bool(rng.random() < 0.8)
    twin = TwinOffer(at_twin, unseen_bytes=unseen * samples * _SAMPLE_BITS / 8.0)
    return User(
        name=f"device-{place}",
        gateway=f"gateway-{place // setting.per_gateway}",
        samples=samples,
        modes=tuple(
            _mode(_LARGEST_HZ[tier] * step, names)
            for step in np.linspace(_STEPS[0], _STEPS[-1], setting.steps).tolist()
        ),
        goodput_bytes_per_s=shannon_goodput(setting.uplink_choices, _draw_gain(rng)),
        accuracy=accuracy,
        radio_watts=_TRANSMIT_W,
        absent_accuracy=setting.absent_accuracy,
        twin=twin if is_allowed else None,
        memory_bytes=float(_MEMORY_CLASS[tier]),
        energy_budget_j=float(rng.uniform(4.0, 20.0)),
    )


def _mode(hertz: float, names: tuple[str, ...]) -> PowerMode:
    seconds = {name: _CYCLES[name] / hertz for name in names}
    return PowerMode(f"{hertz / 1e9:.2f} GHz", seconds, watts=_KAPPA * hertz**3)


def _draw_gain(rng: np.random.Generator) -> float:
    """The channel's gain: distance up to 500 m, shadowing of 8 dB, Rayleigh fading."""
    distance_km = max(0.03, 0.5 * math.sqrt(rng.random()))
    loss_db = 128.1 + 37.6 * math.log10(distance_km) + 8.0 * rng.standard_normal()
    return float(10.0 ** (-loss_db / 10.0) * rng.exponential())


def shannon_goodput(blocks: tuple[int, ...], gain: float) -> tuple[float, ...]:
    """Bytes for each second over so many blocks of 180 kHz; noise -174 dBm/Hz, figure 7 dB.

    With 8 dB of margin and at most 7.4 bit/s/Hz. Power is spread over the blocks, so more of
    them bring ever less.
    """
    noise = 10.0 ** ((-174.0 + 7.0 + 8.0 - 30.0) / 10.0)
    rates = []
    for count in blocks:
        width_hz = count * _BLOCK_HZ
        efficiency = math.log2(1.0 + _TRANSMIT_W * gain / (noise * width_hz))
        rates.append(width_hz * min(efficiency, _MOST_EFFICIENCY) / 8.0)
    return tuple(rates)


def goodput_law(problem: Problem) -> Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]:
    """Shannon's law of a drawn fleet, [users, X], at any share X of blocks."""
    width_hz = max(problem.uplink_choices) * _BLOCK_HZ
    widest = problem.uplink_choices.index(max(problem.uplink_choices))
    rates = np.array([user.goodput_bytes_per_s[widest] for user in problem.users])
    # Where the rate is capped at the widest it is so everywhere, as less noise is let in.
    signal_hz = (np.exp2(8.0 * rates / width_hz) - 1.0) * width_hz

    def at(blocks: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        hertz = blocks[None, :] * _BLOCK_HZ
        efficiency = np.minimum(np.log2(1.0 + signal_hz[:, None] / hertz), _MOST_EFFICIENCY)
        return np.asarray(hertz * efficiency / 8.0, np.float64)

    return at
