"""The tables of a scenario that say what its fleet is: data, links, pace, presence, honesty."""

import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec

from federation.errors import ConfigError
from twin.device_classes import CLASSES
from twin.physics import Physics, out_of_range

Range: TypeAlias = tuple[float, float]

Partition: TypeAlias = Literal[
    "iid",
    "shards",
    "mixed",
    "dirichlet",
    "long_tail",
    "dominant",
    "groups",
    "natural",
    "wrist",
    "drawn",
]

PHASES = (
    "before-download",
    "mid-download",
    "mid-training",
    "before-upload",
    "mid-upload",
    "before-ack",
)
"""Moments in the life of an attempt at which a device can fail."""


def require(holds: bool, key: str, value: object, expected: str) -> None:
    """Refuse a value out of range.

    Raises:
        ConfigError: it does not hold.
    """
    if not holds:
        raise ConfigError(f"{key} is {value}; expected {expected}: correct the scenario")


def require_range(key: str, given: Range) -> None:
    """Refuse two numbers that are no range of times.

    Raises:
        ConfigError: they are negative, or the higher stands first.
    """
    require(0.0 <= given[0] <= given[1], key, list(given), "two numbers from 0, the lower first")


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of a scenario: unknown keys are refused."""


class FleetPlan(Record, frozen=True, kw_only=True):
    """How many devices, whose data they hold, and how much of a model each can train.

    `data` names a set of the catalogue, or `folder` holds `.npz` or `.csv` files. `partition`
    deals the samples out; `federation.learning.partitions` says how:

    - `iid`: whatever the labels;
    - `shards`: `shards_each` shards of few labels;
    - `mixed`: `share_iid` of all samples IID, the rest as shards;
    - `dirichlet`: label shares of concentration `alpha`, at least `min_size` samples each;
    - `long_tail`: the same on data whose commonest class has `imbalance` times the rarest;
    - `dominant`: `even_share` of all classes alike, the rest of `dominant` classes;
    - `groups`: `groups` disjoint groups of classes;
    - `natural`: a device holds one client of the set, never two;
    - `wrist`: the demo's ten devices on seven people;
    - `drawn`: each device holds `samples` drawn from all, which others may hold too: for fleets
      that are larger than their data.

    `hold_out` is the share of samples, or with `natural` of clients, that no device holds and
    models are measured on; a set that comes with a test split has that held out. `samples` caps
    what a device holds (0: all). `levels` are the devices' levels, over and over; or
    `level_shares` are the shares of level 1, 2 and so on, and each device draws its own.
    `seed` decides who gets what.
    """

    devices: int
    data: str = "digits"
    folder: Path | None = None
    partition: Partition = "iid"
    alpha: float = 0.5
    min_size: int = 1
    shards_each: int = 2
    share_iid: float = 0.05
    imbalance: float = 100.0
    even_share: float = 0.2
    dominant: int = 2
    groups: int = 4
    hold_out: float = 0.2
    samples: int = 0
    levels: tuple[int, ...] = ()
    level_shares: tuple[float, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        require(1 <= self.devices <= 1_000_000, "fleet.devices", self.devices, "1 or more")
        require(0.0 < self.hold_out < 1.0, "fleet.hold_out", self.hold_out, "between 0 and 1")
        least = 1 if self.partition == "drawn" else 0
        require(self.samples >= least, "fleet.samples", self.samples, f"{least} or more")
        require(self.min_size >= 1, "fleet.min_size", self.min_size, "1 or more")
        require(self.shards_each >= 1, "fleet.shards_each", self.shards_each, "1 or more")
        require(
            all(level >= 1 for level in self.levels),
            "fleet.levels",
            list(self.levels),
            "whole numbers from 1",
        )
        shares = self.level_shares
        require(
            not shares or (min(shares) >= 0.0 and math.isclose(sum(shares), 1.0, abs_tol=1e-6)),
            "fleet.level_shares",
            list(shares),
            "shares from 0 that sum to 1",
        )
        require(
            not (shares and self.levels),
            "fleet.level_shares",
            list(shares),
            "nothing beside fleet.levels",
        )


class LinkPlan(Record, frozen=True, kw_only=True):
    """The devices' links; see `simulations.bus.LinkQuality`. Rates are in bits a second.

    Where a class of devices has rates of its own, the lower ones hold. In `chunks`, contents
    travel as over a real broker, and an interrupted transfer goes on where it was; else each
    travels in one letter, which costs a simulation a tenth.
    """

    delay_s: Range = (0.01, 0.1)
    loss: float = 0.0
    duplicates: float = 0.0
    up_bps: float = 0.0
    down_bps: float = 0.0
    chunks: bool = False

    def __post_init__(self) -> None:
        require_range("link.delay_s", self.delay_s)
        require(0.0 <= self.loss < 1.0, "link.loss", self.loss, "0 to below 1")
        require(0.0 <= self.duplicates < 1.0, "link.duplicates", self.duplicates, "0 to below 1")
        for name in ("up_bps", "down_bps"):
            value = getattr(self, name)
            require(0.0 <= value < math.inf, f"link.{name}", value, "0 (no limit) or more")


class DeviceClass(Record, frozen=True, kw_only=True):
    """A share of the fleet whose devices are alike but for their pace.

    `like` names a class of `twin.device_classes`, whose figures hold where none is given here;
    `twin.physics.Physics` says what each figure is. Devices of this class are of `level`, if it
    is not 0, whatever the fleet's levels are.
    """

    like: Literal["", "raspberry_pi_4", "phone", "microcontroller"] = ""
    share: float = 1.0
    level: int = 0
    macs_per_s: float | None = None
    memory_bytes: int | None = None
    step_s: float | None = None
    sample_s: float | None = None
    training_w: float | None = None
    step_j: float | None = None
    sample_j: float | None = None
    up_bps: float | None = None
    down_bps: float | None = None
    up_j_per_mb: float | None = None
    down_j_per_mb: float | None = None
    idle_w: float | None = None
    battery_j: float | None = None
    charge_w: float | None = None
    charging_hours: Range | None = None
    restart_share: float | None = None

    def physics(self) -> Physics:
        """The figures of the class, its own before those of the class it is like."""
        given = msgspec.structs.asdict(self)
        names = {field.name for field in fields(Physics)}
        own = {name: value for name, value in given.items() if name in names and value is not None}
        return replace(CLASSES.get(self.like, Physics()), **own)

    def check(self, key: str) -> None:
        """Refuse figures that no device can have.

        Raises:
            ConfigError: one is out of its range; `key` is where the class stands.
        """
        require(0.0 < self.share <= 1.0, f"{key}.share", self.share, "above 0, at most 1")
        require(0 <= self.level <= 64, f"{key}.level", self.level, "0 (the fleet's) to 64")
        if wrong := out_of_range(self.physics()):
            name, value, expected = wrong
            require(False, f"{key}.{name}", value, expected)


class DevicePlan(Record, frozen=True, kw_only=True):
    """What devices are like.

    A device's pace differs from that of its class, or from `seconds_per_step` where there are
    no `classes`, by at most the factor 1 + `spread`, up or down, drawn once. A battery holds at
    the start a share drawn from `initial_charge`. A device's clock is off by at most
    `clock_offset_s` at the start, and by at most `clock_drift_ppm` millionths of the time since.
    """

    seconds_per_step: float = 0.01
    spread: float = 0.0
    checkpoint_s: float = 10.0
    heartbeat_s: float = 30.0
    keepalive_s: float = 30.0
    timeout_s: float = 10.0
    classes: tuple[DeviceClass, ...] = ()
    initial_charge: Range = (0.5, 1.0)
    clock_offset_s: float = 0.0
    clock_drift_ppm: float = 0.0

    def __post_init__(self) -> None:
        for name in ("seconds_per_step", "spread", "clock_offset_s"):
            value = getattr(self, name)
            require(0.0 <= value < math.inf, f"device.{name}", value, "0 or more")
        for name in ("heartbeat_s", "keepalive_s", "timeout_s"):
            value = getattr(self, name)
            require(value > 0.0, f"device.{name}", value, "above 0")
        drift = self.clock_drift_ppm
        require(0.0 <= drift <= 1e5, "device.clock_drift_ppm", drift, "0 to 100000")
        low, high = self.initial_charge
        holds = 0.0 <= low <= high <= 1.0
        require(holds, "device.initial_charge", [low, high], "two shares, the lower first")
        self._check_classes()

    def _check_classes(self) -> None:
        if not self.classes:
            return
        for place, kind in enumerate(self.classes):
            kind.check(f"device.classes[{place}]")
        shares = [kind.share for kind in self.classes]
        whole = math.isclose(sum(shares), 1.0, abs_tol=1e-6)
        require(whole, "device.classes.share", shares, "shares that sum to 1")
        usual = type(self).__struct_defaults__[0]
        alone = self.seconds_per_step == usual
        key, remedy = "device.seconds_per_step", "nothing beside device.classes, which have step_s"
        require(alone, key, self.seconds_per_step, remedy)


class OutagePlan(Record, frozen=True, kw_only=True):
    """Outages of whole regions; see `simulations.presence.regions`. None where `regions` is 0."""

    regions: int = 0
    every_s: float = 86_400.0
    lasts_s: Range = (600.0, 3600.0)

    def __post_init__(self) -> None:
        key = "availability.outages"
        holds = 0 <= self.regions <= 65_535
        require(holds, f"{key}.regions", self.regions, "0 (no outages) to 65535")
        require(self.every_s >= 1.0, f"{key}.every_s", self.every_s, "1 or more")
        require_range(f"{key}.lasts_s", self.lasts_s)


class AvailabilityPlan(Record, frozen=True, kw_only=True):
    """Which devices are there, links aside; `simulations.presence` has the models.

    - `bernoulli`: a device is on with probability `q` (one for all, or a list that repeats over
      the devices), drawn anew every `every_rounds`, one device at least;
    - `blocks`: on or out with probability `q` for `block_s` at a time, whatever the round;
    - `markov`: mean times of `on_s` on and `off_s` off: one number, or one for each hour of the
      day (24) or of the week (168);
    - `trace`: as recorded in the file `trace`, again every `trace_period_s` (0: its length);
      a fleet larger than the trace goes through it again `trace_shift_s` later.

    `starts_hour` is the hour of the week at the start, from Monday at midnight: for `markov`,
    and for batteries that charge at certain hours. `outages` come on top of every kind.
    """

    kind: Literal["always", "bernoulli", "blocks", "markov", "trace"] = "always"
    q: float | tuple[float, ...] = 1.0
    every_rounds: int = 1
    block_s: float = 3600.0
    on_s: float | tuple[float, ...] = 3600.0
    off_s: float | tuple[float, ...] = 3600.0
    trace: Path | None = None
    trace_period_s: float = 0.0
    trace_shift_s: float = 0.0
    starts_hour: float = 0.0
    outages: OutagePlan = OutagePlan()

    def __post_init__(self) -> None:
        chances = self.q if isinstance(self.q, tuple) else (self.q,)
        # Above 0 by so much that somebody is on after a bounded number of draws.
        holds = bool(chances) and all(0.0 <= q <= 1.0 for q in chances) and max(chances) >= 0.001
        require(holds, "availability.q", self.q, "probabilities, one of them 0.001 or more")
        require(self.every_rounds >= 1, "availability.every_rounds", self.every_rounds, "1 or more")
        require(self.block_s >= 1.0, "availability.block_s", self.block_s, "1 or more")
        for name in ("on_s", "off_s"):
            self._check_times(name)
        for name in ("trace_period_s", "trace_shift_s"):
            value = getattr(self, name)
            require(0.0 <= value < math.inf, f"availability.{name}", value, "0 or more")
        hour = self.starts_hour
        require(0.0 <= hour < 168.0, "availability.starts_hour", hour, "0 to below 168")
        is_given = self.kind != "trace" or self.trace is not None
        require(is_given, "availability.trace", "missing", "a .csv or .parquet file")

    def _check_times(self, name: str) -> None:
        given = getattr(self, name)
        means = given if isinstance(given, tuple) else (given,)
        holds = len(means) in (1, 24, 168) and all(mean >= 1.0 for mean in means)
        expected = "1, 24 or 168 numbers, each 1 or more"
        require(holds, f"availability.{name}", given, expected)

    def chances(self, devices: int) -> tuple[float, ...]:
        """The probability of each of so many devices to be on."""
        if isinstance(self.q, tuple):
            return tuple(self.q[place % len(self.q)] for place in range(devices))
        return (self.q,) * devices


class FailurePlan(Record, frozen=True, kw_only=True):
    """Devices that fail in the middle of a round, at random.

    A device that is asked in a round is killed with probability `chance`, at one of `PHASES`
    drawn by their weights in `phases` (all alike where there are none), and comes back after a
    time drawn from `away_s`.
    """

    chance: float = 0.0
    phases: dict[str, float] = msgspec.field(default_factory=dict)
    away_s: Range = (1.0, 20.0)

    def __post_init__(self) -> None:
        require(0.0 <= self.chance <= 1.0, "failures.chance", self.chance, "0 to 1")
        require_range("failures.away_s", self.away_s)
        for phase, weight in self.phases.items():
            choices = f"one of {', '.join(PHASES)}"
            require(phase in PHASES, "failures.phases", repr(phase), choices)
            require(0.0 <= weight < math.inf, f"failures.phases.{phase}", weight, "0 or more")
        some = not self.phases or sum(self.phases.values()) > 0.0
        require(some, "failures.phases", dict(self.phases), "a weight above 0")


class AttackPlan(Record, frozen=True, kw_only=True):
    """Which devices lie, and how; `simulations.attacks` says what each kind does.

    `devices` are names, or how many, drawn by the scenario's seed. `sign_flip` sends the update
    turned round and `boost` times as long; `noise` sends normal noise of standard deviation
    `scale` for weights; `label_flip` trains honestly on labels shifted by `shift`; `non_finite`
    sends NaN and infinity.
    """

    kind: Literal["none", "sign_flip", "noise", "label_flip", "non_finite"] = "none"
    devices: int | tuple[str, ...] = 0
    boost: float = 5.0
    scale: float = 1.0
    shift: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.devices, int):
            require(self.devices >= 0, "attack.devices", self.devices, "0 or more")
        require(0.0 < self.boost < math.inf, "attack.boost", self.boost, "above 0")
        require(0.0 < self.scale < math.inf, "attack.scale", self.scale, "above 0")
        require(self.shift != 0, "attack.shift", self.shift, "another number than 0")
