"""A method as a value: what a device minimises, what it trains and sends, how the hub averages."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from federation.errors import ConfigError
from federation.learning.aggregation.ballot import Aggregate
from federation.learning.aggregation.mean import weighted_mean
from federation.protocol.codec import Weights

Numbers: TypeAlias = Mapping[str, float]


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """What a plan rule may look at: the round, who was asked, and the model they begin from.

    `devices` are all that were asked, in order. `levels` says how much of a model each can
    train (0: all of it, or it did not say). `model` and `sizes` are the run's. `weights` are the
    newest model's tensors, `memory` what the method keeps at the hub.
    """

    seed: int
    round: int
    model: str
    sizes: Mapping[str, int]
    devices: tuple[str, ...]
    levels: Mapping[str, int]
    weights: Weights
    memory: Weights
    params: Numbers


@dataclass(frozen=True, slots=True)
class Part:
    """A device's part: the layers that travel back (None: all), and sizes of its own model."""

    layers: tuple[str, ...] | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)


PlanRule: TypeAlias = Callable[[Asked], dict[str, Part]]
"""The part of each device asked. A function of its argument alone: a restarted hub asks again."""


def whole_model(asked: Asked) -> dict[str, Part]:
    """Everybody trains and sends all of the model."""
    return dict.fromkeys(asked.devices, Part())


def no_state(_weights: Weights, _params: Numbers) -> Weights:
    """Nothing travels beside the model."""
    return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A federated method.

    `paper` and `equation` say where it is from, `departs` where ours differs (empty: nowhere).
    `loss` names an entry of `federation.learning.losses.OBJECTIVES`; `params` are the method's
    numbers with their defaults. `parts` is its plan rule, `aggregate` how the hub makes one model
    of the updates. `state` gives, for the first weights, the tensors that travel beside the
    model, to devices and back; their names have a slash.
    `tolerates_stale` says whether an update trained from an older base may still count,
    `needs_delta` whether updates must travel as differences to their base, `narrower` whether
    devices may train models of which each tensor is a leading slice of the base's,
    `stands_in` whether a device's digital agent may train in its place: what the device sends then
    follows from base, plan and data, and from nothing it remembers. Where `is_personal` each
    device has a model of its own, and none are averaged: `aggregate` is then asked for nothing.
    With `keeps_zeros` an entry of a matrix that is zero in the base stays so, and never travels.
    """

    name: str
    title: str
    paper: str
    equation: str
    when_to_use: str
    departs: str = ""
    loss: str = "cross_entropy"
    params: Numbers = field(default_factory=dict)
    parts: PlanRule = whole_model
    aggregate: Aggregate = weighted_mean
    state: Callable[[Weights, Numbers], Weights] = no_state
    tolerates_stale: bool = False
    needs_delta: bool = False
    narrower: bool = False
    stands_in: bool = False
    is_personal: bool = False
    keeps_zeros: bool = False

    def settings(self, given: Numbers) -> dict[str, float]:
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
