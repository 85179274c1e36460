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
    zero = np.zeros(shape, np.uint32)
    entropy = [low, np.where(is_long, high, epoch), np.where(is_long, epoch, zero), zero]
    pool = _mixed(np.stack(entropy))
    words = _hashed(np.concatenate((pool, pool)), _constants(_INIT_B, _MULT_B, 9))
    wide = words.astype(np.uint64)
    return np.moveaxis(wide[0::2] | wide[1::2] << np.uint64(32), 0, -1)


def _mixed(pool: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Every word of the pool, (4, ...), stirred into every other."""
    constants = _constants(_INIT_A, _MULT_A, 17)
    pool = _hashed(pool, constants[:5])
    for source in range(4):
        others = [target for target in range(4) if target != source]
        start = 4 + 3 * source
        stirred = _hashed(np.stack([pool[source]] * 3), constants[start : start + 4])
        mixed = pool[others] * np.uint32(_MIX_L) - stirred * np.uint32(_MIX_R)
        pool[others] = mixed ^ mixed >> np.uint32(16)
    return pool


def _hashed(words: NDArray[np.uint32], constants: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Each of n words with its constant, of n + 1, and the one after it."""
    mixed = (words ^ constants[:-1, None, None]) * constants[1:, None, None]
    return mixed ^ mixed >> np.uint32(16)


def _constants(first: int, factor: int, count: int) -> NDArray[np.uint32]:
    powers = [first * pow(factor, power, 2**32) & _WORD for power in range(count)]
    return np.array(powers, np.uint32)
