"""The control of every comparison: each device trains by itself, and nothing is exchanged."""

import zlib
from collections.abc import Callable, Mapping

import numpy as np

from cloud.config import RunPlan
from federation.learning.evaluation import Tally, evaluate
from federation.learning.models import initial_weights
from federation.learning.training import train_locally
from federation.protocol.codec import Weights
from federation.protocol.messages import Capability, LocalPlan, ModelSpec
from optimizer.baselines import select_uniformly
from optimizer.selection import Candidates, Selection
from simulations.availability import select_available
from simulations.fleet import FleetData, device_levels
from simulations.presence.kinds import presence_of
from simulations.report import Result, RoundResult, versions
from simulations.scenario import Scenario


def train_alone(
    scenario: Scenario, data: FleetData, on_round: Callable[[RoundResult], None]
) -> tuple[Result, float]:
    """What devices learn without each other, and how well the worst does on its own data.

    All begin with the initial weights. A device trains in just those rounds in which the hub
    would ask it, as many steps, and goes on from its own weights; links, failures, liars and
    levels play no part. The accuracy of a round is the mean over devices, each with its own
    weights, on the held-out data.
    """
    plan = scenario.run
    spec = ModelSpec(name=plan.model.name, sizes=plan.model.sizes)
    initial = initial_weights(plan.model, plan.seed)
    untrained = evaluate(spec, initial, data.held_out)
    weights: dict[str, Weights] = dict.fromkeys(data.devices, initial)
    tallies: dict[str, Tally] = dict.fromkeys(data.devices, untrained)
    rows = []
    for number in range(1, plan.rounds + 1):
        selection = _select(scenario, data, number)
        losses = Tally()
        for device in selection.chosen:
            local = local_plan(plan, spec, number, device)
            trained = train_locally(weights[device], data.devices[device], local)
            weights[device] = trained.weights
            tallies[device] = evaluate(spec, trained.weights, data.held_out)
            report = trained.report
            losses += Tally(report.samples, report.correct, report.loss_sum)
        rows.append(_row(number, selection, tallies, losses))
        on_round(rows[-1])
    worst = min(
        evaluate(spec, weights[device], own).accuracy for device, own in data.devices.items()
    )
    return _result(scenario, rows, untrained.accuracy), worst


def local_plan(plan: RunPlan, spec: ModelSpec, number: int, device: str) -> LocalPlan:
    """How a device trains in this round: as long as in a federated run, with its own draws."""
    words = [plan.seed, number, zlib.crc32(device.encode())]
    training = plan.training
    return LocalPlan(
        model=spec,
        epochs=training.epochs,
        max_steps=training.max_steps,
        batch_size=training.batch_size,
        learning_rate=training.learning_rate,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
        seed=int(np.random.SeedSequence(words).generate_state(1)[0]),
    )


def _select(scenario: Scenario, data: FleetData, number: int) -> Selection:
    devices, plan = list(data.devices), scenario.run
    levels = device_levels(scenario.fleet)
    level_of = dict(zip(devices, levels, strict=True))
    candidates = Candidates(devices, lambda name: Capability(agent="alone", level=level_of[name]))
    presence = presence_of(scenario.availability, len(devices), scenario.seed)
    select = select_available(select_uniformly, presence, devices)
    rng = np.random.default_rng([plan.seed, number])
    return select(candidates, plan.policy.wanted, number, rng)


def _row(
    number: int, selection: Selection, tallies: Mapping[str, Tally], losses: Tally
) -> RoundResult:
    return RoundResult(
        round=number,
        status="closed",
        opened_s=0.0,
        closed_s=0.0,
        asked=len(selection.chosen),
        not_asked=selection.reasons(len(tallies)),
        devices=selection.chosen,
        training_loss=losses.mean_loss if losses.samples else None,
        accuracy=float(np.mean([tally.accuracy for tally in tallies.values()])),
        loss=float(np.mean([tally.mean_loss for tally in tallies.values()])),
    )


def _result(scenario: Scenario, rows: list[RoundResult], initial_accuracy: float) -> Result:
    return Result(
        status="finished",
        reason=f"all {len(rows)} rounds are done",
        seed=scenario.seed,
        virtual_s=0.0,
        rounds=tuple(rows),
        accuracy=rows[-1].accuracy,
        initial_accuracy=initial_accuracy,
        updates=0,
        refused={},
        letters_refused=0,
        drop_reasons={},
        bytes_up=0,
        bytes_down=0,
        wire_up_bytes=0,
        wire_down_bytes=0,
        model_sha256="",
        run=scenario.run,
        versions=versions(),
    )
