"""What would be is answered from twins, by the hub's own engine, and nothing is changed."""

import hashlib
import math
from pathlib import Path
from statistics import median

import msgspec
import pytest

from cloud.config import RunPlan
from cloud.coordination.facts import HubFact, RoundClosed, RoundOpened
from cloud.initial import initial_model
from cloud.twins.store import TwinStore
from federation.errors import ConfigError
from simulations.fleet import fleet_data
from simulations.populating import population_of
from simulations.scenario import Scenario
from simulations.simulation import stored, workshop_for
from simulations.what_if.command import all_twins
from simulations.what_if.forecasting import answer, round_medians
from simulations.what_if.forking import Fork, Twin, changed, fork, load_fork, save_fork
from simulations.what_if.futures import play
from simulations.what_if.plan import Change, WhatIf
from simulations.world import World
from tests.command_line import Type
from twin.estimates import LogNormal
from twin.model import TwinModel

RUN = {
    "name": "asked",
    "rounds": 4,
    "model": {"name": "mlp", "sizes": {"inputs": 64, "hidden": 256, "classes": 10}},
    "policy": {"devices_per_round": 4, "quorum": 4, "deadline_s": 120.0},
    "training": {"epochs": 2, "batch_size": 32, "learning_rate": 0.05},
}


def _scenario(up_bps: float) -> Scenario:
    """Four devices of digits whose links are what takes long."""
    return msgspec.convert(
        {
            "run": RUN,
            "fleet": {"devices": 4, "data": "digits"},
            "link": {"delay_s": [0.02, 0.05], "up_bps": up_bps, "down_bps": 8e6, "chunks": True},
            "device": {"seconds_per_step": 0.05, "spread": 2.0},
        },
        Scenario,
    )


def _observed(scenario: Scenario, folder: Path) -> list[float]:
    """The seconds of each round as they are simulated; the hub's record stays in the folder."""
    data = fleet_data(scenario, cache=folder)
    opened: dict[int, float] = {}
    seconds: list[float] = []

    def note(fact: HubFact) -> None:
        if isinstance(fact, RoundOpened):
            opened[fact.round] = fact.at
        elif isinstance(fact, RoundClosed):
            seconds.append(fact.at - opened[fact.round])

    workshop = workshop_for(scenario, data)
    with stored(folder, scenario) as record:
        fleet = population_of(scenario, data, sleeps=False)
        model = initial_model(scenario.run)
        world = World(scenario.run, model, fleet, workshop=workshop, record=record)
        world.watch(note)
        world.run()
    workshop.close()
    return seconds


def _forked(folder: Path, question: WhatIf) -> Fork:
    store = TwinStore(f"sqlite:///{folder / 'hub.db'}")
    while store.follow():
        pass
    made = fork(all_twins(store), store.fleet(), question, at=0.0, event=store.followed())
    store.close()
    return made


def _twin(device: str) -> Twin:
    def about(value: float) -> LogNormal:
        return LogNormal(mu=math.log(value), sigma=0.1)

    return Twin(
        device=device,
        revision=3,
        level=0,
        samples=60,
        sample_s=about(0.01),
        beside_s=about(0.1),
        delay_s=about(0.02),
        up_bytes_per_s=about(50_000),
        down_bytes_per_s=about(500_000),
        completes=0.9,
        model=TwinModel(),
    )


def _small(**changes: object) -> tuple[WhatIf, Fork]:
    question = WhatIf(run=msgspec.convert(RUN, RunPlan), futures=2, **changes)  # type: ignore[arg-type]
    return question, Fork(at=0.0, event=9, twins=tuple(_twin(f"d{n}") for n in range(4)))


def test_a_change_that_was_asked_about_comes_as_it_was_forecast(tmp_path: Path) -> None:
    """Half the uplink, asked of twins and then made: round times agree within a fifth."""
    usual = median(_observed(_scenario(0.8e6), tmp_path / "before"))
    change = (Change(up=0.5),)
    question = WhatIf(run=msgspec.convert(RUN, RunPlan), change=change, futures=3)
    forecast = round_medians(play(question, _forked(tmp_path / "before", question)))

    really = _observed(_scenario(0.4e6), tmp_path / "after")

    assert median(really) > 1.2 * usual
    assert median(forecast) == pytest.approx(median(really), rel=0.2)


def test_the_same_question_has_the_same_answer(tmp_path: Path) -> None:
    """A fork that was kept gives the very futures again; another seed gives others."""
    question, made = _small()
    save_fork(made, tmp_path / "fork.json")

    first = play(question, made)

    assert play(question, load_fork(tmp_path / "fork.json")) == first
    assert play(msgspec.structs.replace(question, seed=1), made) != first
    said = answer(question, made, first)
    assert (said.provenance.event, said.provenance.revisions["d0"]) == (9, 3)
    assert said.round_s.low <= said.round_s.median <= said.round_s.high


def test_a_change_is_made_to_those_it_names() -> None:
    """Factors apply to the devices named, or to all; the other figures stay."""
    twin = _twin("d1")
    slower = changed(twin, [Change(devices=("d1",), compute=0.5, up=0.25)])
    same = changed(twin, [Change(devices=("d2",), compute=0.5)])

    assert same == twin
    assert slower.sample_s.median == pytest.approx(2 * twin.sample_s.median)
    assert slower.up_bytes_per_s is not None
    assert slower.up_bytes_per_s.median == pytest.approx(12_500)
    assert slower.beside_s == twin.beside_s


def test_a_question_about_nobody_is_refused() -> None:
    """Devices without a twin, and twins that never trained, are named in the error."""
    question, _ = _small(without=("d9",))
    with pytest.raises(ConfigError, match="'d9', of which there is no twin"):
        fork([], TwinModel(), question, at=0.0, event=0)
    question, _ = _small()
    with pytest.raises(ConfigError, match="there are no twins"):
        fork([], TwinModel(), question, at=0.0, event=0)


@pytest.mark.parametrize(
    ("differs", "says"),
    [({"selection": "plan"}, "draw devices by chance"), ({"mirror": True}, "runs of one model")],
)
def test_a_run_that_futures_cannot_play_is_refused(differs: dict[str, object], says: str) -> None:
    """What the engine would leave out is said, and not left out in silence."""
    with pytest.raises(ConfigError, match=says):
        WhatIf(run=msgspec.convert(RUN | differs, RunPlan))


def test_the_command_forecasts_and_writes_nothing(typed: Type, tmp_path: Path) -> None:
    """`headwater-hub what-if` answers from a hub's record, which stays as it was, byte for byte."""
    _observed(_scenario(1.6e6), tmp_path / "hub")
    (tmp_path / "hub.toml").write_text('folder = "hub"\n')
    plan = msgspec.toml.encode({"run": RUN, "futures": 2, "change": [{"up": 0.5}]})
    (tmp_path / "question.toml").write_bytes(plan)
    asked = ("headwater-hub", "what-if", "question.toml", "--json")
    first = typed(*asked, "--keep", "fork.json").succeeds()
    digest = hashlib.sha256((tmp_path / "hub" / "hub.db").read_bytes()).hexdigest()

    again = typed(*asked, "--fork", "fork.json").succeeds()
    typed(*asked).succeeds()

    said = msgspec.json.decode(first)
    assert said == msgspec.json.decode(again)
    assert (said["devices"], said["finished"]) == (4, 1.0)
    assert hashlib.sha256((tmp_path / "hub" / "hub.db").read_bytes()).hexdigest() == digest
