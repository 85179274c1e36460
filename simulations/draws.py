"""Chance by address: the draw of a device and a number is the same whenever it is asked for.

So a fleet's arrays and one device's draw agree, idle devices keep no generators, and what one
part of a world draws disturbs no other part.
"""

import hashlib

import numpy as np
import numpy.typing as npt

Places = npt.NDArray[np.integer]

_MASK = (1 << 64) - 1
_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def key_of(seed: int, what: str) -> int:
    """Gives the key of one use of chance, 64 bits, from the world's seed and a name."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{what}".encode()).digest()[:8])


def uniform(key: int, place: int, number: int = 0) -> float:
    """Gives the draw of one device and number, between 0 and 1 and neither of them."""
    bits = _mix((_mix((place * _GOLDEN + key) & _MASK) + number * _GOLDEN) & _MASK)
    return ((bits >> 11) + 0.5) * 2.0**-53


def uniforms(key: int, places: Places, numbers: Places | int = 0) -> npt.NDArray[np.float64]:
    """Gives the draws of many devices, each the same as `uniform` gives.

    Args:
        key: Of this use of chance.
        places: (N,), from 0.
        numbers: (N,) from 0, or one for all.
    """
    golden = np.uint64(_GOLDEN)
    shift = np.asarray(numbers, np.uint64).reshape(-1) * golden
    bits = _mix_all(_mix_all(places.astype(np.uint64) * golden + np.uint64(key)) + shift)
    drawn: npt.NDArray[np.float64] = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return drawn


def _mix(bits: int) -> int:
    """SplitMix64's finaliser (Steele, Lea and Flood, OOPSLA 2014)."""
    bits = ((bits ^ (bits >> 30)) * _FIRST) & _MASK
    bits = ((bits ^ (bits >> 27)) * _SECOND) & _MASK
    return bits ^ (bits >> 31)


def _mix_all(bits: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(_FIRST)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(_SECOND)
    return bits ^ (bits >> np.uint64(31))
