"""The question every selector answers: which of the devices that are there shall train?"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from federation.protocol.messages import Capability


@dataclass(frozen=True, slots=True)
class Candidates:
    """The devices that could train now.

    `names` are in order, and may be a million: take what you need by its place. `capability`
    gives what one of them said of itself.
    """

    names: Sequence[str]
    capability: Callable[[str], Capability]


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """The plan behind a selection: how good it is proven to be, and what follows for devices.

    `paces` bounds what a device sends, in bytes a second; whoever is not named sends as it can.
    No plan has an objective below `bound`; `prices` says what one more unit is worth.
    """

    paces: Mapping[str, float] = field(default_factory=dict)
    objective: float | None = None
    bound: float | None = None
    gap: float | None = None
    makespan_s: float | None = None
    prices: Mapping[str, float] = field(default_factory=dict)
    why_stopped: str = ""


@dataclass(frozen=True, slots=True)
class Selection:
    """Who is asked, and why the other candidates are not.

    `excluded` gives some candidates a reason of their own; `otherwise` is that of all others.
    `planned` is there where a plan was made, or should have been.
    """

    chosen: tuple[str, ...]
    excluded: dict[str, str] = field(default_factory=dict)
    otherwise: str = "not chosen"
    planned: Planned | None = None

    def reasons(self, candidates: int) -> dict[str, int]:
        """How many of so many candidates are not asked, by reason."""
        others = candidates - len(self.chosen) - len(self.excluded)
        return dict(Counter(self.excluded.values()) + Counter({self.otherwise: others}))


Selector: TypeAlias = Callable[[Candidates, int, int, np.random.Generator], Selection]
"""(candidates, count, round, rng): chooses at most `count` of the candidates for this round.

The generator is the round's own.
"""
