"""What a world is like beside its devices."""

from dataclasses import dataclass

from optimizer.baselines import select_uniformly
from optimizer.selection import Selector
from simulations.bus import PERFECT, LinkQuality


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What a world is like beside its devices. `seed` decides links, births and back-offs.

    With `shares_memory` the hub sends contents of any size within a letter; the settings of
    its devices must say the same.
    """

    seed: int = 0
    namespace: str = "fleet"
    hub_quality: LinkQuality = PERFECT
    select: Selector = select_uniformly
    shares_memory: bool = False


USUAL = Conditions()
"""Perfect links, seed 0."""
