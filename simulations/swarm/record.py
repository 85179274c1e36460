"""The hub's side of a swarm: its record is asked for a run, and for what counted in it."""

from collections.abc import Mapping
from pathlib import Path

import msgspec

from cloud.config import HubConfig, ModelChoice, ReleasePlan, RunPlan
from cloud.coordination.rounds import RoundPolicy
from cloud.holder import find_holder
from cloud.record.queries import RoundRow
from cloud.record.store import Store
from federation.config import read_config
from federation.errors import ConfigError
from federation.learning.plans import TrainingPlan

INPUTS, CLASSES = 64, 10
"""The model that a swarm trains fits the 8x8 digits."""


class HubRecord:
    """The record of a hub: by its `hub.toml`, or by the database's URL where that is elsewhere."""

    def __init__(self, where: str, namespace: str) -> None:
        self.broker = ""
        self.namespace = namespace
        url = where
        if "://" not in where:
            config = _read_hub(Path(where))
            url, self.namespace = config.database_url, namespace or config.namespace
            holder = find_holder(config.folder)
            self.broker = config.broker.url or (holder.broker if holder is not None else "")
            if not config.database and not (config.folder / "hub.db").exists():
                raise ConfigError(
                    f"no hub ever ran in {config.folder}; its record was expected there: "
                    f"start it with: headwater-hub serve {where}"
                )
        self.store = Store(url)

    def close(self) -> None:
        """Let go of the database."""
        self.store.close()

    def ready(self, names: set[str]) -> int:
        """How many of these devices the hub knows to be ready."""
        rows = self.store.devices()
        return sum(row.state == "ready" and row.device in names for row in rows)

    def is_over(self, run: str) -> bool:
        """Whether a run has ended, however it did."""
        return self.store.run_status(run).status not in ("requested", "active")


def _read_hub(path: Path) -> HubConfig:
    if not path.exists():
        raise ConfigError(
            f"there is no hub's file {path}; name a hub.toml, or the database's URL "
            "(sqlite:///... or postgresql+psycopg://...)"
        )
    config = read_config(path, HubConfig)
    return msgspec.structs.replace(config, folder=(path.parent / config.folder).resolve())


def swarm_plan(
    name: str, *, agents: int, rounds: int, update_bytes: float, trains: bool, patience_s: float
) -> RunPlan:
    """A run that asks all agents in each round, and waits for those that drop out of it.

    The model is a perceptron whose weights take about `update_bytes`, as an update does.
    """
    hidden = max(1, round((update_bytes / 4 - CLASSES) / (INPUTS + 1 + CLASSES)))
    sizes = {"inputs": INPUTS, "hidden": hidden, "classes": CLASSES}
    return RunPlan(
        name=name,
        rounds=rounds,
        model=ModelChoice(name="mlp", sizes=sizes),
        policy=RoundPolicy(
            devices_per_round=agents,
            gather_s=patience_s,
            deadline_s=patience_s,
            lost_grace_s=patience_s,
        ),
        training=TrainingPlan(epochs=1 if trains else 0),
        release=ReleasePlan(every=0),
    )


class Audit(msgspec.Struct, frozen=True, kw_only=True):
    """What the record says of a run, beside what the agents were promised.

    `lost` are updates whose device was told that they count and that do not; `double` counts
    updates that counted more than once, and rounds whose sum of samples is not that of the
    devices in it.
    """

    rounds_closed: int
    rounds_abandoned: int
    asked: int
    counted: int
    lost: int
    double: int
    round_s: tuple[float, ...]
    wall_s: float

    @property
    def updates_per_s(self) -> float:
        """Updates that counted, by the seconds from the first round's opening to the last's end."""
        return self.counted / self.wall_s if self.wall_s > 0 else 0.0


def audit(rows: list[RoundRow], promised: Mapping[tuple[int, str], int]) -> Audit:
    """Compare the rounds of a run with what its devices were told, by round and device."""
    closed = [row for row in rows if row.status == "closed"]
    counted = {(row.number, device) for row in closed for device in row.devices}
    in_all = sum(len(row.devices) for row in closed)
    of_closed = {row.number for row in closed}
    lost = sum(key not in counted for key in promised if key[0] in of_closed)
    ends = [row.ended_at for row in closed if row.ended_at is not None]
    return Audit(
        rounds_closed=len(closed),
        rounds_abandoned=sum(row.status == "abandoned" for row in rows),
        asked=sum(row.asked for row in rows),
        counted=len(counted),
        lost=lost,
        double=in_all - len(counted) + sum(_is_off(row, promised) for row in closed),
        round_s=tuple(row.ended_at - row.opened_at for row in closed if row.ended_at is not None),
        wall_s=max(ends) - min(row.opened_at for row in closed) if ends else 0.0,
    )


def _is_off(row: RoundRow, promised: Mapping[tuple[int, str], int]) -> bool:
    """Whether a round's sum of samples differs from the sum over its devices."""
    samples = [promised.get((row.number, device)) for device in row.devices]
    # A device that the last answer did not reach has not said what it sent.
    known = [each for each in samples if each is not None]
    said = row.report.samples if row.report is not None else 0
    return said != sum(known) if len(known) == len(samples) else said < sum(known)
