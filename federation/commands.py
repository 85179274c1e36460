"""Verbs that a command gets from floors above it: found by name when they are asked for.

A package says in its metadata (an entry point) that it offers a verb; so `headwater-hub` can have
one that simulates, and yet nothing of the hub imports the simulation.
"""

from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import entry_points
from typing import Any, TypeAlias

Verb: TypeAlias = Callable[..., Any]

HUB = "headwater.hub.commands"
"""Further verbs of `headwater-hub`."""

MOE = "headwater.moe.commands"
"""Further verbs of `headwater-moe`."""


def further(group: str, arguments: Sequence[str]) -> Iterator[tuple[str, Verb]]:
    """The verbs of this group, by name: the one asked for, or all where help is asked for.

    Args:
        group: of entry points.
        arguments: of the command line, without the command's own name. A verb that is not asked
            for is not loaded, since that may take a second.
    """
    asked = next((word for word in arguments if not word.startswith("-")), "")
    for point in sorted(entry_points(group=group), key=lambda point: point.name):
        if asked in ("", point.name):
            yield point.name, point.load()
