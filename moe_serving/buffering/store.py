"""A store of experts that keeps within a byte budget: residents, and buffers for the others."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch

from federation.errors import ConfigError, HeadwaterError, StoreError
from moe_serving.buffering.policies import DEFAULT, make_policy
from moe_serving.buffering.reader import Reader
from moe_serving.buffering.residency import Fetch, Heat, Residency
from moe_serving.buffering.source import Buffer, FileSource, HostSource, Source
from moe_serving.checkpoint import expert_ranges
from moe_serving.kernels.plain import PlainExpert, pack_plain
from moe_serving.layers.experts import Pack, PackedExpert

Listener: TypeAlias = Callable[[int, Sequence[int]], None]
"""Told a visit's layer and counts_E."""

Visit: TypeAlias = Generator[tuple[int, PackedExpert], None, None]
"""Experts as they become ready. Whoever stops half-way closes it, or drops it."""

IN_FLIGHT = 2
"""Buffers for misses: one runs while the next is read."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How a store uses its budget.

    Attributes:
        budget_bytes: Residents, buffers and the expert that runs: all together at most this.
        policy: Who stays; a name in `moe_serving.buffering.policies.POLICIES`.
        foreseen_most: Buffers, of the same budget, for experts foreseen to be needed next.
    """

    budget_bytes: int
    policy: str = DEFAULT
    foreseen_most: int = 0


@dataclass(frozen=True, slots=True)
class Counters:
    """What a store has done since it was opened.

    Attributes:
        hits: Uses of residents.
        misses: All other uses.
        foreseen: Misses that were here or on their way as they had been foreseen.
        bytes_read: Of experts, from the source.
        stall_s: How long visits waited for the source.
        resident_bytes: Held now.
        peak_bytes: The most that was ever held.
    """

    hits: int
    misses: int
    foreseen: int
    bytes_read: int
    stall_s: float
    resident_bytes: int
    peak_bytes: int


@dataclass(slots=True, eq=False)
class _Held:
    """An expert ready to run; `buffer` is where its weights lie if the kernel has no copy."""

    run: PackedExpert
    buffer: Buffer | None
    own_bytes: int


class BufferedStore:
    """Experts within a byte budget, whatever the size of the model.

    Residents are packed and stay; a miss is read by another thread while what came before it
    runs, is packed, runs, and stays or goes as the policy says. Weights never change, so whoever
    goes is dropped and never written back. All experts run on the same kernel, hit or miss, so an
    answer has the same bits for every budget and every policy.

    One thread at a time may visit.

    Args:
        source: Where experts come from; closed with the store.
        pack: Makes of weights what runs them; the same for every expert.
        settings: Budget and policy.
        heat_LE: How much each expert is used (`moe_serving.buffering.heat`); the hottest are
            resident from the start.

    Raises:
        ConfigError: The budget cannot hold even one expert at a time, or names no policy.
        StoreError: The source cannot be read.
    """

    def __init__(
        self, source: Source, pack: Pack, settings: Settings, *, heat_LE: Heat | None = None
    ):
        self.shape = source.shape
        self.listener: Listener | None = None
        self._source = source
        self._pack = pack
        self._settings = settings
        self._held: dict[int, _Held] = {}
        self._own_bytes = 0
        self._foreseen_hits = 0
        self._expected: tuple[int, ...] = ()
        in_flight = IN_FLIGHT + settings.foreseen_most
        packed_bytes = _packed_bytes(source, pack)
        capacity = _capacity(source, settings.budget_bytes, in_flight, packed_bytes)
        # Residents of a kernel that works on weights as they are stay in the buffer they came in.
        buffers = in_flight + (0 if packed_bytes else capacity)
        self._buffer_bytes = self._peak_bytes = buffers * source.size_bytes
        policy = make_policy(settings.policy, self.shape, capacity, heat_LE)
        self._residency = Residency(self.shape, capacity, policy)
        free = [_new_buffer(source) for _ in range(buffers)]
        self._reader = Reader(source, free, settings.foreseen_most)
        if heat_LE is not None:
            self._warm_up(heat_LE)

    @property
    def capacity(self) -> int:
        """How many experts may be resident."""
        return self._residency.capacity

    @property
    def residents(self) -> frozenset[int]:
        """The keys of the residents."""
        return self._residency.residents

    @property
    def size_bytes(self) -> int:
        """Held now: buffers, residents and what runs."""
        return self._buffer_bytes + self._own_bytes

    def counters(self) -> Counters:
        """What was done so far."""
        return Counters(
            hits=self._residency.hits,
            misses=self._residency.misses,
            foreseen=self._foreseen_hits,
            bytes_read=self._reader.bytes_read,
            stall_s=self._reader.stall_s,
            resident_bytes=self.size_bytes,
            peak_bytes=self._peak_bytes,
        )

    def expect(self, layer: int, experts: Sequence[int]) -> None:
        """Hears which experts a layer will probably need next, likeliest first.

        They are read after the misses of the visit that comes first.
        """
        keys = (self.shape.key(layer, expert) for expert in experts)
        absent = [key for key in keys if key not in self._held]
        self._expected = tuple(absent[: self._settings.foreseen_most])

    def visit(self, layer: int, counts_E: Sequence[int]) -> Visit:
        """Yields the active experts, residents first; run each before asking for the next.

        Raises:
            StoreError: An expert could not be read. The store can be visited again.
        """
        if self.listener is not None:
            self.listener(layer, counts_E)
        active = [expert for expert, count in enumerate(counts_E) if count]
        plan = self._residency.visit(layer, active)
        here = [expert for expert in plan.hits if self.shape.key(layer, expert) in self._held]
        # A visit that was given up half-way leaves residents that were never read.
        lost = [Fetch(expert, True, None) for expert in plan.hits if expert not in here]
        fetches = [*lost, *plan.fetches]
        keys = [self.shape.key(layer, fetch.expert) for fetch in fetches]
        self._foreseen_hits += self._reader.ask(keys, self._expected)
        self._expected = ()
        for expert in here:
            yield expert, self._held[self.shape.key(layer, expert)].run
        yield from self._run_misses(layer, fetches)

    def close(self) -> None:
        """Ends the reading thread and lets go of all experts."""
        self._reader.close()
        self._held.clear()
        self._own_bytes = 0

    def _run_misses(self, layer: int, fetches: Sequence[Fetch]) -> Visit:
        done = 0
        try:
            for fetch in fetches:
                if fetch.evicted is not None:
                    self._drop(fetch.evicted)
                done += 1
                key = self.shape.key(layer, fetch.expert)
                held = self._take(key)
                if fetch.stays:
                    self._held[key] = held
                try:
                    yield fetch.expert, held.run
                finally:
                    if not fetch.stays:
                        self._let_go(held)
        finally:
            for fetch in fetches[done:]:
                if fetch.evicted is not None:
                    self._drop(fetch.evicted)

    def _take(self, key: int) -> _Held:
        buffer = self._reader.take(key)
        held = self._make(buffer)
        if held.buffer is None:
            self._reader.give_back(buffer)
        return held

    def _make(self, buffer: Buffer) -> _Held:
        packed = _pack(self._source, self._pack, buffer)
        if _works_on_buffer(packed):
            return _Held(packed, buffer, 0)
        self._own_bytes += packed.size_bytes
        self._peak_bytes = max(self._peak_bytes, self.size_bytes)
        if self.size_bytes > self._settings.budget_bytes:
            raise RuntimeError(f"{self.size_bytes} bytes held of {self._settings.budget_bytes}")
        return _Held(packed, None, packed.size_bytes)

    def _drop(self, key: int) -> None:
        held = self._held.pop(key, None)
        if held is not None:
            self._let_go(held)

    def _let_go(self, held: _Held) -> None:
        self._own_bytes -= held.own_bytes
        if held.buffer is not None:
            self._reader.give_back(held.buffer)

    def _warm_up(self, heat_LE: Heat) -> None:
        keys = self._residency.warm_up(heat_LE)
        self._reader.ask(keys, ())
        try:
            for key in keys:
                self._held[key] = self._take(key)
        except StoreError:
            self.close()
            raise


def _new_buffer(source: Source) -> Buffer:
    return Buffer(torch.empty(source.size_bytes, dtype=torch.uint8, device=source.device))


def _pack(source: Source, pack: Pack, buffer: Buffer) -> PackedExpert:
    return pack(source.expert.split(buffer.bytes_B.view(source.dtype)), source.expert.activation)


def _works_on_buffer(packed: PackedExpert) -> bool:
    return isinstance(packed, PlainExpert)


def _packed_bytes(source: Source, pack: Pack) -> int:
    """What a packed expert takes beside its buffer: 0 if the kernel works on that."""
    buffer = _new_buffer(source)
    source.read(0, buffer)
    packed = _pack(source, pack, buffer)
    return 0 if _works_on_buffer(packed) else packed.size_bytes


def _capacity(source: Source, budget_bytes: int, in_flight: int, packed_bytes: int) -> int:
    # A kernel with memory of its own needs some for a miss that runs and does not stay.
    least = in_flight * source.size_bytes + packed_bytes
    if budget_bytes < least:
        raise ConfigError(
            f"a budget of {budget_bytes} bytes cannot hold the experts that run and are read at "
            f"one time; give at least {least}"
        )
    known = source.shape.layers * source.shape.experts
    return min(known, (budget_bytes - least) // (packed_bytes or source.size_bytes))


def open_store(
    folder: Path,
    settings: Settings,
    *,
    pack: Pack = pack_plain,
    device: torch.device | None = None,
    heat_LE: Heat | None = None,
) -> BufferedStore:
    """Opens a checkpoint's experts within a budget; `checkpoint.load` takes the store.

    Args:
        folder: Of the checkpoint.
        settings: Budget and policy.
        pack: The kernel. Packing is paid for by each miss and pays at many rows an expert: for a
            few rows the plain kernel, which packs nothing, is the fastest that misses at all.
        device: Where experts run. For a GPU, all experts lie in pinned memory of the host.
        heat_LE: Which experts to begin with.

    Raises:
        StoreError: The checkpoint cannot be read.
        ConfigError: The budget is too small, or the policy unknown.
    """
    ranges = expert_ranges(folder)
    where = torch.device("cpu") if device is None else device
    if not ranges.offsets:
        raise ConfigError(f"{folder} has no mixture layers; load it without a store")
    source: Source = FileSource(ranges) if where.type == "cpu" else HostSource(ranges, where)
    try:
        return BufferedStore(source, pack, settings, heat_LE=heat_LE)
    except HeadwaterError:
        source.close()
        raise
