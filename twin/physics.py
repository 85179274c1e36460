"""What a class of devices is physically: how fast, how linked, and what it costs in joules.

Pure functions of a frozen record, for twins that predict and for simulations that let it come to
pass. MB are 10^6 bytes. Times of day are seconds since a midnight.
"""

import math
from dataclasses import dataclass, fields

PASSES = 3
"""A training step costs three forward passes: one forward, and two for the gradients by
activations and by weights, each with as many products (arXiv:2001.08361, section 2.1)."""

_FLOAT_BYTES = 4
_HOUR_S, _DAY_S = 3600.0, 86_400.0
_LEAST_S = 1e-3  # No phase is shorter, so that rounding stops no walk through the day.


@dataclass(frozen=True, slots=True, kw_only=True)
class Physics:
    """A class of devices. What is 0 costs nothing and limits nothing.

    Attributes:
        macs_per_s: Multiply-adds a second, sustained in training.
        memory_bytes: What training may use; 0 for no limit.
        step_s: What each step takes whatever its batch.
        sample_s: What each sample takes beside its multiply-adds, or measured in their place.
        training_w: Power of training, above idle.
        step_j: Energy of each step beside that power, or measured in its place.
        sample_j: The same of each sample.
        up_bps: Rate of the link from the device, in bits a second; 0 for no limit.
        down_bps: The same to the device.
        up_j_per_mb: Energy to send 10^6 bytes.
        down_j_per_mb: Energy to receive them.
        idle_w: Power of a device that is on and does nothing.
        battery_j: What a full battery holds; 0 for mains.
        charge_w: Power of its charger.
        charging_hours: From when to when it charges, hours of the day; over midnight where the
            first is the later.
        restart_share: How full it must be to go on again after it ran empty.
    """

    macs_per_s: float = math.inf
    memory_bytes: int = 0
    step_s: float = 0.0
    sample_s: float = 0.0
    training_w: float = 0.0
    step_j: float = 0.0
    sample_j: float = 0.0
    up_bps: float = 0.0
    down_bps: float = 0.0
    up_j_per_mb: float = 0.0
    down_j_per_mb: float = 0.0
    idle_w: float = 0.0
    battery_j: float = 0.0
    charge_w: float = 0.0
    charging_hours: tuple[float, float] = (0.0, 24.0)
    restart_share: float = 0.1


def out_of_range(physics: Physics) -> tuple[str, object, str] | None:
    """Gives the first figure that no device can have, its value and what was expected."""
    hours = physics.charging_hours
    ranges = {
        "macs_per_s": (physics.macs_per_s > 0.0, "above 0"),
        "charging_hours": (all(0.0 <= hour <= 24.0 for hour in hours), "two hours from 0 to 24"),
        "restart_share": (0.0 < physics.restart_share <= 1.0, "above 0, at most 1"),
    }
    for field in fields(physics):
        value = getattr(physics, field.name)
        is_fine, expected = ranges.get(field.name) or (_is_amount(value), "0 or more, and finite")
        if not is_fine:
            return field.name, value, expected
    return None


def training_s(
    physics: Physics, *, steps: int, samples: int, macs: float = 0.0, pace: float = 1.0
) -> float:
    """Gives how long a training takes.

    Args:
        physics: Of the device's class.
        steps: Batches trained on.
        samples: Samples in all of them together.
        macs: Multiply-adds of one sample on its way forward.
        pace: How many times slower than its class this one is.
    """
    each_s = physics.sample_s + PASSES * macs / physics.macs_per_s
    return pace * (steps * physics.step_s + samples * each_s)


def training_j(
    physics: Physics, *, steps: int, samples: int, macs: float = 0.0, pace: float = 1.0
) -> float:
    """Gives the energy of a training above idle; the arguments are those of `training_s`."""
    lasts_s = training_s(physics, steps=steps, samples=samples, macs=macs, pace=pace)
    return physics.training_w * lasts_s + steps * physics.step_j + samples * physics.sample_j


def transfer_s(physics: Physics, up_bytes: int = 0, down_bytes: int = 0) -> float:
    """Gives how long bytes are on the link, one direction after the other, without latency."""
    up_s = 8 * up_bytes / physics.up_bps if physics.up_bps > 0 else 0.0
    down_s = 8 * down_bytes / physics.down_bps if physics.down_bps > 0 else 0.0
    return up_s + down_s


def transfer_j(physics: Physics, up_bytes: int = 0, down_bytes: int = 0) -> float:
    """Gives the energy to send and receive so many bytes."""
    return (up_bytes * physics.up_j_per_mb + down_bytes * physics.down_j_per_mb) / 1e6


def joules_per_mb(watts: float, bps: float) -> float:
    """Gives the energy of 10^6 bytes through a radio of this power, at this rate."""
    return watts * 8e6 / bps


def training_bytes(parameters: int, *, has_momentum: bool) -> int:
    """Gives the memory that training needs at least, in float32.

    Counted are the base model, the weights, their gradients and their momentum; activations and
    the program are not.
    """
    return _FLOAT_BYTES * parameters * (4 if has_momentum else 3)


def charge_after(physics: Physics, charge_j: float, since_s: float, until_s: float) -> float:
    """Gives the charge of an idle battery after a while, from 0 to `battery_j`; inf on mains.

    It takes a step or two for each day until one day ends as it began.
    """
    if physics.battery_j <= 0.0:
        return math.inf
    at_s, mark = since_s, (math.inf, 0.0)
    while at_s < until_s:
        is_charging, switch_s = _phase(physics.charging_hours, at_s)
        stop_s = min(switch_s, until_s)
        net_w = (physics.charge_w if is_charging else 0.0) - physics.idle_w
        charge_j = min(max(charge_j + net_w * (stop_s - at_s), 0.0), physics.battery_j)
        at_s = stop_s
        if mark[0] == math.inf:
            mark = (at_s, charge_j)
        elif at_s - mark[0] > _DAY_S - 1.0:
            if charge_j == mark[1]:
                at_s += (until_s - at_s) // _DAY_S * _DAY_S
            mark = (at_s, charge_j)
    return charge_j


def charged_at(physics: Physics, charge_j: float, since_s: float, target_j: float) -> float:
    """Gives when a device that is off will have charged so far; inf where it never will."""
    if charge_j >= target_j:
        return since_s
    window_s = _window_s(physics.charging_hours)
    if physics.charge_w <= 0.0 or window_s < _LEAST_S or target_j > physics.battery_j:
        return math.inf
    need_s = (target_j - charge_j) / physics.charge_w
    into_s = _since_begin_s(physics.charging_hours, since_s)
    left_s = max(window_s - into_s, 0.0)
    if need_s <= left_s:
        return since_s + need_s
    need_s -= left_s
    days = math.ceil(need_s / window_s) - 1
    return since_s - into_s + (1 + days) * _DAY_S + need_s - days * window_s


def _phase(hours: tuple[float, float], at_s: float) -> tuple[bool, float]:
    """Whether it charges at this time, and when that changes next."""
    window_s, into_s = _window_s(hours), _since_begin_s(hours, at_s)
    is_inside = into_s < window_s
    return is_inside, at_s + max((window_s if is_inside else _DAY_S) - into_s, _LEAST_S)


def _window_s(hours: tuple[float, float]) -> float:
    begin, end = hours
    return (end - begin if begin <= end else 24.0 - begin + end) * _HOUR_S


def _since_begin_s(hours: tuple[float, float], at_s: float) -> float:
    return (at_s - hours[0] * _HOUR_S) % _DAY_S


def _is_amount(value: float) -> bool:
    return 0.0 <= value < math.inf
