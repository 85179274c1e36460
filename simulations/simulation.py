"""Runs a scenario from its data to its result."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from cloud.initial import initial_model
from cloud.record.registry import Registry
from cloud.record.store import Store
from edge_agent.trainer import fulfil
from federation.errors import ConfigError, StoreError
from federation.protocol.codec import digest_of
from optimizer.baselines import select_uniformly
from simulations.attacks import attacking, liars
from simulations.availability import let_leave, select_available
from simulations.conditions import Conditions
from simulations.diary import Diary
from simulations.faults import arrange_faults, check_names
from simulations.fleet import FleetData, fleet_data, manifest
from simulations.hub import UNRECORDED, HubRecord
from simulations.populating import population_of
from simulations.presence.kinds import presence_of
from simulations.presence.model import Presence
from simulations.report import (
    Ledger,
    Result,
    RoundResult,
    as_json,
    at_once,
    drop_reasons,
    outcome_of,
    versions,
    write_result,
)
from simulations.scenario import Scenario
from simulations.workshop.in_process import InProcess
from simulations.workshop.job import Trainer, Workshop
from simulations.workshop.remembered import Remembered
from simulations.world import World


def simulate(
    scenario: Scenario,
    out: Path,
    *,
    cache: Path,
    seed: int | None = None,
    data: FleetData | None = None,
    workshop: Workshop | None = None,
    on_round: Callable[[RoundResult], None] | None = None,
) -> Result:
    """Run a scenario and leave its files in `out`.

    They are `result.json`, `curves.png`, `attempts.csv` (what became of each device that was
    asked, and what it spent), `fleet.npy` (who was there), `events.jsonl`, `model.safetensors`,
    `partition.json` (who held what), and where the hub may be killed, `hub/` with its database
    and model files. `seed` replaces the scenario's; the run keeps its own. `cache` is where data
    sets are kept; with `data`, those of `fleet_data`, it is not looked at. Devices train in the
    `workshop`, which is the caller's to close, or in one made for this.
    One that remembers is told of the models' accuracies, too, and a run that is begun again
    measures none a second time.

    Raises:
        ConfigError: a scenario that cannot be, or a folder that cannot be written to.
        DataError: a data set that is not there.
    """
    seed = scenario.seed if seed is None else seed
    scenario = msgspec.structs.replace(scenario, seed=seed)
    data = data or fleet_data(scenario, cache=cache)
    bench = workshop or workshop_for(scenario, data)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "partition.json").write_bytes(as_json(manifest(scenario.fleet, data)))
        with contextlib.ExitStack() as stack:
            log = stack.enter_context((out / "events.jsonl").open("wb"))
            record = stack.enter_context(_hub_record(scenario, out))
            presence = presence_of(scenario.availability, len(data.devices), seed)
            world = build_world(scenario, data, presence, workshop=bench, record=record)
            diary = stack.enter_context(Diary(out, world, presence))
            ledger = Ledger(
                scenario.run,
                data.held_out,
                log=log,
                on_round=on_round,
                spent=diary.spent,
                remember=bench.remember if isinstance(bench, Remembered) else at_once,
            )
            world.watch(ledger.observe)
            initial, _ = ledger.accuracy_of(world.model)
            world.run(scenario.limit_s)
        (out / "model.safetensors").write_bytes(world.model)
    except OSError as error:
        raise ConfigError(
            f"cannot write to {out}: {error.strerror}; give another folder with --out"
        ) from error
    finally:
        if workshop is None:
            bench.close()
    result = _result(scenario, seed, world, ledger, initial)
    write_result(result, out)
    return result


def workshop_for(scenario: Scenario, data: FleetData) -> Workshop:
    """Where this scenario's devices train, if nobody says otherwise: in this process."""
    train = trainer_of(scenario, data)
    return InProcess(data.devices, train=train, in_place=scenario.shares_memory)


def trainer_of(scenario: Scenario, data: FleetData) -> Trainer | None:
    """What trains in place of the usual, where some devices lie; None where none does."""
    if scenario.attack.kind == "none":
        return None
    names = list(data.devices)
    return attacking(fulfil, scenario.attack, liars(scenario.attack, names, scenario.seed))


def build_world(
    scenario: Scenario,
    data: FleetData,
    presence: Presence,
    *,
    workshop: Workshop,
    record: HubRecord = UNRECORDED,
) -> World:
    """The world of a scenario, with all that goes wrong in it; it has not begun yet."""
    check_names(scenario, data.devices)
    seed, population = scenario.seed, population_of(scenario, data)
    now: Callable[[], float] = lambda: world.clock.now  # noqa: E731
    conditions = Conditions(
        seed=seed,
        select=select_available(select_uniformly, presence, population.names, now),
        shares_memory=scenario.shares_memory,
    )
    world = World(
        scenario.run,
        initial_model(scenario.run),
        population,
        workshop=workshop,
        conditions=conditions,
        record=record,
    )
    let_leave(world, presence)
    arrange_faults(scenario, world, seed)
    return world


@contextlib.contextmanager
def stored(folder: Path, scenario: Scenario) -> Iterator[HubRecord]:
    """The hub's real record, in a database and model files below a folder, begun anew."""
    database = folder / "hub.db"
    if database.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    registry = Registry(folder)
    store = Store(f"sqlite:///{database.resolve()}")

    def read_content(digest: str) -> bytes | None:
        try:
            return registry.read(digest)
        except StoreError:
            return None

    try:
        store.request_run(scenario.run)
        yield HubRecord(
            record=lambda facts: store.record(facts, registry),
            restore=lambda: store.restore(registry),
            read_content=read_content,
        )
    finally:
        store.close()


@contextlib.contextmanager
def _hub_record(scenario: Scenario, out: Path) -> Iterator[HubRecord]:
    if not scenario.kills_the_hub:
        yield UNRECORDED
        return
    with stored(out / "hub", scenario) as record:
        yield record


def _result(
    scenario: Scenario, seed: int, world: World, ledger: Ledger, initial_accuracy: float
) -> Result:
    status, reason = outcome_of(world.ended)
    sent, received = world.devices.traffic()
    measured = [row.accuracy for row in ledger.rounds if row.accuracy is not None]
    return Result(
        status=status,
        reason=reason,
        seed=seed,
        virtual_s=world.clock.now,
        rounds=tuple(ledger.rounds),
        accuracy=measured[-1] if measured else None,
        initial_accuracy=initial_accuracy,
        updates=ledger.updates,
        refused=dict(ledger.refused),
        letters_refused=ledger.letters_refused,
        drop_reasons=drop_reasons(ledger.rounds),
        bytes_up=ledger.bytes_up,
        bytes_down=ledger.bytes_down,
        wire_up_bytes=sent,
        wire_down_bytes=received,
        model_sha256=digest_of(world.model),
        run=scenario.run,
        versions=versions(),
    )
