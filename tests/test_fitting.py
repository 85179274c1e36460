"""A fleet's physics are fitted from what its hub has seen, and from nothing else."""

import json
import math
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import ANY

import msgspec
import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.lifelike import CHECKPOINT_S, Recorded, compare, predict
from cloud.config import ModelChoice, RunPlan
from cloud.coordination.rounds import RoundPolicy
from cloud.initial import initial_model
from edge_agent.agent import AgentSettings
from federation.errors import ConfigError
from federation.learning.plans import TrainingPlan
from simulations.bus import LinkQuality
from simulations.device_model import DeviceModel, Member
from simulations.fitting_command import fit_fleet as fit_command
from simulations.observing import Observed, observe, read_hub, read_log
from simulations.scenario import Scenario, read_scenario
from simulations.simulation import stored
from simulations.tables import FleetPlan
from simulations.workshop.in_process import InProcess
from simulations.world import World
from tests.simulated import shards
from twin.fitting import (
    FIGURES,
    Absence,
    DeviceFit,
    Figure,
    Part,
    completed,
    figure_of,
    fit_device,
    fit_fleet,
)

RATE_BPS = 1e6

PACES_S = {"d00": 0.5, "d01": 0.25, "d02": 1.0, "d03": 0.4}
"""Seconds a step of each device."""

PLAN = RunPlan(
    name="known",
    rounds=8,
    model=ModelChoice(name="mlp", sizes={"hidden": 300}),
    policy=RoundPolicy(
        devices_per_round=4, quorum=2, gather_s=1.0, deadline_s=60.0, lost_grace_s=2.0
    ),
    training=TrainingPlan(max_steps=2),
)

USUAL = AgentSettings(heartbeat_s=5.0, keepalive_s=10.0)


def device_of(step_s: float) -> DeviceModel:
    quality = LinkQuality(delay_s=(0.04, 0.06), up_bps=RATE_BPS, down_bps=RATE_BPS)
    return DeviceModel(
        seconds_per_step=step_s, quality=quality, settings=USUAL, checkpoint_s=CHECKPOINT_S
    )


def befall(world: World) -> None:
    """One is killed, one loses its link, one comes late, and the hub dies."""
    at = world.clock.call_at
    at(8.0, world.devices["d00"].kill, 8.0)
    at(14.0, world.devices["d01"].cut, 4.0)
    at(22.5, world.hub.kill, 1.5)
    at(22.5, partial(world.restart_broker, 1.5, forgets=False))


def simulated(
    folder: Path, models: Mapping[str, DeviceModel], befall: Callable[[World], None]
) -> Observed:
    """A fleet of these devices, simulated; what the hub in this folder says of it."""
    scenario = Scenario(run=PLAN, fleet=FleetPlan(devices=len(models)))
    data = {name: shards(4)[name] for name in models}
    with stored(folder, scenario) as record, InProcess(data) as workshop:
        members = [Member(name, data[name], model) for name, model in models.items()]
        model = initial_model(PLAN)
        world = World(PLAN, model, members, workshop=workshop, record=record)
        befall(world)
        ended = world.run(1000.0)
        assert ended is not None
        assert ended.status == "finished", ended.reason
    return read_hub(folder)[1]


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Observed]:
    """A fleet that much befalls: its hub's folder, and what that saw."""
    folder = tmp_path_factory.mktemp("faulty") / "hub"
    models = {name: device_of(step_s) for name, step_s in PACES_S.items()}
    models["d03"] = replace(models["d03"], joins_at_s=7.5)
    return folder, simulated(folder, models, befall)


def near(figure: Figure | None, low: float, high: float) -> bool:
    return figure is not None and low <= figure.value <= high


# From a world to its log, and back to the world -----------------------------------------------


def test_fitting_gives_back_the_physics_of_a_simulated_fleet(tmp_path: Path) -> None:
    """What a fleet was simulated with is found again in its hub's record, device by device."""
    models = {name: device_of(step_s) for name, step_s in PACES_S.items()}
    seen = simulated(tmp_path / "hub", models, lambda _: None)

    fits = fit_fleet(seen.parts, seen.absences)
    upload_s = 8 * seen.parts[0].up_bytes / RATE_BPS
    assert upload_s > 0.5
    assert list(fits) == list(PACES_S)
    for name, fit in fits.items():
        assert fit.seconds_per_step is not None
        assert fit.seconds_per_step.value == pytest.approx(PACES_S[name])
        assert fit.seconds_per_step.count == PLAN.rounds
        assert near(fit.delay_s, 0.04, 0.065), fit.delay_s
        assert near(fit.down_bps, 0.9 * RATE_BPS, 1.1 * RATE_BPS), fit.down_bps
        assert near(fit.overhead_s, 0.9 * upload_s, 1.15 * upload_s), fit.overhead_s
        assert near(fit.start_s, 0.0, 0.06), fit.start_s
        assert fit.up_bps is None
        assert "one size" in fit.missing["up_bps"]
        assert fit.away_s is None
        assert fit.disbelieved == 0


def test_a_record_tells_who_was_away_and_when(faulty: tuple[Path, Observed]) -> None:
    """Kills, cuts, joins and the hub's own death are read from the record at their times."""
    _, seen = faulty

    away = {absence.device: absence for absence in seen.absences}
    (hub,) = seen.hub_absences

    assert set(away) == {"d00", "d01"}
    assert (away["d00"].from_s, away["d00"].until_s) == pytest.approx((8.0, 16.0), abs=1.0)
    assert away["d01"].until_s == pytest.approx(18.0, abs=0.5)
    assert away["d00"].is_restart is not False
    assert seen.joined_s["d03"] == pytest.approx(7.5, abs=0.5)
    assert hub.until_s == pytest.approx(24.0)
    assert 20.0 < hub.from_s <= 22.5
    fits = fit_fleet(seen.parts, seen.absences)
    for name, step_s in PACES_S.items():
        assert near(fits[name].seconds_per_step, 0.999 * step_s, 1.001 * step_s)
    assert near(fits["d00"].away_s, 7.5, 8.5)


def test_a_run_is_predicted_from_its_own_record(
    faulty: tuple[Path, Observed], tmp_path: Path
) -> None:
    """A fleet of fitted devices, which the same befalls, takes as long for each round."""
    _, seen = faulty

    again = predict(Recorded(PLAN, seen, shards(4)), tmp_path / "again", lambda _: True)

    errors = {each.name: each.value for each in compare(seen.rounds, again, again)}
    assert len(again.rounds) == len(seen.rounds) == PLAN.rounds
    assert errors["median error of a round's time"] < 0.05


# Figures ------------------------------------------------------------------------------------


def parts_of(
    count: int = 9,
    *,
    step_s: float = 0.2,
    overhead_s: float = 0.3,
    start_s: float = 4.0,
    delay_s: float = 0.05,
    down_bps: float = 2e6,
    up_bps: float = 5e5,
    sizes: Sequence[int] = (100_000,),
    is_opened: bool = False,
) -> list[Part]:
    """What a hub sees of a device of these physics, letter by letter."""
    parts, now = [], 1e9
    for number in range(count):
        size, steps = sizes[number % len(sizes)], 10 + number % 3
        accepted = now + 2 * delay_s
        training = accepted + 2 * delay_s + 8 * 80_000 / down_bps
        loop_s = steps * step_s
        opened = training + overhead_s + loop_s + (start_s if number == 0 else 0.0)
        received = opened + 2 * delay_s + 8 * size / up_bps
        parts.append(
            Part(
                device="d", round=number + 1, asked_at=now, accepted_at=accepted,
                training_at=training, opened_at=opened if is_opened else None,
                received_at=received, seconds=loop_s, steps=steps, samples=8 * steps,
                down_bytes=80_000, down_chunks=2, up_bytes=size, up_chunks=2,
                is_first=number == 0,
            )
        )  # fmt: skip
        now = received + 1.0
    return parts


figures = st.floats(0.01, 5.0)
rates = st.floats(1e4, 1e6)


@given(figures, figures, figures, st.floats(0.001, 0.2), rates, rates, st.booleans())
def test_every_figure_comes_back_where_the_log_tells_it(
    step_s: float,
    overhead_s: float,
    start_s: float,
    delay_s: float,
    down_bps: float,
    up_bps: float,
    is_opened: bool,
) -> None:
    """Uploads whose begin was seen, or of different sizes, give all figures without noise."""
    sizes = (100_000,) if is_opened else (50_000, 100_000, 150_000)
    parts = parts_of(
        step_s=step_s, overhead_s=overhead_s, start_s=start_s, delay_s=delay_s,
        down_bps=down_bps, up_bps=up_bps, sizes=sizes, is_opened=is_opened,
    )  # fmt: skip

    fit = fit_device("d", parts, [Absence(device="d", from_s=2.0, until_s=9.0)])

    truth = {
        "seconds_per_step": step_s, "seconds_per_sample": step_s / 8, "overhead_s": overhead_s,
        "start_s": start_s, "delay_s": delay_s, "down_bps": down_bps, "up_bps": up_bps,
        "away_s": 7.0,
    }  # fmt: skip
    found = {name: getattr(fit, name).value for name in FIGURES}
    assert found == pytest.approx(truth, rel=1e-3, abs=1e-4)
    assert not fit.missing


def test_few_lies_move_no_figure() -> None:
    """With four of nine trainings made up, every figure stays among those of the honest five."""
    parts = parts_of()
    lies = [replace(part, seconds=part.seconds * 0.01) for part in parts[1:5]]

    fit = fit_device("d", [*lies, *parts[5:], parts[0]])

    assert near(fit.seconds_per_step, 0.199, 0.201)
    assert fit.disbelieved == 0


@pytest.mark.parametrize("seconds", [1e6, -1.0, math.nan, math.inf])
def test_a_report_that_cannot_be_is_not_believed(seconds: float) -> None:
    """Who claims to have trained for longer than the hub waited for it is left out, and counted."""
    parts = parts_of()
    hostile = [replace(parts[2], seconds=seconds), replace(parts[3], steps=-5)]

    fit = fit_device("d", [*parts[4:], parts[0], *hostile])

    assert fit.disbelieved == 2
    assert near(fit.seconds_per_step, 0.199, 0.201)


def test_more_observations_make_a_figure_surer() -> None:
    """The error of a figure shrinks with the root of its observations, and one has none."""
    rng = random.Random(5)
    few, many = ([rng.gauss(3.0, 0.5) for _ in range(n)] for n in (25, 2500))

    wide, narrow, single = figure_of(few), figure_of(many), figure_of([3.0])

    assert wide is not None
    assert narrow is not None
    assert wide.error is not None
    assert narrow.error is not None
    assert narrow.error == pytest.approx(1.2533 * 0.5 / 50, rel=0.1)
    assert wide.error > 5 * narrow.error
    assert abs(narrow.value - 3.0) < 4 * narrow.error
    assert single == Figure(3.0, 0.0, 1)
    assert single.error is None


def test_what_the_log_does_not_tell_is_said() -> None:
    """Without observations there is no figure, but a reason for each; the fleet's may stand in."""
    nothing = fit_device("d", [])
    fleet = fit_device("fleet", parts_of(is_opened=True))

    whole = completed(nothing, fleet)

    assert all(getattr(nothing, name) is None for name in FIGURES)
    assert set(nothing.missing) == set(FIGURES)
    assert whole.seconds_per_step == fleet.seconds_per_step
    assert whole.away_s is None
    assert whole.missing == nothing.missing


def test_noise_is_no_rate() -> None:
    """A link whose transfers drown in its letters' noise gets no rate, however many they are."""
    rng = random.Random(1)
    parts = [
        replace(part, training_at=(part.accepted_at or 0.0) + 0.1 + rng.gauss(0.0, 0.04))
        for part in parts_of(50, down_bps=1e12)
    ]

    fit = fit_device("d", parts)

    assert fit.down_bps is None
    assert "clearly longer" in fit.missing["down_bps"]


anything = st.floats() | st.integers(-(2**70), 2**70)
moments = st.none() | st.floats()
hostile_parts = st.builds(
    Part,
    device=st.sampled_from(["d0", "d1"]),
    round=st.integers(),
    asked_at=st.floats(),
    accepted_at=moments,
    training_at=moments,
    opened_at=moments,
    received_at=moments,
    seconds=st.floats(),
    steps=st.integers(),
    samples=st.integers(),
    down_bytes=st.integers(),
    down_chunks=st.integers(),
    up_bytes=st.integers(),
    up_chunks=st.integers(),
    is_first=st.booleans(),
    is_whole=st.booleans(),
)
hostile_absences = st.builds(
    Absence, device=st.just("d1"), from_s=st.floats(), until_s=st.floats(), is_restart=st.none()
)


@given(st.lists(hostile_parts), st.lists(hostile_absences))
def test_no_numbers_break_the_fit(parts: list[Part], absences: list[Absence]) -> None:
    """Whatever devices and clocks say, every figure is a finite number from 0, or missing."""
    fits = fit_fleet(parts, absences)

    for fit in fits.values():
        check_possible(fit)


def check_possible(fit: DeviceFit) -> None:
    for name in FIGURES:
        figure = getattr(fit, name)
        assert (figure is None) == (name in fit.missing)
        if figure is not None:
            assert 0.0 <= figure.value < math.inf
            assert figure.spread >= 0.0
            assert figure.count >= 1


# Reading a log ------------------------------------------------------------------------------


def line(kind: str, at: float, device: str = "", number: int = 0, **detail: object) -> bytes:
    run = "" if kind in ("device-born", "presence-changed") else "r"
    event = {"kind": kind, "at": at, "device": device, "run": run, "round": number}
    return msgspec.json.encode({**event, "detail": detail})


def training(number: int, at: float) -> list[bytes]:
    return [
        line("round-opened", at, number=number, attempts=["d"], base="x"),
        line("attempt-changed", at + 0.1, "d", number, status="accepted"),
        line("attempt-changed", at + 0.1, "d", number, status="training"),
    ]


def update(number: int, at: float) -> bytes:
    report = {"samples": 8, "steps": 2, "seconds": 0.5}
    content = {"digest": "u", "size": 100, "chunk_bytes": 100}
    return line("update-accepted", at, "d", number, report=report, content=content)


@pytest.mark.parametrize(
    ("comes_after_s", "is_restart"), [(0.2, False), (5.0, True), (math.inf, True)]
)
def test_an_update_that_is_ready_at_the_return_was_trained_meanwhile(
    comes_after_s: float, is_restart: bool
) -> None:
    """A process that lived on while its link was away is told from one that began anew."""
    log = [
        line("device-born", 1.0, "d"),
        line("run-opened", 2.0, content={"digest": "x", "size": 10, "chunk_bytes": 10}),
        *training(1, 3.0),
        line("presence-changed", 4.0, "d", state="lost"),
        line("device-born", 9.0, "d"),
        *([update(1, 9.0 + comes_after_s)] if comes_after_s < math.inf else []),
        line("round-closed", 15.0, number=1, content={}),
        *training(2, 15.0),
    ]

    seen = observe(read_log(log), "r")

    (away,) = seen.absences
    assert (away.from_s, away.until_s, away.is_restart) == (2.0, 7.0, is_restart)
    assert seen.joined_s == {"d": -1.0}
    # Where no update came, nothing tells whether its new process has trained since.
    assert [(part.is_first, part.is_whole) for part in seen.parts] == [
        (True, False),
        (False, comes_after_s < math.inf),
    ]


KINDS = (
    "device-born", "presence-changed", "run-opened", "round-opened", "attempt-changed",
    "update-accepted", "update-refused", "round-closed",
)  # fmt: skip
NAMES = ("attempts", "base", "capability", "content", "digest", "level", "report", "size", "status")
values = st.recursive(
    st.none() | st.floats(allow_nan=False, allow_infinity=False) | st.integers(-9, 2**63)
    | st.sampled_from(["d", "training", "accepted", "lost", "x"]),
    lambda inner: st.lists(inner, max_size=2)
    | st.dictionaries(st.sampled_from(NAMES), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip
entries = st.tuples(st.sampled_from(KINDS), st.dictionaries(st.sampled_from(NAMES), values))


@settings(max_examples=50)
@given(st.lists(entries, max_size=10))
def test_entries_that_make_no_sense_are_passed_over(
    told: list[tuple[str, dict[str, object]]],
) -> None:
    """A log with any details at all can be read, and fitted."""
    events = [line(kind, float(at), "d", 1, **detail) for at, (kind, detail) in enumerate(told)]

    seen = observe(read_log([*training(1, 0.0), *events]), "r")

    for fit in fit_fleet(seen.parts, seen.absences).values():
        check_possible(fit)


def test_what_is_no_record_is_named(tmp_path: Path) -> None:
    """A folder without a hub's record, and a line that is no event, are refused in words."""
    with pytest.raises(ConfigError, match=r"no hub\.db in .*name the folder"):
        read_hub(tmp_path)
    with pytest.raises(ConfigError, match="line 2 is no event"):
        list(read_log([line("run-opened", 0.0), b"{]"]))
    assert not (tmp_path / "hub.db").exists()


# The command --------------------------------------------------------------------------------


@pytest.fixture
def fit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Types `headwater-sim fit`: what it prints."""
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(fit_command)

    def run(*words: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", ["fit", *map(str, words)])
        app(standalone_mode=False)
        return capsys.readouterr().out

    return run


def test_the_command_writes_a_scenario_of_devices_like_these(
    faulty: tuple[Path, Observed], fit: Callable[..., str], tmp_path: Path
) -> None:
    """It prints what it found and how sure it is, and the scenario it writes can be read."""
    hub, file = faulty[0], tmp_path / "fitted.toml"

    told = json.loads(fit(hub, "--out", file, "--data", "digits", "--json"))
    shown = fit(hub, "--out", file, "--data", "digits", "--devices", "8")

    assert {each["device"]: each["seconds_per_step"] for each in told["devices"]} == {
        name: {"value": pytest.approx(step_s), "spread": 0.0, "count": ANY, "error": 0.0}
        for name, step_s in PACES_S.items()
    }
    assert "scenario of 8 devices" in shown
    assert "up_bps is not told" in shown
    fitted = read_scenario(file)
    assert fitted.fleet.devices == 8
    assert len(fitted.device.classes) == 4
    overhead_s = told["fleet"]["overhead_s"]["value"]  # In this plan, over two steps.
    steps_s = [kind.step_s for kind in fitted.device.classes]
    assert steps_s == pytest.approx([s + overhead_s / 2 for s in sorted(PACES_S.values())], rel=0.1)
    assert fitted.run.rounds == 8
    assert "Devices as the hub of" in file.read_text(encoding="utf-8")


def test_the_command_says_what_it_lacks(
    faulty: tuple[Path, Observed], fit: Callable[..., str], tmp_path: Path
) -> None:
    """No record, no run of the name, no data to hold: each is one error with its remedy."""
    hub, file = faulty[0], tmp_path / "fitted.toml"

    with pytest.raises(ConfigError, match=r"no hub\.db"):
        fit(tmp_path, "--out", file)
    with pytest.raises(ConfigError, match="no run 'other'; there are known"):
        fit(hub, "--out", file, "--run", "other")
    with pytest.raises(ConfigError, match="--data"):
        fit(hub, "--out", file)
    assert not file.exists()
