"""Attention over the ranks of a tensor group: each has some of the heads.

Megatron-LM (arXiv:1909.08053), section 3: queries, keys and values split by head, the output
projection by input; one all-reduce forward and one backward.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cloud.trainers.parallel.collectives import copy_to, reduce_from
from federation.errors import ConfigError
from moe_serving.models.blocks import RotaryAttention


class TensorAttention(RotaryAttention):
    """This rank's heads of an attention; its answer is that of the whole."""

    def __init__(self, whole: RotaryAttention, group: dist.ProcessGroup) -> None:
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        heads, kv_heads = whole.n_heads, whole.n_kv_heads
        if heads % ranks or kv_heads % ranks:
            raise ConfigError(
                f"{heads} heads and {kv_heads} of keys are not multiples of parallel.tensor = "
                f"{ranks}; every rank has as many: correct one of them"
            )
        super().__init__(whole.o.out_features, heads // ranks, kv_heads // ranks, whole.d_head)
        self._group = group
        with torch.no_grad():
            for name in ("q", "k", "v"):
                mine = getattr(whole, name).weight.chunk(ranks, dim=0)[rank]
                getattr(self, name).weight.copy_(mine)
            self.o.weight.copy_(whole.o.weight.chunk(ranks, dim=1)[rank])

    def forward(self, x_BLD: Tensor, cosine: Tensor, sine: Tensor, *, is_causal: bool) -> Tensor:
        """A whole batch, which every rank of the group has."""
        copied = copy_to(x_BLD, self._group)
        return reduce_from(super().forward(copied, cosine, sine, is_causal=is_causal), self._group)


SPLIT_BY: dict[str, int] = {"q": 0, "k": 0, "v": 0, "o": 1}
"""Along which dimension the weight of each projection is split."""


def is_split(module: nn.Module) -> bool:
    """Whether a module holds shards of a tensor group."""
    return isinstance(module, TensorAttention)
