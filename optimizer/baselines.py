"""Selectors that need no model of the devices."""

import numpy as np

from optimizer.selection import Candidates, Selection


def select_uniformly(
    candidates: Candidates, count: int, _round: int, rng: np.random.Generator
) -> Selection:
    """Draw `count` candidates without replacement, each with the same chance.

    The draw depends on the set of candidates and the generator, and costs O(count).
    """
    names = candidates.names
    if len(names) <= count:
        return Selection(tuple(names))
    drawn = rng.choice(len(names), size=count, replace=False)
    return Selection(
        chosen=tuple(names[place] for place in np.sort(drawn).tolist()),
        otherwise=f"not drawn: the round asks {count} of the {len(names)} that are there",
    )
