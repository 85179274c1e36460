"""What an operator writes: `hub.toml` for the hub, `run.toml` for one run of training."""

import math
from pathlib import Path
from typing import Literal

import msgspec

from cloud.coordination.rounds import RoundPolicy
from federation.errors import ConfigError, ProtocolError
from federation.learning.methods import method_named
from federation.learning.plans import TrainingPlan
from federation.learning.uplink import check_uplink
from federation.protocol.link import parse_url
from federation.protocol.messages import ModelSpec, Params, Uplink
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

    def __post_init__(self) -> None:
        if self.url:
            parse_url(self.url)
        if not 0 <= self.port <= 65535:
            raise ConfigError(
                f"broker.port is {self.port}; it lies between 0 and 65535: correct it"
            )
        if not 5 <= self.keepalive_s <= 3600:
            raise ConfigError(
                f"broker.keepalive_s is {self.keepalive_s}; it lies between 5 and 3600: correct it"
            )


class HttpConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The HTTP API of the hub: twins, health, metrics.

    With the environment variable HEADWATER_TOKEN set, whoever asks must bear that token; beyond
    this machine one is required.
    """

    host: str = "127.0.0.1"
    port: int = 8080

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"http.port is {self.port}; it lies between 0 and 65535: correct it")

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        return self.host in ("127.0.0.1", "::1", "localhost")


class TwinsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The twins of the fleet; with `follow` false nothing is learned of its devices."""

    follow: bool = True


class HubConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The hub: where it keeps its record, and how it is reached.

    `folder` holds the model files and the broker's files, and the database too unless
    `database` names another by a SQLAlchemy URL (`postgresql+psycopg://...`).
    """

    namespace: str = "fleet"
    folder: Path = Path("hub")
    database: str = ""
    broker: BrokerConfig = BrokerConfig()
    http: HttpConfig | None = None
    twins: TwinsConfig = TwinsConfig()

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


class UplinkPlan(Uplink, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What updates look like on their way, as a letter says it, but with unknown keys refused."""

    def __post_init__(self) -> None:
        check_uplink(self)

    def as_letter(self) -> Uplink:
        """The same, as a letter carries it."""
        return Uplink(**msgspec.structs.asdict(self))


class ReleasePlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which models are exported for inference: every `every`-th round's (0: none) and the last."""

    every: int = 10
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ConfigError(
                f"release.every is {self.every}; it is 0 (no releases) or more: correct it"
            )


class PlanningChoice(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How rounds are planned where `selection` is "plan".

    The devices share `uplink_bytes_per_s` on their way to the hub. A plan is good enough within
    `tolerance` of the proven bound, and is the best known after `time_limit_s`. The others weigh
    the round's time, the devices' energy and what their updates are worth.
    """

    uplink_bytes_per_s: float = 1e6
    tolerance: float = 1e-3
    time_limit_s: float = 0.5
    makespan: float = 1.0
    energy: float = 1.0
    accuracy: float = 1.0

    def __post_init__(self) -> None:
        for name in ("uplink_bytes_per_s", "time_limit_s"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ConfigError(
                    f"planning.{name} is {getattr(self, name)}; expected more than 0: correct it"
                )
        for name in ("tolerance", "makespan", "energy", "accuracy"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ConfigError(
                    f"planning.{name} is {getattr(self, name)}; expected 0 or more: correct it"
                )


class RunPlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One run of training, as `run.toml` says it.

    `evaluation` is a folder of `.npz` or `.csv` files the hub measures each new model on. `start`
    names a run or training in the hub's registry, whose newest model this run begins with.
    `seed` decides the initial weights, who is chosen, and the order of batches. `selection` says
    how: each with the same chance, by what their twins forecast, or by a plan that also says how
    fast each may send.

    With `stand_in` a device that drops out of a round is stood in for by its digital agent, where
    its owner and the method allow it.

    With `mirror` devices whose owners allow it are asked for their data, and nothing is trained. Of
    a method whose models are personal, `students` gives devices another model than `model`, and
    `teaching` is the digest of what a teacher prepared for them (`headwater-hub teach`). Devices
    named in `at_twin` do not train: they fetch what their twins learned, and echo it.
    """

    name: str
    rounds: int
    model: ModelChoice
    policy: RoundPolicy
    method: MethodChoice = MethodChoice()
    training: TrainingPlan = TrainingPlan()
    uplink: UplinkPlan = UplinkPlan()
    release: ReleasePlan = ReleasePlan()
    selection: Literal["uniform", "forecast", "plan"] = "uniform"
    planning: PlanningChoice = PlanningChoice()
    evaluation: Path | None = None
    seed: int = 0
    start: str = ""
    mirror: bool = False
    stand_in: bool = False
    students: dict[str, ModelChoice] = {}
    teaching: str = ""
    at_twin: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check(self.name, "name")
        if self.start:
            _check(self.start, "start")
        method = method_named(self.method.name)
        if (self.students or self.teaching or self.at_twin) and not method.is_personal:
            raise ConfigError(
                f"students are taught, and {method.name} makes one model for all: "
                "choose simkd or logit_kd, or leave them out"
            )
        method.settings(self.method.params)
        if method.needs_delta and not self.uplink.delta:
            raise ConfigError(
                f"{method.name} adds differences to the newest model, and uplink.delta is false: "
                "say delta = true in [uplink]"
            )
        if self.rounds < 1:
            raise ConfigError(f"rounds is {self.rounds}; a run has at least one: correct it")
        if self.policy.late == "keep" and not method.tolerates_stale:
            raise ConfigError(
                f'policy.late is "keep" and {self.method.name} tolerates no update of an older '
                'model: say late = "drop", or choose a method that does, such as fedprox'
            )


def _check(name: str, field: str) -> None:
    try:
        check_name(field, name)
    except ProtocolError as error:
        raise ConfigError(str(error)) from error
