"""A model that was written for one device, over the ranks of a mesh; and back again.

Every rank builds the whole model from the same seed, and keeps its shards. Attention and experts
are split over the tensor group, experts over the expert group; the rest is on every rank.
"""

from torch import nn

from cloud.trainers.parallel.attention import TensorAttention
from cloud.trainers.parallel.experts import ShardedExperts
from cloud.trainers.parallel.mesh import Mesh
from cloud.trainers.parallel.recompute import recompute
from federation.errors import ConfigError
from moe_serving.layers.experts import GroupedExperts
from moe_serving.layers.moe import MoELayer
from moe_serving.models.blocks import Block, RotaryAttention


def parallelize(
    model: nn.Module,
    mesh: Mesh,
    *,
    drops_duplicates: bool = True,
    keeps_collectives: bool = True,
    recomputes: bool = True,
) -> nn.Module:
    """Split a model's blocks over the mesh, in place.

    Args:
        model: a decoder or classifier of `moe_serving.models`, the same on all ranks.
        mesh: whose sizes its heads, experts and rows are multiples of.
        drops_duplicates: whether ranks of a tensor group send a share of the tokens each.
        keeps_collectives: whether what collectives gave is kept for the recomputation.
        recomputes: whether blocks keep no activations; without, nothing is recomputed.

    Raises:
        ConfigError: a model without such blocks, or sizes that do not come out even.
    """
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    if not blocks:
        raise ConfigError(
            f"{type(model).__name__} has no blocks of rotary attention and experts; expected a "
            "decoder or a classifier: train it without [parallel]"
        )
    for block in blocks:
        if type(block.attention) is RotaryAttention and mesh.shape.tensor > 1:
            block.attention = TensorAttention(block.attention, mesh.tensor)
        _shard(block.moe, mesh, drops_duplicates=drops_duplicates)
    if recomputes:
        recompute(model, Block, keeps_collectives=keeps_collectives)
    return model


def _shard(layer: MoELayer, mesh: Mesh, *, drops_duplicates: bool) -> None:
    whole = layer.experts
    if not isinstance(whole, GroupedExperts):
        raise ConfigError(
            f"layer {layer.number} has {type(whole).__name__}; experts that can be trained were "
            "expected: parallelize a model that serves nothing yet"
        )
    del layer.experts
    layer.experts = ShardedExperts(whole, mesh, drops_duplicates=drops_duplicates)
