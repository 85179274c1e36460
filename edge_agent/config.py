"""What a device's owner writes: `agent.toml`."""

import importlib.util
import os
from pathlib import Path

import msgspec

from edge_agent.cascade_config import CascadeConfig
from edge_agent.peering_config import PeersConfig
from federation.config import read_config
from federation.errors import ConfigError, ProtocolError
from federation.protocol.link import parse_url
from federation.protocol.topics import check_name

MAX_SECONDS = 7 * 24 * 3600.0
"""No time in a configuration is longer."""


def _check_seconds(name: str, value: float) -> None:
    if not 0.0 < value <= MAX_SECONDS:
        raise ConfigError(
            f"{name} is {value}; it is above 0 and at most {MAX_SECONDS:g}: correct it"
        )


class DataConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the device's data is: a folder of `.npz` or `.csv` files, or a Python entry point.

    An `entry` is `module:function`; the function takes nothing and returns a `LocalData`.
    """

    folder: Path | None = None
    entry: str = ""

    def __post_init__(self) -> None:
        if (self.folder is None) == (not self.entry):
            given = "both folder and entry" if self.entry else "neither folder nor entry"
            raise ConfigError(f"[data] has {given}; it takes one of the two: correct it")


class TrainingConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How training runs: in a process of its own, ended after `idle_s` seconds without work.

    A training that shows no progress for `stall_s` seconds is ended and reported as failed.
    `checkpoint_s` is how often a running training is saved. `level` is how much of a model with
    levels this device can train, from 1 (0: all of it).
    """

    threads: int = 1
    idle_s: float = 120.0
    stall_s: float = 600.0
    checkpoint_s: float = 10.0
    level: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.threads <= 1024:
            raise ConfigError(
                f"training.threads is {self.threads}; it lies between 1 and 1024: correct it"
            )
        if not 0 <= self.level <= 64:
            raise ConfigError(
                f"training.level is {self.level}; it lies between 1 and 64, or is 0 for all of a "
                "model: correct it"
            )
        for name in ("idle_s", "stall_s", "checkpoint_s"):
            _check_seconds(f"training.{name}", getattr(self, name))


class EnergyConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the device draws above idle, where its owner knows it: the hub forecasts with it.

    `training_w` is the power of training in watts, the others joules for 10^6 bytes.
    """

    training_w: float
    up_j_per_mb: float = 0.0
    down_j_per_mb: float = 0.0

    def __post_init__(self) -> None:
        for name, value in msgspec.structs.asdict(self).items():
            if not 0.0 <= value < float("inf"):
                raise ConfigError(f"energy.{name} is {value}; it is 0 or more: correct it")


class TwinConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the device's twin at the hub may do.

    With `mirror` the hub may keep a copy of this device's data, teach from it, and have the twin
    train in the device's place. Without it, as it is by default, no sample leaves the device; set
    back to false, the hub deletes what it has when the agent is started again.
    """

    mirror: bool = False


class AgentConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One device: who it is, where its broker and its data are, and where it keeps its journal.

    A device without `[data]` does not train; with `infers` it fetches released models. The
    password comes from the environment variable HEADWATER_PASSWORD. With `[peers]` it learns with
    its neighbours, always or while the hub is away. With `[cascade]` it asks the hub's big model
    where its own is in doubt.
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
    peers: PeersConfig | None = None
    energy: EnergyConfig | None = None
    twin: TwinConfig = TwinConfig()
    cascade: CascadeConfig | None = None

    def __post_init__(self) -> None:
        for field, name in (("device", self.device), ("namespace", self.namespace)):
            try:
                check_name(field, name)
            except ProtocolError as error:
                raise ConfigError(str(error)) from error
        parse_url(self.broker)
        if self.data is None and not self.infers:
            raise ConfigError(
                "the agent neither trains nor infers; it must do one of them: "
                "give [data], or infers = true"
            )
        if not 5 <= self.keepalive_s <= 3600:
            raise ConfigError(
                f"keepalive_s is {self.keepalive_s}; it lies between 5 and 3600: correct it"
            )
        _check_seconds("heartbeat_s", self.heartbeat_s)
        if self.peers is not None:
            self.peers.as_peering(self.device)
            if self.data is None:
                raise ConfigError("[peers] is given and [data] is not: a peer trains, give both")


def password() -> str:
    """The broker's password, from the environment only."""
    return os.environ.get("HEADWATER_PASSWORD", "")


def read_agent_config(path: Path) -> AgentConfig:
    """The configuration in a TOML file; relative paths in it are relative to the file.

    Raises:
        ConfigError: absent, unreadable, an unknown key, a wrong type, or data that is not there.
    """
    config = read_config(path, AgentConfig)
    try:
        return _with_paths_from(config, path.parent)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _with_paths_from(config: AgentConfig, base: Path) -> AgentConfig:
    data = config.data
    if data is not None and data.folder is not None:
        data = DataConfig(folder=(base / data.folder).resolve())
    if data is not None:
        _check_data(data)
    cascade = config.cascade
    if cascade is not None and cascade.calibration is not None:
        calibration = (base / cascade.calibration).resolve()
        cascade = msgspec.structs.replace(cascade, calibration=calibration)
    folder = (base / config.folder).resolve()
    return msgspec.structs.replace(config, folder=folder, data=data, cascade=cascade)


def _check_data(data: DataConfig) -> None:
    """What can be said of the data without reading it, so that mistakes show at the start."""
    if data.folder is not None:
        if not data.folder.is_dir():
            raise ConfigError(
                f"data.folder {data.folder} is not a folder; one with .npz or .csv files was "
                "expected: create it or correct the path"
            )
        if not any(file.suffix in (".npz", ".csv") for file in data.folder.iterdir()):
            raise ConfigError(
                f"data.folder {data.folder} has no .npz or .csv file; training needs at least "
                "one: put the data there"
            )
        return
    module, colon, function = data.entry.partition(":")
    if not (colon and function.isidentifier()):
        raise ConfigError(f"data.entry is {data.entry!r}; expected module:function: correct it")
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        found = None
    if found is None:
        raise ConfigError(
            f"data.entry names module {module!r}, which cannot be found: "
            "install it, or put its folder on PYTHONPATH"
        )
