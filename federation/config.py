"""TOML files into checked records, with errors that name the file, the key and what it may be."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import msgspec

from federation.errors import ConfigError

Config = TypeVar("Config", bound=msgspec.Struct)

_PLACE = r"(?: - at `\$\.?(?P<place>[^`]*)`)?$"
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<key>.*?)`" + _PLACE)
_MISSING = re.compile(r"Object missing required field `(?P<key>.*?)`" + _PLACE)
_TYPE = re.compile(r"Expected `(?P<wanted>.*?)`, got `(?P<found>.*?)`" + _PLACE)
_CHOICE = re.compile(r"Invalid enum value (?P<found>.*?)" + _PLACE)

_KINDS = {
    "str": "text in quotes",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "object": "a table",
    "array": "a list",
    "dict": "a table",
    "list": "a list",
}


def read_config(path: Path, kind: type[Config]) -> Config:
    """A TOML file as a record of this kind; paths in it are as written, not resolved.

    Raises:
        ConfigError: the file is absent or unreadable, a key is unknown or missing, a value has
            the wrong type or range. The message names the file, and the key's path in it.
    """
    try:
        return msgspec.toml.decode(path.read_bytes(), type=kind, dec_hook=_to_path)
    except FileNotFoundError as error:
        raise ConfigError(
            f"there is no file {path}; a TOML file was expected: create it or correct the path"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"cannot read {path} ({error.strerror}); a TOML file was expected: "
            "name one that you may read"
        ) from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {_in_words(str(error), kind)}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} is not TOML ({error}); expected lines such as key = 1 or key = 'text': "
            "correct that place"
        ) from error


def _in_words(said: str, kind: type[msgspec.Struct]) -> str:
    """What the decoder says, as fact, expectation and remedy."""
    if match := _UNKNOWN.match(said):
        table, known = match["place"] or "", _keys(kind, match["place"] or "")
        place = f"[{table}]" if table else "the file"
        return (
            f"unknown key {match['key']!r}; {place} may have {', '.join(known) or 'no keys'}: "
            f"{_closest(match['key'], known)}"
        )
    if match := _MISSING.match(said):
        return f"key {_full(match['place'], match['key'])} is missing; it has no default: add it"
    if match := _TYPE.match(said):
        wanted = " or ".join(
            map(_kind_in_words, match["wanted"].removesuffix(" | null").split(" | "))
        )
        found = _kind_in_words(match["found"])
        return f"{match['place']} is {found}; expected {wanted}: correct the value"
    if match := _CHOICE.match(said):
        choices = ", ".join(_choices(kind, match["place"] or ""))
        return f"{match['place']} is {match['found']}; expected one of {choices}: choose one"
    return f"{said}; correct the file and try again"


def _kind_in_words(name: str) -> str:
    return _KINDS.get(name, name)


def _full(place: str | None, key: str) -> str:
    return f"{place}.{key}" if place else key


def _closest(key: str, known: list[str]) -> str:
    import difflib

    close = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {close[0]}?" if close else "correct or remove it"


def _keys(kind: type[msgspec.Struct], place: str) -> list[str]:
    """The keys of the table at this place."""
    for record in _records(_type_at(kind, place)):
        return [field.encode_name for field in msgspec.structs.fields(record)]
    return []


def _choices(kind: type[msgspec.Struct], place: str) -> list[str]:
    found = _type_at(kind, place)
    kinds = [found, *get_args(found)]
    return [str(name) for each in kinds if get_origin(each) is Literal for name in get_args(each)]


def _type_at(kind: Any, place: str) -> Any:
    for name in filter(None, place.split(".")):
        for record in _records(kind):
            fields = {field.encode_name: field.type for field in msgspec.structs.fields(record)}
            kind = fields.get(name.partition("[")[0])
            break
    return kind


def _records(kind: Any) -> Iterator[type[msgspec.Struct]]:
    """The record this type is, or may be, or holds many of."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        yield kind
    for part in get_args(kind):
        yield from _records(part)


def _to_path(kind: type, value: Any) -> Any:
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is Path:
        # In the decoder's own words, to which it adds the place.
        raise TypeError(f"Expected `str`, got `{type(value).__name__}`")
    raise NotImplementedError(f"cannot read a {kind.__name__}")
