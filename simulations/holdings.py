"""What the devices of a fleet hold, made when it is asked for: nothing is kept for each device.

A fleet's samples lie in one array, device after device, so that what a device holds is a view.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, overload

import numpy as np
import numpy.typing as npt

from federation.errors import ConfigError
from federation.learning.data import LocalData
from federation.learning.partitions import Indices
from simulations.draws import key_of, uniform

_NAME = re.compile(r"d(\d+)", re.ASCII)


class Names(Sequence[str]):
    """The names of a fleet, `d00`, `d01` and so on: written when asked for, found by reading."""

    __slots__ = ("_count", "_width")

    def __init__(self, count: int) -> None:
        self._count = count
        self._width = max(2, len(str(count - 1)))

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        chosen = range(self._count)[place]
        return (
            [self._of(each) for each in chosen] if isinstance(chosen, range) else self._of(chosen)
        )

    def __iter__(self) -> Iterator[str]:
        return map(self._of, range(self._count))

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._place(name) is not None

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Names):
            return self._count == other._count
        return isinstance(other, Sequence) and list(self) == list(other)

    def __hash__(self) -> int:
        return hash(self._count)

    def index(self, name: str, start: int = 0, stop: int | None = None) -> int:
        """The place of a device, without a search.

        Raises:
            ValueError: no device of this fleet is called so.
        """
        place = self._place(name)
        if place is None or place not in range(self._count)[start:stop]:
            raise ValueError(f"no device is called {name!r}; they are {self[0]} to {self[-1]}")
        return place

    def _of(self, place: int) -> str:
        return f"d{place:0{self._width}}"

    def _place(self, name: str) -> int | None:
        match = _NAME.fullmatch(name)
        # As long as a name may be, and no longer: each device has one name.
        if match is None or len(match[1]) != self._width or int(match[1]) >= self._count:
            return None
        return int(match[1])


class Source(Protocol):
    """Where devices' samples come from."""

    def take(self, place: int) -> LocalData:
        """What the device at this place holds."""


class Holdings(Mapping[str, LocalData]):
    """What each device holds, by its name in the fleet's order, or by place from `source`."""

    __slots__ = ("names", "source")

    def __init__(self, names: Names, source: Source) -> None:
        self.names, self.source = names, source

    def __getitem__(self, name: str) -> LocalData:
        try:
            place = self.names.index(name)
        except ValueError as error:
            raise KeyError(name) from error
        return self.source.take(place)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names


@dataclass(frozen=True, slots=True, eq=False)
class Dealt:
    """Parts of one set of samples, which lie one after the other: a part is a view of them.

    `ends` are the places behind each part, of shape (devices,).
    """

    samples: LocalData
    ends: npt.NDArray[np.int64]

    def take(self, place: int) -> LocalData:
        """The part of the device at this place."""
        own = slice(int(self.ends[place - 1]) if place else 0, int(self.ends[place]))
        return LocalData(self.samples.x[own], self.samples.y[own])


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """A stretch of shuffled samples for each device, from a place drawn by seed and device alone.

    So nothing is kept of a device, and what it holds is a view. No sample is twice with one
    device; with devices whose stretches overlap it is. `samples` begins again behind its end, so
    that each of the first `count` can be a first one.
    """

    samples: LocalData
    count: int
    each: int
    key: int

    def take(self, place: int) -> LocalData:
        """The stretch of the device at this place."""
        first = int(uniform(self.key, place) * self.count)
        own = slice(first, first + self.each)
        return LocalData(self.samples.x[own], self.samples.y[own])


def deal(samples: LocalData, parts: Sequence[Indices]) -> Holdings:
    """Gives each device its part, places in the samples; takes one copy of them all."""
    ends = np.cumsum([len(part) for part in parts])
    return Holdings(Names(len(parts)), Dealt(samples.take(np.concatenate(parts)), ends))


def let_draw(samples: LocalData, devices: int, each: int, seed: int) -> Holdings:
    """Lets each device draw so many of these samples.

    Raises:
        ConfigError: more than there are.
    """
    if each > samples.samples:
        raise ConfigError(
            f"fleet.samples is {each}; expected at most the {samples.samples} that are not held "
            "out: correct the scenario"
        )
    order = np.random.default_rng([seed, 2]).permutation(samples.samples)
    shuffled = samples.take(np.concatenate([order, order[: each - 1]]))
    drawn = Drawn(shuffled, samples.samples, each, key_of(seed, "fleet/drawn"))
    return Holdings(Names(devices), drawn)
