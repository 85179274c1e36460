"""When to place anew: from what was served lately, and only where it pays."""

from collections.abc import Sequence

from moe_serving.buffering.trace import Trace
from moe_serving.placement.record import Placement, renumber
from moe_serving.placement.search import imbalance, search

LEAST_GAIN = 0.03
"""Of the mean of max over mean: less does not pay for moving weights."""

LEAST_BATCHES = 32
"""A layer with fewer recorded visits stays as it is."""


def replan(
    trace: Trace, placements: Sequence[Placement], slots: int, *, least_gain: float = LEAST_GAIN
) -> tuple[Placement, ...]:
    """Places each layer anew where that lowers its imbalance on the trace by `least_gain`.

    Devices are numbered so that most experts stay where they are. Layers that gain less keep the
    very placement they have.

    Args:
        trace: Visits with the rows of all ranks together.
        placements: What is now, layer by layer.
        slots: Experts that fit on a device, a layer.
        least_gain: What moving must gain.
    """
    planned = []
    for layer, now in enumerate(placements):
        history = trace.loads(layer)
        if len(history) < LEAST_BATCHES:
            planned.append(now)
            continue
        found = renumber(now, search(history, now.devices, slots))
        pays = imbalance(history, found) <= imbalance(history, now) - least_gain
        planned.append(found if pays else now)
    return tuple(planned)
