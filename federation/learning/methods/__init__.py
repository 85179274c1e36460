"""Every method by its name, as plans spell it."""

from collections.abc import Mapping
from types import MappingProxyType

from federation.errors import ConfigError
from federation.learning.methods import (
    adaptive,
    averaging,
    buffered,
    calibrated,
    corrected,
    distilled,
    layerwise,
    robust,
    sparse,
    taught,
)
from federation.learning.methods.record import Method

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        method.name: method
        for family in (
            averaging,
            layerwise,
            calibrated,
            distilled,
            corrected,
            adaptive,
            robust,
            buffered,
            taught,
            sparse,
        )
        for method in family.METHODS
    }
)
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
