"""Collectives that gradients flow through, made of functional ones.

Only functional collectives are seen by a checkpoint's policy (`recompute`), so nothing here calls
`torch.distributed` otherwise, the exchange of sizes included. Each function names what its
backward does; `group` is a group of the mesh. A group of one moves nothing.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor


def _size(group: dist.ProcessGroup) -> int:
    return dist.get_world_size(group)


def _waited(moving: Tensor) -> Tensor:
    moved: Tensor = functional.wait_tensor(moving)  # type: ignore[no-untyped-call]
    return moved


def _sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return _waited(functional.all_reduce(x, "sum", group))


def _rows_of_all(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return _waited(functional.all_gather_single(x.contiguous(), 0, group))


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _sum(gradient.contiguous(), ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        del ctx
        return _sum(x.contiguous(), group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        del ctx
        return gradient, None


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, each = group, len(x) // _size(group)
        start = dist.get_rank(group) * each
        return x[start : start + each].contiguous()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _rows_of_all(gradient, ctx.group), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.rows = group, len(x)
        return _rows_of_all(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        start = dist.get_rank(ctx.group) * ctx.rows
        return gradient[start : start + ctx.rows], None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.sizes, ctx.group = (sent, received), group
        return _all_to_all(x, received, sent, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        sent, received = ctx.sizes
        return _all_to_all(gradient, sent, received, ctx.group), None, None, None


def copy_to(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Every rank uses the same input: backward adds up their gradients (Megatron's f)."""
    return x if _size(group) == 1 else _Copy.apply(x, group)  # type: ignore[no-untyped-call]


def reduce_from(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over ranks; backward hands every rank the whole gradient (Megatron's g)."""
    return x if _size(group) == 1 else _Reduce.apply(x, group)  # type: ignore[no-untyped-call]


def drop(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's share of rows that all ranks have; backward gathers the shares of gradients.

    The number of rows is a multiple of the ranks (TED, arXiv:2303.06318, section V-A).
    """
    return x if _size(group) == 1 else _Drop.apply(x, group)  # type: ignore[no-untyped-call]


def gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The rows of all ranks, each with as many; backward keeps this rank's (same section)."""
    return x if _size(group) == 1 else _Gather.apply(x, group)  # type: ignore[no-untyped-call]


def exchange(
    x: Tensor, received: Sequence[int], sent: Sequence[int], group: dist.ProcessGroup
) -> Tensor:
    """Rows to their ranks: `sent` rows to each, `received` from each; backward sends them back."""
    if _size(group) == 1:
        return x
    moved: Tensor = _Exchange.apply(x, list(received), list(sent), group)  # type: ignore[no-untyped-call]
    return moved


def exchange_counts(counts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Row r of what comes back is what rank r said of this one: [ranks, n] to [ranks, n]."""
    if _size(group) == 1:
        return counts
    ones = [1] * _size(group)
    return _all_to_all(counts, ones, ones, group)


def gather_counts(counts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """What every rank has: [n] to [ranks, n]."""
    return counts[None] if _size(group) == 1 else _rows_of_all(counts[None], group)


def _all_to_all(
    x: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup
) -> Tensor:
    return _waited(functional.all_to_all_single(x.contiguous(), received, sent, group))
