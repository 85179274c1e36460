"""TOML files into checked records, with errors that name the file and the key."""

from pathlib import Path
from typing import Any, TypeVar

import msgspec

from federation.errors import ConfigError

Config = TypeVar("Config", bound=msgspec.Struct)


def read_config(path: Path, kind: type[Config]) -> Config:
    """A TOML file as a record of this kind; paths in it are as written, not resolved.

    Raises:
        ConfigError: the file is absent or unreadable, a key is unknown, a value has the wrong
            type or range. The message names the file, and the key's path in it.
    """
    try:
        return msgspec.toml.decode(path.read_bytes(), type=kind, dec_hook=_to_path)
    except FileNotFoundError as error:
        raise ConfigError(f"there is no file {path}; a TOML file was expected") from error
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; see its permissions") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}; correct the file and try again") from error


def _to_path(kind: type, value: Any) -> Any:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise NotImplementedError(f"cannot read a {kind.__name__}")
