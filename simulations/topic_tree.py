"""Topics as trees of levels: who reads a topic, and which retained letters a filter matches."""

from collections.abc import Iterable, Iterator
from typing import Generic, TypeAlias, TypeVar

from federation.protocol.topics import Route
from simulations.sealed import Sealed

Payload: TypeAlias = bytes | Sealed

Reader = TypeVar("Reader")


class Filters(Generic[Reader]):
    """Who reads what; in a filter `+` is any one level, and `#` all that is below."""

    __slots__ = ("below", "readers")

    def __init__(self) -> None:
        self.below: dict[str, Filters[Reader]] = {}
        self.readers: dict[Reader, None] = {}

    def add(self, name: str, reader: Reader) -> None:
        """Let this reader have what matches a filter; again changes nothing."""
        node = self
        for level in name.split("/"):
            node = node.below.setdefault(level, Filters())
        node.readers[reader] = None

    def remove(self, name: str, reader: Reader) -> None:
        """Let this reader have no more of what matches a filter; empty branches go."""
        way, node = list[tuple[Filters[Reader], str]](), self
        for level in name.split("/"):
            if level not in node.below:
                return
            way.append((node, level))
            node = node.below[level]
        node.readers.pop(reader, None)
        for above, level in reversed(way):
            below = above.below[level]
            if below.readers or below.below:
                return
            del above.below[level]

    def matching(self, topic: str) -> list[Reader]:
        """The readers of a topic; one with several matching filters comes several times."""
        nodes, found = [self], list[Reader]()
        for level in topic.split("/"):
            found += [reader for node in nodes for reader in node.all_below()]
            nodes = [
                child
                for node in nodes
                for child in (node.below.get(level), node.below.get("+"))
                if child is not None
            ]
        for node in nodes:
            found += [*node.readers, *node.all_below()]
        return found

    def all_below(self) -> Iterable[Reader]:
        """Who reads this level and everything below it."""
        rest = self.below.get("#")
        return rest.readers if rest is not None else ()


class Retained:
    """The last retained letter of each topic."""

    __slots__ = ("below", "letter")

    def __init__(self) -> None:
        self.below: dict[str, Retained] = {}
        self.letter: tuple[Route, Payload] | None = None

    def put(self, route: Route, payload: Payload) -> None:
        """Keep this letter in place of the one before; an empty one only clears it."""
        node = self
        for level in route.topic.split("/"):
            node = node.below.setdefault(level, Retained())
        node.letter = (route, payload) if payload else None

    def matching(self, name: str) -> Iterator[tuple[Route, Payload]]:
        """The retained letters whose topics match a filter."""
        return _letters(self, name.split("/"), 0)


def _letters(node: Retained, levels: list[str], depth: int) -> Iterator[tuple[Route, Payload]]:
    is_all = depth < len(levels) and levels[depth] == "#"
    if node.letter is not None and (is_all or depth == len(levels)):
        yield node.letter
    if depth == len(levels):
        return
    below = node.below
    chosen = below.values() if is_all or levels[depth] == "+" else [below.get(levels[depth])]
    for child in chosen:
        if child is not None:
            yield from _letters(child, levels, depth if is_all else depth + 1)
