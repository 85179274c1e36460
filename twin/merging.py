"""JSON documents that change by merge patches (RFC 7396), and what differs between two of them.

A document is an object. It holds no null: in a patch null means "remove", so a document could
never be told from one that lacks the key. Arrays are values: they are replaced whole.
"""

import math
from collections.abc import Iterator
from typing import Any, TypeAlias

import msgspec

from federation.errors import TwinError

JsonObject: TypeAlias = dict[str, Any]
"""An object of JSON: texts as keys; null, booleans, numbers, texts, lists and objects as values."""

MAX_BYTES = 16 * 1024
"""A document is at most so large, as JSON."""

MAX_DEPTH = 8
"""Objects and arrays lie at most so deep in each other."""

MAX_KEY = 64
"""A key has at most so many characters."""

LARGEST = 2**53
"""Whole numbers beyond this are not the same in every reader of JSON."""


def merge_patch(document: JsonObject, patch: JsonObject) -> JsonObject:
    """Gives the document after the patch; neither is changed."""
    merged = dict(document)
    for key, change in patch.items():
        if change is None:
            merged.pop(key, None)
        elif isinstance(change, dict):
            before = merged.get(key)
            merged[key] = merge_patch(before if isinstance(before, dict) else {}, change)
        else:
            merged[key] = change
    return merged


def difference(before: JsonObject, after: JsonObject) -> JsonObject:
    """Gives the smallest patch that makes one document of the other; empty where they agree."""
    patch: JsonObject = dict.fromkeys(before.keys() - after.keys())
    for key, new in after.items():
        old = before.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            # An object that is emptied keeps its place: its keys go one by one.
            if inner := difference(old, new):
                patch[key] = inner
        elif key not in before or not is_same(old, new):
            patch[key] = new
    return patch


def delta(desired: JsonObject, reported: JsonObject) -> JsonObject:
    """Gives what is desired and not reported so; what is reported beyond that is left alone."""
    wanting: JsonObject = {}
    for key, wish in desired.items():
        have = reported.get(key)
        if isinstance(wish, dict) and isinstance(have, dict):
            if inner := delta(wish, have):
                wanting[key] = inner
        elif key not in reported or not is_same(wish, have):
            wanting[key] = wish
    return wanting


def is_same(one: Any, other: Any) -> bool:
    """Whether two values are the same in JSON, where true is not 1 but 1.0 is."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(is_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(is_same, one, other))
    return bool(one == other)


def leaves(document: JsonObject, above: str = "") -> Iterator[tuple[str, Any]]:
    """Gives each leaf with its JSON pointer (RFC 6901): what is no object, or an empty one."""
    for key, value in document.items():
        pointer = f"{above}/{key.replace('~', '~0').replace('/', '~1')}"
        if isinstance(value, dict) and value:
            yield from leaves(value, pointer)
        else:
            yield pointer, value


def check_patch(patch: Any) -> JsonObject:
    """The patch itself, if it may be merged into a document.

    Raises:
        TwinError: no object, too deep, keys too long, numbers that JSON has not, or a null
            inside an array, where it would stay.
    """
    if not isinstance(patch, dict):
        raise TwinError(f"the patch is {_kind(patch)}; an object was expected: send one")
    _check_inside(patch, "", 1)
    return patch


def check_document(document: JsonObject) -> JsonObject:
    """The document itself, if it may be kept.

    Raises:
        TwinError: it is too large.
    """
    size = len(msgspec.json.encode(document))
    if size > MAX_BYTES:
        raise TwinError(
            f"the document would have {size} bytes; at most {MAX_BYTES} are kept: remove some keys"
        )
    return document


def _check_inside(value: Any, place: str, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise TwinError(
            f"{place} lies {depth} deep; at most {MAX_DEPTH} are allowed: make the patch flatter"
        )
    match value:
        case dict():
            for key, inner in value.items():
                _check_key(key, place)
                _check_inside(inner, f"{place}/{key}", depth + 1)
        case list():
            for index, inner in enumerate(value):
                if inner is None:
                    raise TwinError(
                        f"{place}/{index} is null; an array has none: leave the entry out"
                    )
                _check_inside(inner, f"{place}/{index}", depth + 1)
        case _:
            _check_value(value, place)


def _check_value(value: Any, place: str) -> None:
    match value:
        case float() if not math.isfinite(value):
            raise TwinError(f"{place} is {value}; a finite number was expected: correct it")
        case int() if not isinstance(value, bool) and abs(value) > LARGEST:
            raise TwinError(f"{place} is beyond 2^53; write it as text instead")
        case str() if "\x00" in value:
            raise TwinError(f"{place} has a NUL character; databases refuse it: remove it")
        case None | bool() | int() | float() | str():
            pass
        case _:
            kind = type(value).__name__
            raise TwinError(f"{place} is {kind}, which JSON has not: write it as text")


def _check_key(key: Any, place: str) -> None:
    if not isinstance(key, str) or not 0 < len(key) <= MAX_KEY or "\x00" in key:
        raise TwinError(
            f"{place or 'the document'} has a key {str(key)[:80]!r}; a key has 1 to {MAX_KEY} "
            "characters and no NUL: rename it"
        )


def _kind(value: Any) -> str:
    names = {list: "an array", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
