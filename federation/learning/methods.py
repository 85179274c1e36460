"""Methods by name: what a device minimises, how the hub aggregates, and the paper it is from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from federation.errors import ConfigError
from federation.learning.aggregation import Aggregator, WeightedMean


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A federated method.

    `loss` names an entry of `federation.learning.losses.OBJECTIVES`; `params` are its
    numbers with their defaults; `aggregator` makes a fresh one for each round;
    `tolerates_stale` says whether an update trained from an older base may still count.
    """

    name: str
    title: str
    paper: str
    when_to_use: str
    loss: str
    aggregator: Callable[[], Aggregator]
    params: Mapping[str, float] = field(default_factory=dict)
    tolerates_stale: bool = False

    def settings(self, given: Mapping[str, float]) -> dict[str, float]:
        """All numbers of the method: those given, and the defaults of the others.

        Raises:
            ConfigError: a number the method does not know; it lists those it does.
        """
        if unknown := sorted(given.keys() - self.params.keys()):
            raise ConfigError(
                f"method {self.name!r} has no parameter {unknown[0]!r}; "
                f"it has {', '.join(self.params) or 'none'}: correct the plan"
            )
        return {**self.params, **given}


_ALL = (
    Method(
        name="fedavg",
        title="Federated averaging",
        paper="arXiv:1602.05629",
        when_to_use="first: the baseline, and hard to beat while devices resemble each other",
        loss="cross_entropy",
        aggregator=WeightedMean,
    ),
    Method(
        name="fedprox",
        title="Federated averaging with a proximal term",
        paper="arXiv:1812.06127",
        when_to_use="devices differ, or train for many epochs or unequal numbers of steps",
        loss="proximal",
        aggregator=WeightedMean,
        params={"mu": 0.01},
        tolerates_stale=True,
    ),
)

METHODS: Mapping[str, Method] = MappingProxyType({method.name: method for method in _ALL})
"""Every method by its name, as plans spell it."""


def method_named(name: str) -> Method:
    """The method of this name.

    Raises:
        ConfigError: no such method; it lists those there are.
    """
    if name not in METHODS:
        raise ConfigError(
            f"no method is called {name!r}; there are {', '.join(METHODS)}: correct the plan"
        )
    return METHODS[name]
