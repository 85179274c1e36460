"""Training of a pruned model: devices send what lives, and no index."""

from federation.learning.aggregation.sparse import living_mean
from federation.learning.methods.record import Method

METHODS = (
    Method(
        name="sparse",
        title="A sparse global model",
        paper="arXiv:2302.05045",
        equation="section III-C",
        departs="SAMO reduces the gradients of one data centre's ranks; here devices average "
        "weights. The index is not kept: an entry of a matrix or kernel lives where the newest "
        "model is not zero, which hub and device both see; a mean of exactly zero becomes the "
        "smallest number, so that none dies by chance.",
        when_to_use="the run starts from a pruned model (`start`, or `headwater-hub train` with "
        "[sparse]): an update is as much smaller as entries are dead. From a dense model it is "
        "federated averaging",
        loss="sparse",
        aggregate=living_mean,
        keeps_zeros=True,
        stands_in=True,
    ),
)
