"""Experts spread over processes: rows travel to where their experts are, and answers back.

"Towards MoE Deployment" (arXiv:2303.06182): counts are exchanged first, then exactly the rows
that there are, with no capacity and no padding. A placement says who holds what; copied experts
share each batch's rows by water-filling, which every rank works out alike from the counts.

All ranks meet in each visit of a layer. Either all of them serve requests of their own, or one
leads and the others `follow`. A new placement is prepared aside while the old one goes on; every
announcement of counts carries the newest version its rank is ready for, and a visit is run by
the least of these. So all ranks change in the same visit, and no half-moved plan is ever used.

Names of tensors end in their shape: N rows of this rank, M rows received, D width, E experts,
R ranks, L layers.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as collectives

from federation.errors import ConfigError, HeadwaterError, StoreError
from moe_serving.buffering.source import Buffer, Source
from moe_serving.layers.experts import ExpertStore, Pack, PackedExpert
from moe_serving.layers.gating import Plan
from moe_serving.layers.moe import MoELayer
from moe_serving.placement.dispatch import Dispatch, Ints, dispatch, divide
from moe_serving.placement.record import Placement, place
from moe_serving.placement.split import split

FOLLOW, STOP, BEAT, PROPOSE = -1, -2, -3, -4
"""What a rank announces in place of a layer: whatever comes, the end, nothing, a placement."""

Listener: TypeAlias = Callable[[int, Sequence[int]], None]


class Share(ExpertStore, Protocol):
    """The experts that one rank runs, by key (`Shape.key`)."""

    def prepare(self, keys: frozenset[int]) -> None:
        """Makes experts ready to be visited, beside those that are; from a thread of its own.

        Raises:
            StoreError: One cannot be read.
        """

    def keep(self, keys: frozenset[int]) -> None:
        """Lets all others go."""


class HeldShare:
    """Experts of a source, packed, in memory: exactly those that were prepared and kept."""

    def __init__(self, source: Source, pack: Pack):
        self._source = source
        self._pack = pack
        self._held: dict[int, PackedExpert] = {}
        self._lock = threading.Lock()

    @property
    def size_bytes(self) -> int:
        """What the experts take of memory."""
        with self._lock:
            return sum(expert.size_bytes for expert in self._held.values())

    def prepare(self, keys: frozenset[int]) -> None:
        """Reads and packs those that are not here."""
        source = self._source
        for key in sorted(keys.difference(self._held)):
            memory = torch.empty(source.size_bytes, dtype=torch.uint8, device=source.device)
            source.read(key, Buffer(memory))
            weights = source.expert.split(memory.view(source.dtype))
            packed = self._pack(weights, source.expert.activation)
            with self._lock:
                self._held[key] = packed

    def keep(self, keys: frozenset[int]) -> None:
        """Drops all others."""
        with self._lock:
            self._held = {key: expert for key, expert in self._held.items() if key in keys}

    def visit(self, layer: int, counts_E: Sequence[int]) -> Iterator[tuple[int, PackedExpert]]:
        """Yields the active experts by their number."""
        for expert, count in enumerate(counts_E):
            if count:
                yield expert, self._held[self._source.shape.key(layer, expert)]


@dataclass(frozen=True, slots=True)
class BufferedShare:
    """A store with a byte budget as a rank's share: place by load, buffer inside each device."""

    store: ExpertStore

    def prepare(self, keys: frozenset[int]) -> None:
        """Nothing to do: the store reads any expert when it is asked for."""

    def keep(self, keys: frozenset[int]) -> None:
        """Nothing to do: the store's policy lets experts go."""

    def visit(self, layer: int, counts_E: Sequence[int]) -> Iterator[tuple[int, PackedExpert]]:
        """As the store yields them."""
        return self.store.visit(layer, counts_E)


@dataclass(frozen=True, slots=True, eq=False)
class _Announced:
    """What all ranks announced: the layer (or one of the words below 0), and counts_RE."""

    layer: int
    counts_RE: Ints


class ExpertParallel:
    """One rank of a group that runs a model's experts together.

    Args:
        share: The experts this rank runs; those of the placements are prepared here.
        placements: Of each layer, over as many devices as the group has ranks.
        d_model: Width of a row.
        dtype: Of a row.
        device: Where rows are: the CPU with gloo, the rank's GPU with NCCL.
        group: The ranks; all of the default group without it.

    Raises:
        ConfigError: A placement is over another number of devices.
        StoreError: An expert cannot be read.
    """

    def __init__(
        self,
        share: Share,
        placements: Sequence[Placement],
        d_model: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        group: dist.ProcessGroup | None = None,
    ):
        self.listener: Listener | None = None
        self.version = 0
        self.failure: HeadwaterError | None = None
        self._share = share
        self._group = _group(group)
        self._rank, self._ranks = self._group.rank(), self._group.size()
        self._experts = len(placements[0].holders)
        self._d_model = d_model
        self._dtype = dtype
        self._device = torch.device("cpu") if device is None else device
        self._plans = {0: tuple(placements)}
        self._ready = 0
        for placement in placements:
            if placement.devices != self._ranks or len(placement.holders) != self._experts:
                raise ConfigError(
                    f"a placement of {len(placement.holders)} experts over {placement.devices} "
                    f"devices; {self._experts} over {self._ranks}, one a rank, are needed"
                )
        share.prepare(self._keys(0))
        self._preparer = ThreadPoolExecutor(1, thread_name_prefix="expert-preparer")

    @property
    def placements(self) -> tuple[Placement, ...]:
        """What visits are run by now, layer by layer."""
        return self._plans[self.version]

    def attach(self, layers: Iterable[MoELayer]) -> None:
        """Makes a model's layers run their experts here."""
        for layer in layers:
            layer.serve_from(ParallelExperts(self, layer.number))

    def run(self, layer: int, x_ND: Tensor, counts_E: Sequence[int]) -> Tensor:
        """Has rows run by their experts, wherever those are: [N, D], in the order given.

        Args:
            layer: The same on all ranks that do not follow.
            x_ND: Rows in order of their expert.
            counts_E: Rows of each expert.

        Raises:
            StoreError: A rank could not run its experts; all ranks raise it, and can go on.
        """
        announced = self._announce(layer, counts_E)
        return self._visit(announced, x_ND)

    def follow(self) -> None:
        """Runs experts for the others, with no rows of its own, until one says `stop`."""
        nothing = torch.empty(0, self._d_model, dtype=self._dtype, device=self._device)
        while (announced := self._announce(FOLLOW)).layer != STOP:
            if announced.layer == PROPOSE:
                self._receive(None)
            elif announced.layer >= 0:
                try:
                    self._visit(announced, nothing)
                except StoreError as error:
                    self.failure = error  # whoever sent the rows raises it

    def stop(self) -> None:
        """Ends `follow` on the other ranks."""
        self._announce(STOP)

    def beat(self) -> None:
        """Meets the others without rows: keeps the group from timing out, and lets it rebalance."""
        self._announce(BEAT)

    def propose(self, placements: Sequence[Placement] | None) -> None:
        """Begins to move to new placements; visits go on by the old until all ranks are ready.

        Ranks that serve requests of their own all call it, those above 0 with None.
        """
        self._announce(PROPOSE)
        self._receive(placements)

    def close(self) -> None:
        """Waits for what is being prepared. The group is the caller's to destroy."""
        self._preparer.shutdown(cancel_futures=True)

    def _announce(self, word: int, counts_E: Sequence[int] | None = None) -> _Announced:
        said = torch.zeros(2 + self._experts, dtype=torch.int64)
        said[0], said[1] = word, self._ready
        if counts_E is not None:
            said[2:] = torch.tensor(counts_E)
        # The same to everybody. The gathering collective's name changed from torch to torch.
        copies = said.to(self._device).repeat(self._ranks)
        heard = _wait(collectives.all_to_all_single(copies, None, None, self._group))
        heard_RC = heard.view(self._ranks, -1).cpu().numpy()
        words = set(heard_RC[:, 0].tolist()) - {FOLLOW}
        if len(words) != 1:
            raise ConfigError(
                f"ranks of one group visit {sorted(words)} at one time; all must take the same "
                "steps, or one leads and the others follow"
            )
        self._change_version(int(heard_RC[:, 1].min()))
        return _Announced(words.pop(), heard_RC[:, 2:])

    def _change_version(self, agreed: int) -> None:
        if agreed == self.version:
            return
        self.version = agreed
        for old in [version for version in self._plans if version < agreed]:
            del self._plans[old]
        self._share.keep(frozenset().union(*map(self._keys, self._plans)))

    def _keys(self, version: int) -> frozenset[int]:
        return frozenset(
            layer * self._experts + expert
            for layer, placement in enumerate(self._plans[version])
            for expert in placement.held_by(self._rank)
        )

    def _visit(self, announced: _Announced, x_ND: Tensor) -> Tensor:
        placement = self.placements[announced.layer]
        total_E = announced.counts_RE.sum(axis=0).tolist()
        if self.listener is not None:
            self.listener(announced.layer, total_E)
        part_RED = divide(announced.counts_RE, split(total_E, placement))
        mine = dispatch(part_RED, self._rank)
        order_N = torch.from_numpy(mine.send_order).to(self._device)
        received = collectives.all_to_all_single(
            x_ND[order_N].contiguous(),
            list(mine.receive_sizes),
            list(mine.send_sizes),
            self._group,
        )
        answers = self._run_own(announced.layer, mine, _wait(received))
        returned = collectives.all_to_all_single(
            answers,
            [rows + 1 for rows in mine.send_sizes],
            [rows + 1 for rows in mine.receive_sizes],
            self._group,
        )
        y_ND = torch.empty_like(x_ND)
        y_ND[order_N] = self._unpack(mine, _wait(returned))
        return y_ND

    def _run_own(self, layer: int, mine: Dispatch, x_MD: Tensor) -> Tensor:
        """Answers in the order received; behind each rank's a row that says if all went well."""
        order_M = torch.from_numpy(mine.expert_order).to(self._device)
        sorted_MD, y_MD = x_MD[order_M], torch.empty_like(x_MD)
        ends_E = mine.counts_E.cumsum()
        status = 0.0
        try:
            for expert, run in self._share.visit(layer, mine.counts_E.tolist()):
                end = int(ends_E[expert])
                start = end - int(mine.counts_E[expert])
                y_MD[order_M[start:end]] = run(sorted_MD[start:end])
        except StoreError as error:
            self.failure = error
            status = 1.0
        status_1D = torch.full((1, self._d_model), status, dtype=x_MD.dtype, device=x_MD.device)
        blocks = torch.split(y_MD, list(mine.receive_sizes))
        return torch.cat([part for block in blocks for part in (block, status_1D)])

    def _unpack(self, mine: Dispatch, returned: Tensor) -> Tensor:
        blocks = torch.split(returned, [rows + 1 for rows in mine.send_sizes])
        failed = [rank for rank, block in enumerate(blocks) if bool(block[-1, 0] != 0)]
        if failed:
            raise StoreError(
                f"rank {failed[0]} could not run its experts (its own error says why); this step "
                "has no answer, and may be tried again"
            )
        return torch.cat([block[:-1] for block in blocks])

    def _receive(self, placements: Sequence[Placement] | None) -> None:
        """Hears rank 0's placements, and begins to prepare them."""
        now = self.placements
        holds = torch.zeros(len(now), self._experts, self._ranks, dtype=torch.int64)
        for layer, placement in enumerate(placements or ()):
            for expert, holders in enumerate(placement.holders):
                holds[layer, expert, list(holders)] = 1
        heard = holds.to(self._device)
        dist.broadcast(heard, group_src=0, group=self._group)
        version = max(self._plans) + 1
        self._plans[version] = tuple(
            place(self._ranks, [np.flatnonzero(mine).tolist() for mine in layer])
            for layer in heard.cpu().numpy()
        )
        self._preparer.submit(self._prepare, version, self._keys(version))

    def _prepare(self, version: int, keys: frozenset[int]) -> None:
        try:
            self._share.prepare(keys)
        except HeadwaterError as error:
            # This rank never says it is ready, so all go on by the placement they have.
            self.failure = error
            return
        self._ready = version


@dataclass(frozen=True, slots=True)
class ParallelExperts:
    """A layer's experts, wherever they are; `MoELayer.serve_from` takes it."""

    group: ExpertParallel
    layer: int

    def __call__(self, x_TD: Tensor, plan: Plan) -> Tensor:
        """The weighted sum of the experts' answers, [T, D]."""
        y_ND = self.group.run(self.layer, x_TD[plan.token_N], plan.counts_E.tolist())
        y_ND.mul_(plan.weight_N[:, None].to(x_TD.dtype))
        return torch.zeros_like(x_TD).index_add_(0, plan.token_N, y_ND)


def _group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    found = group or dist.group.WORLD
    if found is None:
        raise ConfigError("no process group; start with torchrun, or call init_process_group")
    return found


def _wait(coming: Tensor) -> Tensor:
    here: Tensor = collectives.wait_tensor(coming)  # type: ignore[no-untyped-call]
    return here
