"""A round's plan says who trains and how fast each sends, with a proof; and devices keep to it."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest

from cloud.config import PlanningChoice, RunPlan
from cloud.coordination.facts import HubFact, RoundClosed, RoundOpened
from cloud.initial import initial_model
from cloud.record.registry import Registry
from cloud.record.store import Store
from cloud.twins.planning import RoundPlanner, problem_of
from cloud.twins.store import TwinStore
from federation.errors import ConfigError
from federation.protocol.messages import Capability
from optimizer.selection import Candidates, Planned, Selection
from simulations.conditions import Conditions
from simulations.fleet import fleet_data
from simulations.populating import population_of
from simulations.scenario import Scenario
from simulations.simulation import workshop_for
from simulations.world import World
from tests.histories import commit, send, with_open_round

UPLINK = 10_000.0


def _run(**planning: float) -> RunPlan:
    return msgspec.convert(
        {
            "name": "demo",
            "rounds": 2,
            "selection": "plan",
            "planning": {"uplink_bytes_per_s": UPLINK, **planning},
            "model": {"name": "mlp", "sizes": {"inputs": 64, "hidden": 128, "classes": 10}},
            "policy": {"devices_per_round": 3, "deadline_s": 60.0},
        },
        RunPlan,
    )


def _candidates(names: Sequence[str]) -> Candidates:
    return Candidates(sorted(names), lambda _: Capability(agent="a"))


@pytest.fixture
def twins(tmp_path: Path) -> Iterator[TwinStore]:
    """Twins of d1 and d2, each of which completed a part."""
    url = f"sqlite:///{tmp_path / 'hub.db'}"
    store, twins = Store(url), TwinStore(url)
    history = with_open_round(store)
    for device, takes_s in (("d1", 1.0), ("d2", 3.0)):
        attempt = f"demo_1_{device}"
        history.mark(attempt, "accepted", "")
        history.mark(attempt, "training", "")
        history.now += takes_s
        send(history, attempt)
        history.accept(attempt)
    commit(store, history, Registry(tmp_path / "registry"))
    while twins.follow():
        pass
    yield twins
    twins.close()
    store.close()


def _select(twins: TwinStore, run: RunPlan, names: Sequence[str]) -> Selection:
    rng = np.random.default_rng(0)
    plan = twins_plan(twins)
    run = msgspec.structs.replace(run, model=plan.model)
    return RoundPlanner(twins).select(
        _candidates(names), 3, rng, run=run, model_bytes=40_000, now=2000.0
    )


def twins_plan(twins: TwinStore) -> RunPlan:
    """The run whose parts the twins saw."""
    store_run = twins.forecasts()[0].run
    assert store_run == "demo"
    row = twins.twin("d1")
    family = next(iter(row.model.seconds_per_sample))
    name, _, sizes = family.partition("(")
    pairs = dict(pair.split("=") for pair in sizes.rstrip(")").split(",") if pair)
    model = {"name": name, "sizes": {key: int(value) for key, value in pairs.items()}}
    return msgspec.convert(
        {"name": "demo", "rounds": 1, "model": model, "policy": {"devices_per_round": 2}}, RunPlan
    )


def test_a_plan_shares_the_uplink_and_proves_itself(twins: TwinStore) -> None:
    """Paces together stay within the uplink, and no plan can be better than the bound says."""
    selection = _select(twins, _run(), ["d1", "d2"])

    planned = selection.planned
    assert planned is not None
    assert planned.objective is not None
    assert planned.bound is not None
    assert planned.gap is not None
    assert planned.bound <= planned.objective + 1e-9
    assert planned.gap <= 1e-3
    assert set(planned.paces) <= set(selection.chosen)
    assert 0 < sum(planned.paces.values()) <= UPLINK * (1 + 1e-9)


def test_a_device_that_nobody_knows_is_asked_all_the_same(twins: TwinStore) -> None:
    """Without a twin there is no plan for a device; it is asked if there is room, unpaced."""
    selection = _select(twins, _run(accuracy=100.0), ["d1", "d2", "stranger"])

    assert "stranger" in selection.chosen
    assert selection.planned is not None
    assert "stranger" not in selection.planned.paces


def test_where_time_is_dear_devices_sit_out(twins: TwinStore) -> None:
    """With updates worth little beside the round's time, the plan has the slow ones sit out."""
    eager = _select(twins, _run(accuracy=100.0), ["d1", "d2"])
    lazy = _select(twins, _run(accuracy=0.001, makespan=100.0), ["d1", "d2"])

    assert len(lazy.chosen) < len(eager.chosen)
    assert len(lazy.chosen) == 1  # A quorum is asked all the same, or no round would ever open.
    assert all("sit this round out" in reason for reason in lazy.excluded.values())


def test_numbers_no_plan_can_be_made_with_are_refused() -> None:
    """An uplink of nothing, or weights below zero, are named when the run is asked for."""
    with pytest.raises(ConfigError, match="uplink_bytes_per_s is 0"):
        PlanningChoice(uplink_bytes_per_s=0.0)
    with pytest.raises(ConfigError, match=r"planning\.energy is -1"):
        PlanningChoice(energy=-1.0)
    with pytest.raises(ValueError, match="empty"):
        problem_of({}, {}, _run())


def test_devices_keep_the_pace_they_were_given(tmp_path: Path) -> None:
    """An update takes as long as its pace says, over a link that would take it at once."""
    scenario = msgspec.convert(
        {
            "run": {
                "name": "paced",
                "rounds": 1,
                "model": {"name": "mlp", "sizes": {"inputs": 64, "hidden": 512, "classes": 10}},
                "policy": {"devices_per_round": 2, "quorum": 2, "deadline_s": 600.0},
            },
            "fleet": {"devices": 2, "data": "digits"},
            "link": {"delay_s": [0.001, 0.002], "chunks": True},
        },
        Scenario,
    )
    data, pace = fleet_data(scenario, cache=tmp_path), 10_000.0
    times: dict[str, float] = {}
    up: list[int] = []

    def choose(candidates: Candidates, _count: int, _number: int, _rng: object) -> Selection:
        names = tuple(candidates.names)
        return Selection(names, planned=Planned(paces=dict.fromkeys(names, pace)))

    def note(fact: HubFact) -> None:
        times[type(fact).__name__] = getattr(fact, "at", 0.0)
        if isinstance(fact, RoundOpened):
            assert fact.planned is not None
        if isinstance(fact, RoundClosed):
            up.append(fact.bytes_up)

    workshop = workshop_for(scenario, data)
    fleet = population_of(scenario, data, sleeps=False)
    world = World(
        scenario.run,
        initial_model(scenario.run),
        fleet,
        workshop=workshop,
        conditions=Conditions(select=choose),
    )
    world.watch(note)
    world.run()
    workshop.close()

    seconds = times["RoundClosed"] - times["RoundOpened"]
    size = up[0] / 2
    assert 0.75 * size / pace < seconds < 1.1 * size / pace
