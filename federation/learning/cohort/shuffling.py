"""The orders in which many clients see their samples: those of `training.batches`, drawn sooner.

There each epoch has a generator of its own, `np.random.default_rng([seed, epoch])`, and two
thirds of what an order costs is to seed it. NumPy fixes how that is done (NEP 19 and the page on
`SeedSequence`), so here it is done for all clients and epochs at once, on arrays, and one
generator is set to state after state.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_INIT_A, _MULT_A = 0x43B0D7E5, 0x931E8875
_INIT_B, _MULT_B = 0x8B51F9DD, 0x58F38DED
_MIX_L, _MIX_R = 0xCA01F9DD, 0x4973F715
_PCG_MULTIPLIER = 0x2360ED051FC65DA44385DF649FCCF645
_WORD, _LONG = 2**32 - 1, 2**128 - 1
_POOL = 4


class Shuffles:
    """The order of each epoch, for each of these seeds."""

    def __init__(self, seeds: Sequence[int], epochs: int) -> None:
        self._words = _seed_words(np.array([seed % 2**64 for seed in seeds], np.uint64), epochs)
        self._bits = np.random.PCG64(0)
        self._generator = np.random.Generator(self._bits)

    def order(self, row: int, samples: int, epoch: int) -> NDArray[np.int64]:
        """The samples in the order of this epoch, for the seed of this row."""
        high, low, inc_high, inc_low = self._words[row, epoch].tolist()
        increment = ((inc_high << 64 | inc_low) << 1 | 1) & _LONG
        state = (increment + (high << 64 | low)) * _PCG_MULTIPLIER + increment & _LONG
        self._bits.state = {
            "bit_generator": "PCG64",
            "state": {"state": state, "inc": increment},
            "has_uint32": 0,
            "uinteger": 0,
        }
        return self._generator.permutation(samples)


def _seed_words(seeds: NDArray[np.uint64], epochs: int) -> NDArray[np.uint64]:
    """What `SeedSequence([seed, epoch])` seeds a PCG64 with: (seeds, epochs, 4)."""
    shape = len(seeds), epochs
    low = np.broadcast_to((seeds & np.uint64(_WORD))[:, None], shape).astype(np.uint32)
    high = np.broadcast_to((seeds >> np.uint64(32))[:, None], shape).astype(np.uint32)
    epoch = np.broadcast_to(np.arange(epochs, dtype=np.uint32), shape)
    zero = np.zeros(shape, np.uint32)
    # A seed below 2^32 is one word, a larger one two.
    is_long = high > 0
    entropy = [low, np.where(is_long, high, epoch), np.where(is_long, epoch, zero), zero]
    words = _generated(_mixed(entropy), 2 * _POOL)
    pairs = [lo.astype(np.uint64) | hi.astype(np.uint64) << np.uint64(32) for lo, hi in words]
    return np.stack(pairs, -1)


def _mixed(entropy: list[NDArray[np.uint32]]) -> list[NDArray[np.uint32]]:
    constant = _INIT_A

    def hashed(value: NDArray[np.uint32]) -> NDArray[np.uint32]:
        nonlocal constant
        value = value ^ np.uint32(constant)
        constant = constant * _MULT_A & _WORD
        value = value * np.uint32(constant)
        return value ^ value >> np.uint32(16)

    pool = [hashed(word) for word in entropy]
    for source in range(_POOL):
        for target in range(_POOL):
            if source != target:
                mixed = pool[target] * np.uint32(_MIX_L) - hashed(pool[source]) * np.uint32(_MIX_R)
                pool[target] = mixed ^ mixed >> np.uint32(16)
    return pool


def _generated(
    pool: list[NDArray[np.uint32]], count: int
) -> list[tuple[NDArray[np.uint32], NDArray[np.uint32]]]:
    constant, words = _INIT_B, []
    for at in range(count):
        value = pool[at % _POOL] ^ np.uint32(constant)
        constant = constant * _MULT_B & _WORD
        value = value * np.uint32(constant)
        words.append(value ^ value >> np.uint32(16))
    return list(zip(words[::2], words[1::2], strict=True))
