"""Counts what travels: collectives and their bytes, by kind, on this rank."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_OPS = torch.ops._c10d_functional  # noqa: SLF001 - where torch keeps functional collectives
_KINDS = {
    _OPS.all_reduce.default: "all-reduce",
    _OPS.all_to_all_single.default: "all-to-all",
    _OPS.all_gather_into_tensor.default: "all-gather",
}


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within this context, counts functional collectives on numbers; sizes of rows apart.

    `calls` and `sent_bytes` are of what gradients flow through; `size_calls` of whole numbers,
    which say how many rows travel.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[str] = Counter()
        self.sent_bytes: Counter[str] = Counter()
        self.size_calls = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """See one operation."""
        kind = _KINDS.get(func)
        if kind is not None and isinstance(args[0], Tensor):
            sent = args[0]
            if sent.is_floating_point():
                self.calls[kind] += 1
                self.sent_bytes[kind] += sent.numel() * sent.element_size()
            else:
                self.size_calls += 1
        return func(*args, **(kwargs or {}))
