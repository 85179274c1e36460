"""What local training minimises, by the name that a method gives."""

from collections.abc import Mapping
from types import MappingProxyType

from federation.learning.losses import (
    calibrated,
    corrected,
    distilled,
    exits,
    prototypes,
    sparse,
    taught,
    terms,
)
from federation.learning.losses.objective import BuildObjective, Likeness

OBJECTIVES: Mapping[str, BuildObjective] = MappingProxyType(
    {
        **terms.OBJECTIVES,
        **calibrated.OBJECTIVES,
        **prototypes.OBJECTIVES,
        **corrected.OBJECTIVES,
        **distilled.OBJECTIVES,
        **exits.OBJECTIVES,
        **taught.OBJECTIVES,
        **sparse.OBJECTIVES,
    }
)
"""Builds an objective from what there is to look at before the first step."""

LIKENESSES: Mapping[str, Likeness] = MappingProxyType(
    {**prototypes.LIKENESSES, **distilled.LIKENESSES}
)
"""What devices must have in common to sit side by side in an objective; of others, nothing."""
