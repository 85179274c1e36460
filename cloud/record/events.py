"""The log's rows: one a fact, without its bytes, every text of it bounded.

Text that came from devices is cut and its control characters are replaced: a database may
refuse what a letter may carry.
"""

import dataclasses
import re
from collections.abc import Iterator
from functools import cache
from typing import Any, get_args

import msgspec

from cloud.coordination import facts as f
from federation.protocol.messages import Capability

MAX_REASON = 500
"""Reasons are cut to so many characters."""

MAX_ID = 200
"""Names that came from devices are cut to so many characters."""

MAX_MODELS = 32
"""So many of the models a device names are recorded."""

_FIELDS = {
    kind.__name__: tuple(field.name for field in dataclasses.fields(kind))
    for kind in get_args(f.HubFact)
}

_UNWRITABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


def bounded(text: str, length: int = MAX_REASON) -> str:
    """The text as it may be recorded: cut, and without control characters."""
    cut = text if len(text) <= length else text[: length - 1] + "…"
    if cut.isprintable():
        return cut  # As nearly all are, and it is cheaper to see.
    return _UNWRITABLE.sub("\N{REPLACEMENT CHARACTER}", cut)


def bounded_capability(said: Capability) -> Capability:
    """What a device said of itself, as it may be recorded."""
    models = tuple(bounded(model, MAX_ID) for model in said.models[:MAX_MODELS])
    return msgspec.structs.replace(said, agent=bounded(said.agent, MAX_ID), models=models)


def event_of(fact: f.HubFact) -> dict[str, Any]:
    """The row that tells of this fact, without its bytes."""
    said = dict(_fields(fact))
    row = {
        "at": said.pop("at", 0.0),
        "kind": _kebab(type(fact).__name__),
        "run": said.pop("run", ""),
        "round": said.pop("round", 0),
        "device": bounded(said.pop("device", said.pop("sender", "")), MAX_ID),
    }
    if isinstance(fact, f.Released):
        row |= {"run": fact.release.run, "round": fact.release.round}
    if isinstance(fact, f.DeviceBorn):
        said["capability"] = bounded_capability(fact.capability)
    if isinstance(fact, f.RoundOpened):
        said["attempts"] = [entry.device for entry in fact.attempts]
        said["excluded"] = len(fact.excluded) + sum(said.pop("unnamed").values())
    return row | {"detail": _tamed(msgspec.to_builtins(said))}


def _fields(fact: f.HubFact) -> Iterator[tuple[str, Any]]:
    for name in _FIELDS[type(fact).__name__]:
        value = getattr(fact, name)
        if not isinstance(value, bytes):
            yield name, value


@cache
def _kebab(name: str) -> str:
    return re.sub(r"(?<=.)([A-Z])", r"-\1", name).lower()


def _tamed(value: Any) -> Any:
    """The same with every text in it bounded."""
    match value:
        case str():
            return bounded(value)
        case dict():
            return {bounded(str(key), MAX_ID): _tamed(entry) for key, entry in value.items()}
        case list() | tuple():
            return [_tamed(entry) for entry in value]
        case _:
            return value
