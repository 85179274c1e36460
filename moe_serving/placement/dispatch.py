"""Which rows go from which rank to which device: index arithmetic, the same on every rank.

Shapes: R ranks (each is a device too), E experts, D devices, N rows of one rank in the order of
their experts.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Dispatch:
    """One rank's part in one exchange.

    Attributes:
        send_order: Rows as they leave: by device, then expert.
        send_sizes: Rows to each device.
        receive_sizes: Rows from each rank.
        expert_order: Received rows (by rank, then expert) by expert instead.
        counts_E: Received rows of each expert.
    """

    send_order: Ints
    send_sizes: tuple[int, ...]
    receive_sizes: tuple[int, ...]
    expert_order: Ints
    counts_E: Ints


def divide(counts_RE: Ints, rows_ED: Ints) -> Ints:
    """Says how many of each rank's rows of each expert go to each device, [R, E, D].

    A rank keeps what it can; of the rest, ranks in order fill the devices in order.

    Args:
        counts_RE: Rows that each rank has for each expert.
        rows_ED: Rows that each device shall have of each expert (`split`); same sums.
    """
    ranks = np.arange(len(counts_RE))
    part_RED: Ints = np.zeros((*counts_RE.shape, rows_ED.shape[1]), dtype=np.int64)
    own_RE = np.minimum(counts_RE, rows_ED[:, ranks].T)
    part_RED[ranks, :, ranks] = own_RE
    left_RE = counts_RE - own_RE
    room_ED = rows_ED.copy()
    room_ED[:, ranks] -= own_RE.T
    row_end_RE, place_end_ED = left_RE.cumsum(axis=0), room_ED.cumsum(axis=1)
    ends = np.minimum(row_end_RE[:, :, None], place_end_ED[None])
    begins = np.maximum((row_end_RE - left_RE)[:, :, None], (place_end_ED - room_ED)[None])
    part_RED += np.maximum(ends - begins, 0)
    return part_RED


def dispatch(part_RED: Ints, rank: int) -> Dispatch:
    """Works out one rank's part of a division."""
    mine_ED, coming_RE = part_RED[rank], part_RED[:, :, rank]
    begin_ED = _begins(mine_ED)
    coming_begin_RE = _begins(coming_RE)
    return Dispatch(
        send_order=_ranges(begin_ED.T, mine_ED.T),
        send_sizes=tuple(mine_ED.sum(axis=0).tolist()),
        receive_sizes=tuple(coming_RE.sum(axis=1).tolist()),
        expert_order=_ranges(coming_begin_RE.T, coming_RE.T),
        counts_E=coming_RE.sum(axis=0),
    )


def _begins(lengths: Ints) -> Ints:
    """Where each stretch begins when all lie one behind the other in C order."""
    begins: Ints = (lengths.cumsum() - lengths.ravel()).reshape(lengths.shape)
    return begins


def _ranges(begins: Ints, lengths: Ints) -> Ints:
    """The numbers of all stretches, one stretch after the other in C order."""
    flat = lengths.ravel()
    before = flat.cumsum() - flat
    numbers: Ints = np.repeat(begins.ravel() - before, flat) + np.arange(int(flat.sum()))
    return numbers
