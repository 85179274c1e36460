"""A scenario: one run, its fleet, what goes wrong, and variants to compare. Read strictly."""

import math
import re
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import msgspec

from cloud.config import MethodChoice, RunPlan
from federation.config import read_config
from federation.errors import ConfigError
from federation.protocol.messages import Params
from simulations.tables import (
    AttackPlan,
    AvailabilityPlan,
    DevicePlan,
    FailurePlan,
    FleetPlan,
    LinkPlan,
    Range,
    Record,
    require,
    require_range,
)

SHIPPED = Path(__file__).parent / "scenarios"
"""The folder of the scenarios that come with the package."""

LOCAL_ONLY = "local_only"
"""In place of a method: each device trains alone, with no exchange. A control to compare with."""

FOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""What a variant may be called: its files are in a folder of that name."""

Changes: TypeAlias = dict[str, Any]


class Kill(Record, frozen=True, kw_only=True, tag_field="kind", tag="kill"):
    """A device's process is killed, at a time or at a phase of an attempt, and comes back.

    `round` 0 means the first attempt that comes to this phase.
    """

    device: str
    at_s: float | None = None
    phase: (
        Literal[
            "before-download",
            "mid-download",
            "mid-training",
            "before-upload",
            "mid-upload",
            "before-ack",
        ]
        | None
    ) = None
    round: int = 0
    away_s: float = 5.0


class Cut(Record, frozen=True, kw_only=True, tag_field="kind", tag="cut"):
    """Links die for a while: one is a cut, several are a partition; `hub` is the hub's.

    A `silent` cut is one a device notices only at its end.
    """

    devices: tuple[str, ...]
    at_s: float
    for_s: float
    silent: bool = False


class HubKill(Record, frozen=True, kw_only=True, tag_field="kind", tag="hub-kill"):
    """The hub's process is killed, at a time or at a phase of a round, and comes back."""

    at_s: float | None = None
    phase: Literal["round-open", "mid-gathering", "before-ack", "mid-aggregation"] | None = None
    round: int = 0
    away_s: float = 2.0


class BrokerRestart(Record, frozen=True, kw_only=True, tag_field="kind", tag="broker-restart"):
    """The broker dies and comes back, with its sessions and retained letters or without."""

    at_s: float
    away_s: float = 1.0
    forgets: bool = False


class LateJoin(Record, frozen=True, kw_only=True, tag_field="kind", tag="late-join"):
    """A device is there from this time on only."""

    device: str
    at_s: float


class Leave(Record, frozen=True, kw_only=True, tag_field="kind", tag="leave"):
    """A device says goodbye and does not come back."""

    device: str
    at_s: float


Fault: TypeAlias = Kill | Cut | HubKill | BrokerRestart | LateJoin | Leave


def _check_fault(key: str, fault: Fault) -> None:
    for name in ("at_s", "for_s", "away_s", "round"):
        value = getattr(fault, name, None)
        if value is not None:
            require(0.0 <= value < math.inf, f"{key}.{name}", value, "0 or more")
    if isinstance(fault, Kill | HubKill):
        both = fault.at_s is not None and fault.phase is not None
        neither = fault.at_s is None and fault.phase is None
        found = "given together with phase" if both else "missing, and so is phase"
        require(not (both or neither), f"{key}.at_s", found, "either at_s or phase")
    if isinstance(fault, Cut):
        require(len(fault.devices) > 0, f"{key}.devices", "empty", "one device or more")


class Churn(Record, frozen=True, kw_only=True):
    """Failures at random, while the run lasts.

    Mean times between two failures anywhere in the fleet, in seconds (0: none), and how long
    each lasts, drawn from `away_s`.
    """

    kill_every_s: float = 0.0
    cut_every_s: float = 0.0
    hub_kill_every_s: float = 0.0
    broker_restart_every_s: float = 0.0
    away_s: Range = (1.0, 20.0)

    def __post_init__(self) -> None:
        require_range("churn.away_s", self.away_s)
        for name in self.__struct_fields__:
            if name.endswith("_every_s"):
                value = getattr(self, name)
                require(value >= 0.0, f"churn.{name}", value, "0 (never) or more")


class Variant(Record, frozen=True, kw_only=True):
    """The scenario with another method, or with other numbers, under a name of its own.

    `method` is one of the table or `local_only`; without it the scenario's own is meant, whose
    `params` are then changed and not replaced. The tables name what differs from the scenario's
    own tables of these names; `sizes` is the model's.
    """

    name: str
    method: str = ""
    params: Params = msgspec.field(default_factory=dict)
    training: Changes = msgspec.field(default_factory=dict)
    uplink: Changes = msgspec.field(default_factory=dict)
    policy: Changes = msgspec.field(default_factory=dict)
    sizes: dict[str, int] = msgspec.field(default_factory=dict)
    availability: Changes = msgspec.field(default_factory=dict)
    failures: Changes = msgspec.field(default_factory=dict)
    attack: Changes = msgspec.field(default_factory=dict)


class Scenario(Record, frozen=True, kw_only=True):
    """All of a simulation. `seed` decides links, failures and pace; the run has its own.

    The run's `evaluation`, if given, is the folder of the held-out data. `limit_s` ends the
    simulation at that virtual time, whatever the run is about. `variants` are for
    `headwater-sim compare`, and change nothing else.
    """

    run: RunPlan
    fleet: FleetPlan
    link: LinkPlan = LinkPlan()
    device: DevicePlan = DevicePlan()
    availability: AvailabilityPlan = AvailabilityPlan()
    attack: AttackPlan = AttackPlan()
    faults: tuple[Fault, ...] = ()
    failures: FailurePlan = FailurePlan()
    churn: Churn = Churn()
    variants: tuple[Variant, ...] = ()
    seed: int = 0
    limit_s: float = 10 * 365 * 86_400.0

    def __post_init__(self) -> None:
        require(self.limit_s > 0.0, "limit_s", self.limit_s, "above 0")
        if isinstance(chances := self.availability.q, tuple):
            some = max(chances[: self.fleet.devices]) >= 0.001
            require(some, "availability.q", chances, "0.001 or more for some device")
        for place, fault in enumerate(self.faults):
            _check_fault(f"faults[{place}]", fault)
        names = [variant.name for variant in self.variants]
        for place, variant in enumerate(self.variants):
            key = f"variants[{place}].name"
            require(variant.name not in names[:place], key, variant.name, "a new name")
            require(
                FOLDER.fullmatch(variant.name) is not None,
                key,
                repr(variant.name),
                "1 to 64 letters, digits, dots, hyphens and _, beginning with a letter or digit",
            )
            vary(self, variant)

    @property
    def shares_memory(self) -> bool:
        """Whether contents stay where they are: not in chunks, and not on the hub's disk."""
        return not self.link.chunks and not self.kills_the_hub

    @property
    def kills_the_hub(self) -> bool:
        """Whether the hub may die, so that it needs a record that outlives it."""
        return self.churn.hub_kill_every_s > 0 or any(isinstance(f, HubKill) for f in self.faults)


def vary(scenario: Scenario, variant: Variant) -> Scenario:
    """The scenario as this variant has it, and without variants.

    `local_only` becomes FedAvg, whose training its devices do.

    Raises:
        ConfigError: a key that a table lacks, or a value of the wrong type or range.
    """
    run = scenario.run
    model = msgspec.structs.replace(run.model, sizes={**run.model.sizes, **variant.sizes})
    try:
        run = msgspec.structs.replace(
            run,
            model=model,
            method=_method(variant, run.method),
            training=_changed("training", run.training, variant.training),
            uplink=_changed("uplink", run.uplink, variant.uplink),
            policy=_changed("policy", run.policy, variant.policy),
        )
        return msgspec.structs.replace(
            scenario,
            run=run,
            availability=_changed("availability", scenario.availability, variant.availability),
            failures=_changed("failures", scenario.failures, variant.failures),
            attack=_changed("attack", scenario.attack, variant.attack),
            variants=(),
        )
    except ConfigError as error:
        raise ConfigError(f"variant {variant.name!r}: {error}") from error


Table = TypeVar("Table", bound=msgspec.Struct)


def _changed(name: str, table: Table, changes: Changes) -> Table:
    if unknown := sorted(changes.keys() - set(table.__struct_fields__)):
        raise ConfigError(
            f"unknown key {unknown[0]!r} in {name}; it may have "
            f"{', '.join(table.__struct_fields__)}: correct or remove it"
        )
    if not changes:
        return table
    try:
        plain = msgspec.to_builtins(table, enc_hook=str)
        return msgspec.convert({**plain, **changes}, type(table), dec_hook=_to_path)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{name}: {error}; correct the value") from error


def _to_path(kind: type, value: Any) -> Any:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise TypeError(f"expected {kind.__name__}, got {type(value).__name__}")


def _method(variant: Variant, own: MethodChoice) -> MethodChoice:
    if variant.method in ("", own.name):
        return MethodChoice(name=own.name, params={**own.params, **variant.params})
    if variant.method == LOCAL_ONLY:
        return MethodChoice()
    return MethodChoice(name=variant.method, params=variant.params)


def read_scenario(path: Path) -> Scenario:
    """The scenario in a TOML file; relative paths in it are relative to the file.

    Raises:
        ConfigError: absent, unreadable, an unknown key, or a value of the wrong type or range.
    """
    scenario = read_config(path, Scenario)
    base, run, fleet = path.parent, scenario.run, scenario.fleet
    if run.evaluation is not None:
        run = msgspec.structs.replace(run, evaluation=(base / run.evaluation).resolve())
    if fleet.folder is not None:
        fleet = msgspec.structs.replace(fleet, folder=(base / fleet.folder).resolve())
    availability = scenario.availability
    if availability.trace is not None:
        trace = (base / availability.trace).resolve()
        availability = msgspec.structs.replace(availability, trace=trace)
    return msgspec.structs.replace(scenario, run=run, fleet=fleet, availability=availability)


def shipped_scenarios() -> dict[str, Path]:
    """The scenarios that come with the package, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.toml"))}


def find_scenario(given: str) -> Path:
    """The file of a scenario, given by path or by the name of a shipped one.

    Raises:
        ConfigError: neither.
    """
    path = Path(given)
    if path.is_file():
        return path
    shipped = shipped_scenarios()
    if given in shipped:
        return shipped[given]
    if (SHIPPED / "peers" / f"{given}.toml").is_file():
        raise ConfigError(
            f"scenario {given!r} has no hub, which `run` expects; "
            f"run: headwater-sim peers {given} --out DIR"
        )
    raise ConfigError(
        f"there is no scenario {given!r}; give the path of a TOML file, or one of the shipped: "
        f"{', '.join(shipped)}"
    )
