"""A placement, and what it costs to come to it from another.

Shapes: B batches, E experts, D devices. A history `counts_BE` holds, for one layer, how many rows
each expert was given in each of the recent batches (`Trace.loads`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from federation.errors import ConfigError

Loads = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Placement:
    """Who holds what: `holders[e]` are the devices, ascending, that have expert e."""

    devices: int
    holders: tuple[tuple[int, ...], ...]

    def held_by(self, device: int) -> tuple[int, ...]:
        """The experts on a device, ascending."""
        return tuple(e for e, holders in enumerate(self.holders) if device in holders)

    @property
    def copies(self) -> int:
        """How many experts are held beyond one each."""
        return sum(map(len, self.holders)) - len(self.holders)


def place(devices: int, holders: Sequence[Sequence[int]]) -> Placement:
    """Makes a placement, checked.

    Raises:
        ConfigError: An expert is held nowhere, twice by one device, or by one that is not there.
    """
    for expert, mine in enumerate(holders):
        if not mine or len(set(mine)) < len(mine):
            raise ConfigError(
                f"expert {expert} is placed on {list(mine)}; one device or several are needed"
            )
        if min(mine) < 0 or max(mine) >= devices:
            raise ConfigError(f"expert {expert} is placed on {list(mine)} of {devices} devices")
    return Placement(devices, tuple(tuple(sorted(mine)) for mine in holders))


def check_history(counts_BE: NDArray[np.generic], devices: int, slots: int) -> Loads:
    """Gives the history as floats, each batch divided by its mean load a device.

    Batches without rows are left out; if none is left, all experts count alike.

    Raises:
        ConfigError: The devices have fewer slots than there are experts.
    """
    experts = counts_BE.shape[1]
    if devices < 1 or devices * slots < experts:
        raise ConfigError(
            f"{experts} experts do not fit into {slots} slots on each of {devices} devices"
        )
    load_BE: Loads = np.asarray(counts_BE, dtype=np.float64)
    total_B = load_BE.sum(axis=1)
    if not (total_B > 0).any():
        return np.full((1, experts), devices / experts)
    shares_BE: Loads = load_BE[total_B > 0] * (devices / total_B[total_B > 0, None])
    return shares_BE


def moves(old: Placement, new: Placement) -> tuple[tuple[int, int], ...]:
    """Lists what must be brought: (expert, device) pairs of the new placement not in the old."""
    return tuple(
        (expert, device)
        for expert, holders in enumerate(new.holders)
        for device in holders
        if device not in old.holders[expert]
    )


def renumber(old: Placement, new: Placement) -> Placement:
    """Numbers the new placement's devices so that most experts stay where they are.

    Devices are alike, so only who shares a device matters. Pairs of an old and a new device are
    matched by what they have in common, most first.
    """
    common = sorted(
        (-len(set(old.held_by(a)) & set(new.held_by(b))), a, b)
        for a in range(old.devices)
        for b in range(new.devices)
    )
    number: dict[int, int] = {}
    for _, a, b in common:
        if b not in number and a not in number.values():
            number[b] = a
    return place(new.devices, [[number[device] for device in mine] for mine in new.holders])
