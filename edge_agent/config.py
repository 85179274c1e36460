"""What a device's owner writes: `agent.toml`."""

import importlib.util
import os
from pathlib import Path

import msgspec

from federation.config import read_config
from federation.errors import ConfigError, ProtocolError
from federation.protocol.topics import check_name


class DataConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the device's data is: a folder of `.npz` or `.csv` files, or a Python entry point.

    An `entry` is `module:function`; the function takes nothing and returns a `LocalData`.
    """

    folder: Path | None = None
    entry: str = ""

    def __post_init__(self) -> None:
        if (self.folder is None) == (not self.entry):
            raise ConfigError("[data] needs either folder or entry, and not both")


class TrainingConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How training runs: in a process of its own, ended after `idle_s` seconds without work.

    A training that shows no progress for `stall_s` seconds is ended and reported as failed.
    `checkpoint_s` is how often a running training is saved.
    """

    threads: int = 1
    idle_s: float = 120.0
    stall_s: float = 600.0
    checkpoint_s: float = 10.0


class AgentConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One device: who it is, where its broker and its data are, and where it keeps its journal.

    A device without `[data]` does not train; with `infers` it fetches released models. The
    password comes from the environment variable HEADWATER_PASSWORD.
    """

    device: str
    broker: str
    folder: Path
    namespace: str = "fleet"
    user: str = ""
    ca_file: str = ""
    keepalive_s: int = 30
    heartbeat_s: float = 30.0
    infers: bool = True
    data: DataConfig | None = None
    training: TrainingConfig = TrainingConfig()

    def __post_init__(self) -> None:
        for field, name in (("device", self.device), ("namespace", self.namespace)):
            try:
                check_name(field, name)
            except ProtocolError as error:
                raise ConfigError(str(error)) from error
        if self.data is None and not self.infers:
            raise ConfigError("the agent neither trains nor infers: give [data], or infers = true")
        if not 5 <= self.keepalive_s <= 3600:
            raise ConfigError(f"keepalive_s is {self.keepalive_s}; it lies between 5 and 3600")


def password() -> str:
    """The broker's password, from the environment only."""
    return os.environ.get("HEADWATER_PASSWORD", "")


def read_agent_config(path: Path) -> AgentConfig:
    """The configuration in a TOML file; relative paths in it are relative to the file.

    Raises:
        ConfigError: absent, unreadable, an unknown key, a wrong type, or data that is not there.
    """
    config = read_config(path, AgentConfig)
    return _with_paths_from(config, path.parent)


def _with_paths_from(config: AgentConfig, base: Path) -> AgentConfig:
    data = config.data
    if data is not None and data.folder is not None:
        data = DataConfig(folder=(base / data.folder).resolve())
    if data is not None:
        _check_data(data)
    return msgspec.structs.replace(config, folder=(base / config.folder).resolve(), data=data)


def _check_data(data: DataConfig) -> None:
    """What can be said of the data without reading it, so that mistakes show at the start."""
    if data.folder is not None:
        if not data.folder.is_dir():
            raise ConfigError(f"data.folder {data.folder} is no folder; name the one with the data")
        if not any(file.suffix in (".npz", ".csv") for file in data.folder.iterdir()):
            raise ConfigError(f"data.folder {data.folder} has no .npz or .csv file to train on")
        return
    module, colon, function = data.entry.partition(":")
    if not (colon and function.isidentifier()):
        raise ConfigError(f"data.entry is {data.entry!r}; write it as module:function")
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        found = None
    if found is None:
        raise ConfigError(f"data.entry names module {module!r}, which is not installed here")
