# ruff: noqa: ARG002 - each model looks at what decides it: the round, the time, or neither
"""What a model of presence tells, and the three simplest: always, by round, by block of time.

A device's place is its index in the fleet's order. Times are virtual seconds. Who is there
depends on the seed, the round and the time alone, never on what was asked before: two methods
that are compared see the same devices.
"""

import math
import random
from typing import Protocol

import numpy as np
import numpy.typing as npt

from simulations.draws import key_of, uniform, uniforms

Mask = npt.NDArray[np.bool_]

_FARTHEST = 1_000_000  # blocks: a device on so seldom is taken never to change


class Presence(Protocol):
    """Which devices are on, and when one will not be."""

    def on(self, number: int, now: float) -> Mask:
        """All devices at the opening of round `number`, from 1; not to be written to."""

    def is_on(self, place: int, number: int, now: float) -> bool:
        """One device, at any time of the round."""

    def leaves_at(self, place: int, number: int, now: float) -> float:
        """When a device that is on goes off; inf for models that only draw by round."""

    def returns_at(self, place: int, number: int, now: float) -> float:
        """When it is on again: `now` if it is; inf where only a later round decides."""


class Always:
    """Every device is on, always."""

    def __init__(self, devices: int) -> None:
        self._all = np.ones(devices, np.bool_)
        self._all.flags.writeable = False

    def on(self, number: int, now: float) -> Mask:
        """All of them."""
        return self._all

    def is_on(self, place: int, number: int, now: float) -> bool:
        """It is."""
        return True

    def leaves_at(self, place: int, number: int, now: float) -> float:
        """Never."""
        return math.inf

    def returns_at(self, place: int, number: int, now: float) -> float:
        """Now."""
        return now


class ByRound:
    """Each device is on with its own probability, whatever the others are; one at least.

    All are drawn anew every `every_rounds`, and again where nobody would be on (ReBaFL,
    arXiv:2303.06314).
    """

    def __init__(self, chances: npt.NDArray[np.float64], every_rounds: int, seed: int) -> None:
        self._chances, self._every, self._seed = chances, every_rounds, seed
        self._drawn: tuple[int, Mask] = (-1, np.empty(0, np.bool_))

    def on(self, number: int, now: float) -> Mask:
        """Those that this round's block has drawn."""
        block = (number - 1) // self._every
        if self._drawn[0] != block:
            self._drawn = (block, self._draw(block))
        return self._drawn[1]

    def is_on(self, place: int, number: int, now: float) -> bool:
        """Whether it was drawn."""
        return bool(self.on(number, now)[place])

    def leaves_at(self, place: int, number: int, now: float) -> float:
        """Not in this round."""
        return math.inf

    def returns_at(self, place: int, number: int, now: float) -> float:
        """Now, or not in this round."""
        return now if self.is_on(place, number, now) else math.inf

    def _draw(self, block: int) -> Mask:
        rng = _same_draws(f"{self._seed}/availability/{block}")
        while True:
            drawn: Mask = rng.random(len(self._chances)) < self._chances
            if drawn.any():
                drawn.flags.writeable = False
                return drawn


class ByBlock:
    """Time is cut into blocks; each device is on or out for a block with its own probability."""

    def __init__(self, chances: npt.NDArray[np.float64], block_s: float, seed: int) -> None:
        self._chances, self._block_s = chances, block_s
        self._key = key_of(seed, "presence/blocks")
        self._drawn: tuple[int, Mask] = (-1, np.empty(0, np.bool_))

    def on(self, number: int, now: float) -> Mask:
        """Those that this block of time has drawn."""
        block = self._block(now)
        if self._drawn[0] != block:
            places = np.arange(len(self._chances))
            drawn: Mask = uniforms(self._key, places, block) < self._chances
            drawn.flags.writeable = False
            self._drawn = (block, drawn)
        return self._drawn[1]

    def is_on(self, place: int, number: int, now: float) -> bool:
        """Whether this block of time has drawn it."""
        return self._is_drawn(place, self._block(now))

    def leaves_at(self, place: int, number: int, now: float) -> float:
        """The beginning of the first block in which it is out."""
        return self._first(place, now, is_on=False)

    def returns_at(self, place: int, number: int, now: float) -> float:
        """Now, or the beginning of the first block in which it is on."""
        return self._first(place, now, is_on=True)

    def _first(self, place: int, now: float, *, is_on: bool) -> float:
        if self._chances[place] in (0.0, 1.0) and bool(self._chances[place]) != is_on:
            return math.inf
        begun = self._block(now)
        for block in range(begun, begun + _FARTHEST):
            if self._is_drawn(place, block) == is_on:
                return max(now, block * self._block_s)
        return math.inf

    def _is_drawn(self, place: int, block: int) -> bool:
        return uniform(self._key, place, block) < float(self._chances[place])

    def _block(self, now: float) -> int:
        block = int(now // self._block_s)
        # Rounded, the end of a block may still divide into it.
        return block + 1 if (block + 1) * self._block_s <= now else block


def _same_draws(seed: str) -> np.random.Generator:
    """A generator whose floats are those of `random.Random(seed)`, by the array."""
    state = random.Random(seed).getstate()[1]  # noqa: S311 - nothing secret is drawn
    bits = np.random.MT19937(0)
    bits.state = {
        "bit_generator": "MT19937",
        "state": {"key": np.array(state[:-1], np.uint32), "pos": state[-1]},
    }
    return np.random.Generator(bits)
