"""What an operator writes: `hub.toml` for the hub, `run.toml` for one run of training."""

from pathlib import Path
from typing import Literal

import msgspec

from cloud.rounds import RoundPolicy
from federation.errors import ConfigError, ProtocolError
from federation.learning.methods import method_named
from federation.protocol.messages import ModelSpec, Params
from federation.protocol.topics import check_name


class BrokerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which broker carries the letters.

    With `url` the hub uses a broker that is there (`mqtt://host:port`, or `mqtts://`); else it
    starts one of `kind` on loopback at `port` (0: a free one) and keeps its files beside the
    database. The password comes from the environment variable HEADWATER_PASSWORD.
    """

    url: str = ""
    kind: Literal["auto", "mosquitto", "nats"] = "auto"
    port: int = 1883
    user: str = ""
    ca_file: str = ""
    keepalive_s: int = 30


class HubConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The hub: where it keeps its record, and how it is reached.

    `folder` holds the model files and the broker's files, and the database too unless
    `database` names another by a SQLAlchemy URL (`postgresql+psycopg://...`).
    """

    namespace: str = "fleet"
    folder: Path = Path("hub")
    database: str = ""
    broker: BrokerConfig = BrokerConfig()

    def __post_init__(self) -> None:
        _check(self.namespace, "namespace")

    @property
    def database_url(self) -> str:
        """The SQLAlchemy URL of the record."""
        return self.database or f"sqlite:///{(self.folder / 'hub.db').resolve()}"


class ModelChoice(ModelSpec, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model of the zoo, as a letter names it, but with unknown keys refused."""


class MethodChoice(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A method of `federation.learning.methods` by name, with its own numbers."""

    name: str = "fedavg"
    params: Params = {}


class TrainingPlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How each device trains in a round; the fields mean what they mean in `LocalPlan`."""

    epochs: int = 1
    max_steps: int = 0
    batch_size: int = 32
    learning_rate: float = 0.05
    momentum: float = 0.0
    weight_decay: float = 0.0
    encoding: Literal["dense", "int8"] = "dense"


class ReleasePlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which models are exported for inference: every `every`-th round's (0: none) and the last."""

    every: int = 10
    labels: tuple[str, ...] = ()


class RunPlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One run of training, as `run.toml` says it.

    `evaluation` is a folder of `.npz` or `.csv` files the hub measures each new model on.
    `seed` decides the initial weights, who is chosen, and the order of batches.
    """

    name: str
    rounds: int
    model: ModelChoice
    policy: RoundPolicy
    method: MethodChoice = MethodChoice()
    training: TrainingPlan = TrainingPlan()
    release: ReleasePlan = ReleasePlan()
    evaluation: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self.name, "name")
        method_named(self.method.name).settings(self.method.params)
        if self.rounds < 1:
            raise ConfigError(f"rounds is {self.rounds}; a run has at least one")


def _check(name: str, field: str) -> None:
    try:
        check_name(field, name)
    except ProtocolError as error:
        raise ConfigError(str(error)) from error
