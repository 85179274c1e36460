"""Recomputation that does not communicate again (TED, arXiv:2303.06318, section V-B).

In backward a block's activations are computed anew, except what a collective gave: that was kept.
So a layer communicates four times a step and kind, not six.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (  # the one public way
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

_OPS = torch.ops._c10d_functional  # noqa: SLF001 - where torch keeps functional collectives
KEPT = frozenset(
    {
        _OPS.all_reduce.default,
        _OPS.all_to_all_single.default,
        _OPS.all_gather_into_tensor.default,
        _OPS.wait_tensor.default,
        torch.ops.aten.topk.default,
    }
)
"""What is kept: collectives, waiting for them, and the choice of experts, which may not differ."""


def recompute(model: nn.Module, block: type[nn.Module], *, keeps_collectives: bool) -> None:
    """Have every block of this type recompute its activations in backward, in place.

    Args:
        model: its blocks are wrapped; names of parameters stay as they were in state dicts.
        block: which modules are recomputed as one.
        keeps_collectives: whether what collectives gave is kept. It costs their outputs' memory.
    """
    options: dict[str, Any] = {"checkpoint_impl": CheckpointImpl.NO_REENTRANT}
    if keeps_collectives:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    wrap = partial(checkpoint_wrapper, **options)
    apply_activation_checkpointing(
        model, checkpoint_wrapper_fn=wrap, check_fn=lambda module: isinstance(module, block)
    )


def _policy(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
