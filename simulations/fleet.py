"""Makes a fleet from a scenario: who holds which data, what is held out, how devices are."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from federation.datasets.cached import DataSet, load
from federation.errors import ConfigError
from federation.learning.data import LocalData, load_folder
from federation.learning.partitions import (
    Indices,
    dirichlet_partition,
    dominant_partition,
    group_partition,
    iid_partition,
    long_tail_partition,
    mixed_partition,
    shard_partition,
)
from simulations.bodies import levels_of
from simulations.demo.wrist import wrist_fleet
from simulations.holdings import Names, deal, let_draw
from simulations.scenario import Scenario
from simulations.tables import FleetPlan

LISTED = 10_000
"""A manifest lists so many devices."""


@dataclass(frozen=True, slots=True, eq=False)
class FleetData:
    """What each device holds, by its name in the fleet's order, and what none of them does.

    A large fleet's mapping makes what it gives at each access: take it once where it is used.
    """

    devices: Mapping[str, LocalData]
    held_out: LocalData


def fleet_data(scenario: Scenario, *, cache: Path) -> FleetData:
    """The data of a scenario's fleet; the same scenario gives the same.

    Raises:
        DataError: a data set that is absent or damaged.
        ConfigError: data that cannot be dealt out as the scenario says.
    """
    plan = scenario.fleet
    if plan.partition == "wrist":
        data = _wrist(plan, cache)
    elif plan.folder is not None:
        samples = load_folder(plan.folder)
        data = _deal(plan, samples, *_split(plan, samples))
    else:
        dataset = load(plan.data, cache=cache)
        data = _natural(plan, dataset) if plan.partition == "natural" else _dealt(plan, dataset)
    if scenario.run.evaluation is not None:
        return FleetData(data.devices, load_folder(scenario.run.evaluation))
    return data


def device_names(count: int) -> Names:
    """The names of a fleet: `d00`, `d01` and so on."""
    return Names(count)


def device_levels(plan: FleetPlan) -> list[int]:
    """How much of a model each device can train, in the order of devices; 0 is all of it."""
    levels: list[int] = np.resize(levels_of(plan), plan.devices).tolist()
    return levels


def manifest(plan: FleetPlan, data: FleetData) -> dict[str, Any]:
    """Who holds how many samples of each class: what a reader needs to judge a partition.

    Of a fleet of more than `LISTED`, the first are listed; the seed gives the others again.
    """
    listed = {name: data.devices[name] for name in islice(data.devices, LISTED)}
    classes = 1 + max(int(held.y.max(initial=0)) for held in (*listed.values(), data.held_out))

    def histogram(held: LocalData) -> list[int]:
        counts: list[int] = np.bincount(held.y, minlength=classes).tolist()
        return counts

    return {
        "seed": plan.seed,
        "data": plan.data if plan.folder is None else plan.folder.name,
        "partition": plan.partition,
        "classes": classes,
        "size": len(data.devices),
        "levels": dict(zip(listed, device_levels(plan), strict=False)),
        "devices": {name: histogram(held) for name, held in listed.items()},
        "held_out": histogram(data.held_out),
    }


def _wrist(plan: FleetPlan, cache: Path) -> FleetData:
    fleet = wrist_fleet(load("watch", cache=cache))
    if plan.devices != len(fleet.devices):
        raise ConfigError(
            f"fleet.devices is {plan.devices}; partition 'wrist' has {len(fleet.devices)} devices: "
            "correct the scenario"
        )
    return FleetData(fleet.devices, fleet.held_out)


def _dealt(plan: FleetPlan, dataset: DataSet) -> FleetData:
    samples = LocalData(dataset.x, dataset.y)
    if dataset.test is None:
        return _deal(plan, samples, *_split(plan, samples))
    return _deal(plan, samples, dataset.train, dataset.test)


def _split(plan: FleetPlan, samples: LocalData) -> tuple[Indices, Indices]:
    order = np.random.default_rng([plan.seed, 1]).permutation(samples.samples)
    held_out = max(1, round(plan.hold_out * samples.samples))
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def _deal(plan: FleetPlan, samples: LocalData, train: Indices, test: Indices) -> FleetData:
    if plan.partition == "drawn":
        pool = samples.take(train)
        return FleetData(let_draw(pool, plan.devices, plan.samples, plan.seed), samples.take(test))
    rng = np.random.default_rng([plan.seed, 2])
    parts = _parts(plan, samples.y[train], rng)
    dealt = [_cap(plan, train[part], rng) for part in parts]
    return FleetData(deal(samples, dealt), samples.take(test))


def _parts(plan: FleetPlan, labels: Indices, rng: np.random.Generator) -> list[Indices]:
    devices = plan.devices
    match plan.partition:
        case "iid":
            parts = iid_partition(len(labels), devices, rng)
        case "shards":
            parts = shard_partition(labels, devices, plan.shards_each, rng)
        case "mixed":
            parts = mixed_partition(labels, devices, plan.share_iid, plan.shards_each, rng)
        case "dirichlet":
            parts = dirichlet_partition(labels, devices, plan.alpha, rng, plan.min_size)
        case "long_tail":
            tail = plan.imbalance
            parts = long_tail_partition(labels, devices, tail, plan.alpha, rng, plan.min_size)
        case "dominant":
            parts = dominant_partition(labels, devices, plan.even_share, plan.dominant, rng)
        case "groups":
            parts = group_partition(labels, devices, plan.groups, rng)
        case "natural" | "wrist" | "drawn":  # The others are no partition of indices.
            raise ConfigError(
                f"fleet.partition is {plan.partition!r}; data of a folder do not say whose they "
                "are: use iid, shards or dirichlet"
            )
    return parts


def _natural(plan: FleetPlan, dataset: DataSet) -> FleetData:
    if dataset.client is None:
        raise ConfigError(
            f"{dataset.name} does not say whose samples are whose, which partition 'natural' "
            "needs: use iid, shards or dirichlet"
        )
    rng = np.random.default_rng([plan.seed, 2])
    clients = rng.permutation(len(dataset.client_names))
    held_out = min(max(1, round(plan.hold_out * len(clients))), len(clients) - 1)
    unseen, seen = clients[:held_out], np.sort(clients[held_out:])
    samples = LocalData(dataset.x, dataset.y)
    parts = [_cap(plan, part, rng) for part in _whose(dataset, seen, plan.devices)]
    held = deal(samples, parts)
    return FleetData(held, samples.take(np.flatnonzero(np.isin(dataset.client, unseen))))


def _whose(dataset: DataSet, clients: Indices, devices: int) -> list[Indices]:
    """Device i holds samples of client i modulo their number; devices of one client share."""
    parts: list[Indices] = [np.empty(0, np.int64)] * devices
    for place, client in enumerate(clients.tolist()):
        holders = range(place, devices, len(clients))
        own = np.flatnonzero(dataset.client == client)
        if len(holders) > len(own):
            raise ConfigError(
                f"fleet.devices is {devices}; client {dataset.client_names[client]} has only "
                f"{len(own)} samples for {len(holders)} of them: take fewer devices"
            )
        # In the order of recording, so that devices of one client hold different sessions.
        for holder, piece in zip(holders, np.array_split(own, max(len(holders), 1)), strict=False):
            parts[holder] = piece
    return parts


def _cap(plan: FleetPlan, part: Indices, rng: np.random.Generator) -> Indices:
    if plan.samples == 0 or len(part) <= plan.samples:
        return part
    return np.sort(rng.choice(part, size=plan.samples, replace=False))
