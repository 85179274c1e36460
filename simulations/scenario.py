"""A scenario: one run, its fleet, their links, and what goes wrong. Read from TOML, strictly."""

from pathlib import Path
from typing import Literal, TypeAlias

import msgspec

from cloud.config import RunPlan
from federation.config import read_config
from federation.errors import ConfigError

Range: TypeAlias = tuple[float, float]

SHIPPED = Path(__file__).parent / "scenarios"
"""The folder of the scenarios that come with the package."""


def _require(holds: bool, key: str, value: object, expected: str) -> None:
    if not holds:
        raise ConfigError(f"{key} is {value}; expected {expected}: correct the scenario")


def _require_range(key: str, given: Range) -> None:
    _require(0.0 <= given[0] <= given[1], key, list(given), "two numbers from 0, the lower first")


def _require_moment(kind: str, at_s: float | None, phase: str | None) -> None:
    if (at_s is None) == (phase is None):
        raise ConfigError(f"a {kind} needs either at_s or phase, and not both: correct the fault")


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of a scenario: unknown keys are refused."""


class FleetPlan(Record, frozen=True, kw_only=True):
    """How many devices, and whose data they hold.

    `data` names a set of the catalogue, or `folder` holds `.npz` or `.csv` files. `partition`
    deals the samples out: `iid`, `shards` (`shards_each` of few labels), `dirichlet` (label
    shares of concentration `alpha`), `natural` (a device holds one client of the set, never
    two), or `wrist` (the demo's ten devices on seven people). `hold_out` is the share of
    samples, or with `natural` of clients, that no device holds and models are measured on;
    a set that comes with a test split has that held out. `samples` caps what a device holds
    (0: all). `seed` decides who gets what.
    """

    devices: int
    data: str = "digits"
    folder: Path | None = None
    partition: Literal["iid", "shards", "dirichlet", "natural", "wrist"] = "iid"
    alpha: float = 0.5
    shards_each: int = 2
    hold_out: float = 0.2
    samples: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        _require(1 <= self.devices <= 1_000_000, "fleet.devices", self.devices, "1 or more")
        _require(0.0 < self.hold_out < 1.0, "fleet.hold_out", self.hold_out, "between 0 and 1")
        _require(self.samples >= 0, "fleet.samples", self.samples, "0 (all) or more")


class LinkPlan(Record, frozen=True, kw_only=True):
    """The devices' links; see `simulations.bus.LinkQuality`. Rates are in bits a second."""

    delay_s: Range = (0.01, 0.1)
    loss: float = 0.0
    duplicates: float = 0.0
    rate_bps: float = 0.0

    def __post_init__(self) -> None:
        _require_range("link.delay_s", self.delay_s)
        _require(0.0 <= self.loss < 1.0, "link.loss", self.loss, "0 to below 1")
        _require(0.0 <= self.duplicates < 1.0, "link.duplicates", self.duplicates, "0 to below 1")
        _require(self.rate_bps >= 0.0, "link.rate_bps", self.rate_bps, "0 (no limit) or more")


class DevicePlan(Record, frozen=True, kw_only=True):
    """What devices are like.

    A device's pace differs from `seconds_per_step` by at most the factor 1 + `spread`, up or
    down, drawn once.
    """

    seconds_per_step: float = 0.01
    spread: float = 0.0
    checkpoint_s: float = 10.0
    heartbeat_s: float = 30.0
    keepalive_s: float = 30.0
    timeout_s: float = 10.0

    def __post_init__(self) -> None:
        slowest = self.seconds_per_step * (1.0 + self.spread)
        _require(self.seconds_per_step >= 0.0, "device.seconds_per_step", slowest, "0 or more")
        _require(self.spread >= 0.0, "device.spread", self.spread, "0 or more")
        for name in ("heartbeat_s", "keepalive_s", "timeout_s"):
            value = getattr(self, name)
            _require(value > 0.0, f"device.{name}", value, "above 0")


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

    def __post_init__(self) -> None:
        _require_moment("kill", self.at_s, self.phase)


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

    def __post_init__(self) -> None:
        _require_moment("hub-kill", self.at_s, self.phase)


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


class Churn(Record, frozen=True, kw_only=True):
    """Failures at random, while the run lasts.

    Mean times between two failures anywhere in the fleet, in seconds (0: none), and how long
    each lasts, drawn from `away_s`. `dropout` is the chance that a device that is asked in a
    round is killed before its update is sent.
    """

    kill_every_s: float = 0.0
    cut_every_s: float = 0.0
    hub_kill_every_s: float = 0.0
    broker_restart_every_s: float = 0.0
    dropout: float = 0.0
    away_s: Range = (1.0, 20.0)

    def __post_init__(self) -> None:
        _require_range("churn.away_s", self.away_s)
        _require(0.0 <= self.dropout <= 1.0, "churn.dropout", self.dropout, "0 to 1")
        for name in self.__struct_fields__:
            if name.endswith("_every_s"):
                value = getattr(self, name)
                _require(value >= 0.0, f"churn.{name}", value, "0 (never) or more")


class Scenario(Record, frozen=True, kw_only=True):
    """All of a simulation. `seed` decides links, failures and pace; the run has its own.

    The run's `evaluation`, if given, is the folder of the held-out data. `limit_s` ends the
    simulation at that virtual time, whatever the run is about.
    """

    run: RunPlan
    fleet: FleetPlan
    link: LinkPlan = LinkPlan()
    device: DevicePlan = DevicePlan()
    faults: tuple[Fault, ...] = ()
    churn: Churn = Churn()
    seed: int = 0
    limit_s: float = 10 * 365 * 86_400.0

    @property
    def kills_the_hub(self) -> bool:
        """Whether the hub may die, so that it needs a record that outlives it."""
        return self.churn.hub_kill_every_s > 0 or any(isinstance(f, HubKill) for f in self.faults)


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
    return msgspec.structs.replace(scenario, run=run, fleet=fleet)


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
    raise ConfigError(
        f"there is no scenario {given!r}; give the path of a TOML file, or one of the shipped: "
        f"{', '.join(shipped)}"
    )
