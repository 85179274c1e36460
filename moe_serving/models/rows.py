"""Rows of many sequences in one step, and the cache that remembers them.

A step takes rows, not a padded batch: row n is token `tokens[n]` at `positions[n]` of the
sequence in slot `slots[n]`. Rows of one sequence stand together with rising positions, so one
step may hold the whole prompt of one sequence and the next token of a hundred others.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from federation.errors import DataError


@dataclass(frozen=True, slots=True)
class Run:
    """Rows `start` to `end` belong to one slot and stand at `first` and onwards in it."""

    slot: int
    start: int
    end: int
    first: int

    @property
    def rows(self) -> int:
        """How many rows it has."""
        return self.end - self.start

    @property
    def length(self) -> int:
        """How long its sequence is after the step."""
        return self.first + self.rows


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one step, as every layer needs them.

    Attributes:
        positions_N: places in the sequences.
        slots_N: places in the cache.
        long: runs of several rows: prompts, or parts of them.
        single: runs of one row, sequences that go on by one token, in groups of adjoining slots:
            what the cache holds of a group is a view, so nothing is copied.
    """

    positions_N: Tensor
    slots_N: Tensor
    long: tuple[Run, ...]
    single: tuple[tuple[Run, ...], ...]


def group_rows(positions_N: Tensor, slots_N: Tensor, n_slots: int, max_length: int) -> Rows:
    """Find the runs.

    Raises:
        DataError: A slot or position that the cache has no place for, a slot whose rows do not
            stand together, or positions that do not rise by one.
    """
    runs = _runs(positions_N.tolist(), slots_N.tolist())
    seen: set[int] = set()
    for run in runs:
        if not 0 <= run.slot < n_slots:
            raise DataError(f"slot {run.slot} is not there; the cache has {n_slots}")
        if run.first < 0 or run.length > max_length:
            raise DataError(
                f"slot {run.slot} would hold positions {run.first} to {run.length - 1}; "
                f"the cache has room for {max_length}"
            )
        if run.slot in seen:
            raise DataError(f"rows of slot {run.slot} do not stand together in rising order")
        seen.add(run.slot)
    long = tuple(run for run in runs if run.rows > 1)
    return Rows(positions_N, slots_N, long, _adjoining([run for run in runs if run.rows == 1]))


def _adjoining(runs: list[Run]) -> tuple[tuple[Run, ...], ...]:
    groups: list[list[Run]] = []
    for run in sorted(runs, key=lambda run: run.slot):
        if groups and groups[-1][-1].slot == run.slot - 1:
            groups[-1].append(run)
        else:
            groups.append([run])
    return tuple(tuple(group) for group in groups)


def _runs(positions: Sequence[int], slots: Sequence[int]) -> list[Run]:
    if len(positions) != len(slots):
        raise DataError(f"{len(positions)} positions and {len(slots)} slots; one of each a row")
    runs: list[Run] = []
    start = 0
    for n in range(1, len(slots) + 1):
        goes_on = n < len(slots) and (
            slots[n] == slots[n - 1] and positions[n] == positions[n - 1] + 1
        )
        if not goes_on:
            runs.append(Run(slots[start], start, n, positions[start]))
            start = n
    return runs


class KVCache:
    """Keys and values of every layer, [slots, heads, length, d_head] each, allocated at once.

    A slot needs no clearing: a sequence that begins in it overwrites what it will read.
    """

    def __init__(
        self,
        n_layers: int,
        n_slots: int,
        n_heads: int,
        max_length: int,
        d_head: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (n_slots, n_heads, max_length, d_head)
        self.n_slots = n_slots
        self.max_length = max_length
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(n_layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(n_layers)]

    @property
    def size_bytes(self) -> int:
        """What it takes of memory."""
        return sum(t.nbytes for t in (*self.keys, *self.values))

    def write(self, layer: int, rows: Rows, k_NHd: Tensor, v_NHd: Tensor) -> None:
        """Lay the rows' keys and values down at their places."""
        self.keys[layer][rows.slots_N, :, rows.positions_N] = k_NHd
        self.values[layer][rows.slots_N, :, rows.positions_N] = v_NHd

    def read(self, layer: int, runs: Sequence[Run], length: int) -> tuple[Tensor, Tensor]:
        """Views of the first `length` keys and values of runs whose slots adjoin and rise."""
        slots = slice(runs[0].slot, runs[-1].slot + 1)
        return self.keys[layer][slots, :, :length], self.values[layer][slots, :, :length]
