"""What whoever serves models writes: `moe.toml`."""

import os
from pathlib import Path
from typing import Literal

import msgspec

from federation.config import read_config
from federation.errors import ConfigError, ProtocolError, StoreError
from federation.protocol.link import parse_url
from federation.protocol.topics import check_name
from moe_serving.admission import Limits
from moe_serving.repository import check_model_name

MAX_DEADLINE_S = 3600.0


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{name} is {value:g}; it lies between {low:g} and {high:g}: correct it")


class HttpConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where HTTP is spoken.

    `client_header` names the header by which a proxy in front says who the client is; without
    one a client is its address. A body is at most `body_mb` megabytes. Port 0 takes a free one.
    """

    host: str = "127.0.0.1"
    port: int = 8500
    client_header: str = ""
    body_mb: float = 8.0

    def __post_init__(self) -> None:
        _check_range("http.port", self.port, 0, 65535)
        _check_range("http.body_mb", self.body_mb, 0.001, 1024)


class MqttConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The broker over which devices ask; the password is in HEADWATER_PASSWORD.

    Several servers of one fleet share its requests if each has a `worker` name of its own; the
    broker must know shared subscriptions (mosquitto does, NATS does not).
    """

    broker: str
    namespace: str = "fleet"
    user: str = ""
    ca_file: str = ""
    keepalive_s: int = 30
    worker: str = ""

    def __post_init__(self) -> None:
        parse_url(self.broker)
        _check_range("mqtt.keepalive_s", self.keepalive_s, 5, 3600)
        try:
            check_name("namespace", self.namespace)
            check_name("worker", self.worker or "w")
        except ProtocolError as error:
            raise ConfigError(str(error)) from error


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one model is served.

    `version` 0 is the newest, and each newer one takes over when it is published. A language
    model or translation has `slots` answers running, of up to `length` tokens (0: what the model
    can), and steps of up to `rows` rows. A classifier takes `windows` at once and waits `wait_s`
    for them. At most what is done in `target_wait_s` may wait, and `deadline_s` is both the
    default and the longest deadline. `experts_mb` bounds the memory of experts (0: all of them
    stay in memory). `precision` is `exact`, or `8bit` for speed; `device` is where it runs.
    """

    version: int = 0
    slots: int = 32
    rows: int = 256
    length: int = 0
    windows: int = 64
    wait_s: float = 0.002
    target_wait_s: float = 5.0
    deadline_s: float = 30.0
    max_waiting: int = 2048
    experts_mb: float = 0.0
    precision: Literal["exact", "8bit"] = "exact"
    device: Literal["cpu", "cuda"] = "cpu"

    def __post_init__(self) -> None:
        for name, low, high in (
            ("version", 0, 10**9),
            ("slots", 1, 4096),
            ("rows", 1, 65536),
            ("length", 0, 10**6),
            ("windows", 1, 65536),
            ("wait_s", 0.0, 10.0),
            ("target_wait_s", 0.01, MAX_DEADLINE_S),
            ("deadline_s", 0.01, MAX_DEADLINE_S),
            ("max_waiting", 1, 10**6),
            ("experts_mb", 0.0, 10**7),
        ):
            _check_range(name, getattr(self, name), low, high)

    @property
    def limits(self) -> Limits:
        """What admission goes by."""
        return Limits(
            target_wait_s=self.target_wait_s,
            max_waiting=self.max_waiting,
            deadline_s=self.deadline_s,
        )


class MoeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A server of models: from which repository, over what, and each model's own settings.

    Without `[models]` it serves every model of the repository. It looks for newer versions
    every `poll_s` seconds (0: only when told to). Told to stop, it finishes what it has accepted
    for up to `grace_s`. `threads` is for the mathematics (0: as many as there are cores).
    """

    repository: Path
    http: HttpConfig = HttpConfig()
    mqtt: MqttConfig | None = None
    models: dict[str, ModelConfig] = {}
    poll_s: float = 5.0
    grace_s: float = 30.0
    threads: int = 0

    def __post_init__(self) -> None:
        _check_range("poll_s", self.poll_s, 0.0, 86400.0)
        _check_range("grace_s", self.grace_s, 0.0, MAX_DEADLINE_S)
        _check_range("threads", self.threads, 0, 1024)
        for name in self.models:
            try:
                check_model_name(name)
            except StoreError as error:
                raise ConfigError(str(error)) from error

    def of_model(self, name: str) -> ModelConfig:
        """The settings of this model: its own, or the defaults."""
        return self.models.get(name, ModelConfig())


def read_moe_config(path: Path) -> MoeConfig:
    """The configuration in a TOML file; the repository is relative to the file.

    Raises:
        ConfigError: absent, unreadable, an unknown key, a value out of range, or no repository.
    """
    config = read_config(path, MoeConfig)
    repository = (path.parent / config.repository).resolve()
    if not repository.is_dir():
        raise ConfigError(
            f"{path}: repository {repository} is not a folder; one that models were published in "
            "was expected: publish a model, or correct the path"
        )
    return msgspec.structs.replace(config, repository=repository)


def data_token() -> str:
    """What clients must send as a bearer token, from the environment only; empty: nothing."""
    return os.environ.get("HEADWATER_MOE_TOKEN", "")


def admin_token() -> str:
    """What operators must send to load and unload; empty: those routes are shut."""
    return os.environ.get("HEADWATER_MOE_ADMIN_TOKEN", "")
