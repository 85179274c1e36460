"""The cascade on people nobody has seen: how much of the gap it closes, and for how much asking."""

import dataclasses
import functools
import hashlib
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.claims import CACHE, Claim, Options, claim, main
from benchmarks.fleet import ONE_THREAD, running
from benchmarks.processes import wait_until
from cloud.broker import start_broker
from cloud.trainers.loop import Place
from cloud.trainers.plans import TrainPlan
from cloud.trainers.publishing import MODELS, publish
from cloud.trainers.ready import find_plan
from cloud.trainers.running import Setting, run_training
from edge_agent.asking import HubAsker
from edge_agent.calibration import fit_temperature, probabilities
from edge_agent.cascade import Advice, Answered, Cascade, CascadeState, NoAdvice, Student
from edge_agent.cascade_config import CascadeConfig
from edge_agent.cascade_report import CascadeReport
from edge_agent.config import AgentConfig
from edge_agent.inference import Predictor
from federation.config import read_config
from federation.datasets.cached import DataSet, cache_folder, load
from federation.errors import HeadwaterError
from federation.learning.aggregation.ballot import Ballot, Vote
from federation.learning.aggregation.mean import weighted_mean
from federation.learning.export import export_onnx
from federation.learning.models import initial_weights
from federation.learning.training import train_locally
from federation.protocol.clock import steady_clock
from moe_serving.repository import versions
from simulations.demo.wrist import HELD_OUT, PLAN, SPEC, scale_motion, wrist_fleet
from simulations.processes import Process

ROUNDS = 20
LABELLED = 6
"""Windows of each class with which a wearer calibrates; they are not tested on."""

QUICK_COPIES = 8
GAP_LEFT, SHARE = 0.1, 0.3
ALLOWED = 0.29
"""What a device is configured with: a start in doubt may overdraw it by a few windows."""

START_S = 180.0
DEADLINE_S = 20.0
"""Generous, since a busy machine shall not decide the figures; a missed one is counted."""


@dataclass(frozen=True, slots=True, eq=False)
class Wearer:
    """Somebody no model has seen: windows that come one after another, and some with labels."""

    name: str
    x: NDArray[np.float32]
    y: NDArray[np.int64]
    labelled_x: NDArray[np.float32]
    labelled_y: NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Told:
    """What a wearer was told, whether it was right, and what it took."""

    right: NDArray[np.bool_]
    report: CascadeReport


def measure(options: Options) -> list[Claim]:
    """A federated student on the wrist, a mixture of experts at the hub, three people unseen."""
    found = load("watch", cache=cache_folder(os.environ))
    options.tell(f"student: {ROUNDS} rounds over the demo's ten devices")
    model = options.folder / "student.onnx"
    model.write_bytes(federated(found))
    repository = _experts(options)
    wearers = [_wearer(found, name) for name in HELD_OUT]
    with _served(options, repository) as (url, server):
        asks = {w.name: _asker(url, options.folder, w.name) for w in wearers}
        for ask in asks.values():
            ask.__enter__()
        try:
            return _claims(options, wearers, Predictor(model), asks, found.labels, server)
        finally:
            for ask in asks.values():
                ask.__exit__(None, None, None)


def federated(found: DataSet) -> bytes:
    """The demo's model after federated averaging over the demo's fleet, as a device gets it."""
    fleet = wrist_fleet(found)
    weights = initial_weights(SPEC, PLAN.seed)
    for number in range(ROUNDS):
        plan = msgspec.structs.replace(PLAN, seed=PLAN.seed + number)
        votes = tuple(
            Vote(name, train_locally(weights, data, plan).weights, data.samples)
            for name, data in fleet.devices.items()
        )
        weights = weighted_mean(Ballot(weights, votes)).weights
    return export_onnx(SPEC, weights, example=fleet.held_out.x[:8], labels=found.labels)


def _experts(options: Options) -> Path:
    """The repository with the ready plan's model, trained if it was not before."""
    file = find_plan(Path("watch"))
    plan = read_config(file, TrainPlan)
    if options.is_quick:
        data = msgspec.structs.replace(plan.data, copies=QUICK_COPIES)
        plan = msgspec.structs.replace(plan, data=data)
    told = hashlib.sha256(file.read_bytes() + bytes([plan.data.copies])).hexdigest()
    home = CACHE / f"benchmark-experts-{told[:12]}"
    if not versions(home / MODELS, plan.name):
        options.tell("experts: training the ready plan `watch`; kept for the next time")
        setting = Setting(home / "training", cache_folder(os.environ), Place(), torch.device("cpu"))
        outcome = run_training(plan, setting)
        publish(plan, outcome.task, outcome.weights, home, steady_clock()())
    return home / MODELS


def _wearer(found: DataSet, name: str) -> Wearer:
    """One person's windows in an order drawn once; the first of each class have labels."""
    if found.client is None:
        raise HeadwaterError("watch has lost its people; fetch it again")
    mine = np.flatnonzero(found.client == found.client_names.index(name))
    mine = np.random.default_rng(0).permutation(mine)
    classes = range(len(found.labels))
    known = np.concatenate([mine[found.y[mine] == c][:LABELLED] for c in classes])
    rest = mine[~np.isin(mine, known)]
    return Wearer(name, found.x[rest], found.y[rest], found.x[known], found.y[known])


@contextmanager
def _served(options: Options, repository: Path) -> Iterator[tuple[str, Process]]:
    """A broker, and a server of the models as an operator would start it; the broker's address."""
    broker = start_broker(options.broker, options.folder / "broker")
    settings = options.folder / "moe.toml"
    settings.write_text(
        f"repository = '{repository}'\nthreads = 1\n[http]\nport = 0\n"
        f"[mqtt]\nbroker = '{broker.url}'\nnamespace = 'bench'\n"
    )
    command = [sys.executable, "-m", "moe_serving", "serve", str(settings)]
    server = Process(command, options.folder / "moe.log", ONE_THREAD)
    try:
        with running([server]):
            yield broker.url, server
    finally:
        broker.stop()


def _asker(url: str, folder: Path, name: str) -> HubAsker:
    settings = CascadeConfig(model="watch", deadline_s=DEADLINE_S)
    config = AgentConfig(device=name, broker=url, folder=folder, namespace="bench")
    clock, rng = steady_clock(), random.Random(name)
    return HubAsker(config, settings, password="", clock=clock, rng=rng)


def _claims(
    options: Options,
    wearers: list[Wearer],
    predictor: Predictor,
    asks: dict[str, HubAsker],
    labels: tuple[str, ...],
    server: Process,
) -> list[Claim]:
    predict = functools.partial(_predict, predictor)
    students = {
        w.name: Student(
            predict,
            labels,
            fit_temperature(predict(w.labelled_x), w.labelled_y),
            (w.labelled_x, w.labelled_y),
        )
        for w in wearers
    }
    probe = functools.partial(_is_answered, asks[wearers[0].name], wearers[0].x[:1])
    wait_until(probe, "an answer of the server", patience_s=START_S, every_s=0.5)
    options.tell("the experts alone, then the cascade, then with the hub away")
    experts = np.concatenate([_alone(asks[w.name], w) for w in wearers])
    run = functools.partial(_cascade, labels=labels)
    told = [run(students[w.name], asks[w.name], w) for w in wearers]
    bare = {w.name: dataclasses.replace(students[w.name], labelled=None) for w in wearers}
    without = {
        "no labels to begin with": [run(bare[w.name], asks[w.name], w) for w in wearers],
        "no correction learned": [
            run(bare[w.name], asks[w.name], w, corrects=False) for w in wearers
        ],
    }
    server.stop()
    away = [run(bare[w.name], asks[w.name], w, deadline_s=0.5) for w in wearers]
    labelled = [run(students[w.name], asks[w.name], w, deadline_s=0.5) for w in wearers]
    sure = [probabilities(predict(w.x), students[w.name].temperature) for w in wearers]
    return [
        *_accuracy(wearers, sure, experts, told),
        *_without(wearers, sure, experts, without),
        *_cost(told),
        *_away(wearers, sure, away, labelled),
    ]


def _predict(predictor: Predictor, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """The student's logits; it learned from windows in these units."""
    return predictor.predict(scale_motion(x))


def _is_answered(ask: HubAsker, x: NDArray[np.float32]) -> bool:
    return isinstance(ask(x, 2.0), Advice)


def _alone(ask: HubAsker, wearer: Wearer) -> NDArray[np.bool_]:
    """Whether the hub's model is right about each window, asked about all of them."""
    right = []
    for at in range(0, len(wearer.x), 16):
        said = ask(wearer.x[at : at + 16], DEADLINE_S)
        if isinstance(said, NoAdvice):
            raise HeadwaterError(f"the server did not answer: {said.reason}; see its log")
        right.append(said.logits.argmax(axis=1) == wearer.y[at : at + 16])
    return np.concatenate(right)


def _cascade(
    student: Student,
    ask: HubAsker,
    wearer: Wearer,
    *,
    labels: tuple[str, ...],
    deadline_s: float = DEADLINE_S,
    corrects: bool = True,
) -> Told:
    """One window after another, as a device measures them; the hub is new to it."""
    config = CascadeConfig(model="watch", share=ALLOWED, deadline_s=deadline_s, corrects=corrects)
    cascade = Cascade(
        student,
        ask,
        config,
        state=CascadeState(),
        clock=steady_clock(),
        rng=random.Random(wearer.name),
    )
    said: list[Answered] = []
    for at in range(len(wearer.x)):
        said += cascade.answer(wearer.x[at : at + 1])
    right = np.array([labels.index(a.label) for a in said]) == wearer.y
    return Told(right, cascade.report())


def _accuracy(
    wearers: list[Wearer],
    sure: list[NDArray[np.float64]],
    experts: NDArray[np.bool_],
    told: list[Told],
) -> list[Claim]:
    y, shares = np.concatenate([w.y for w in wearers]), np.concatenate(sure)
    student = shares.argmax(axis=1) == y
    cascade = np.concatenate([each.right for each in told])
    asked = sum(each.report.asked for each in told) / len(y)
    alone, best, ours = (100 * float(1 - right.mean()) for right in (student, experts, cascade))
    doubtful = np.argsort(shares.max(axis=1))[: round(asked * len(y))]
    hindsight = np.where(np.isin(np.arange(len(y)), doubtful), experts, student)
    blind = asked * best + (1 - asked) * alone
    known = 100 * float(1 - hindsight.mean())
    return [
        claim("student alone, wrong", alone, "%", peer="experts alone", peer_value=best),
        claim("cascade, wrong", ours, "%", peer="student alone", peer_value=alone),
        claim("as many asked, drawn blindly, wrong", blind, "%", peer="cascade", peer_value=ours),
        claim("as many, the least sure in hindsight, wrong", known, "%", peer="cascade",
              peer_value=ours),
        claim("gap to the experts left open", (ours - best) / max(1e-9, alone - best), "of it",
              goal=GAP_LEFT),
        claim("windows sent up", asked, "of all", goal=SHARE),
    ]  # fmt: skip


def _without(
    wearers: list[Wearer],
    sure: list[NDArray[np.float64]],
    experts: NDArray[np.bool_],
    runs: dict[str, list[Told]],
) -> list[Claim]:
    """The gap that is left open when a part is taken away."""
    y = np.concatenate([w.y for w in wearers])
    alone = float(1 - (np.concatenate(sure).argmax(axis=1) == y).mean())
    best = float(1 - experts.mean())
    found = []
    for name, told in runs.items():
        wrong = float(1 - np.concatenate([each.right for each in told]).mean())
        asked = sum(each.report.asked for each in told) / len(y)
        gap = (wrong - best) / max(1e-9, alone - best)
        found += [
            claim(f"{name}: gap left open", gap, "of it", goal=GAP_LEFT),
            claim(f"{name}: windows sent up", asked, "of all", goal=SHARE),
        ]
    return found


def _cost(told: list[Told]) -> list[Claim]:
    reports = [each.report for each in told]
    asked, heard = sum(r.asked for r in reports), sum(r.heard for r in reports)
    both = sum(r.up_bytes + r.down_bytes for r in reports)
    windows = sum(r.windows for r in reports)
    local = 1000 * float(np.median([r.local_s for r in reports]))
    hub = 1000 * float(np.median([r.hub_s for r in reports]))
    sure = [r.threshold for r in reports]
    return [
        claim("a window at the hub, both ways", both / max(1, asked), "bytes",
              peer="the window in 16 bits", peer_value=1200.0),
        claim("bytes over all windows", both / windows, "bytes"),
        claim("the device's own part of an answer", local, "ms"),
        claim("a question and its answer, median", hub, "ms"),
        claim("the hub agreed", sum(r.agreed for r in reports) / max(1, heard), "of asked"),
        claim("learned threshold, least of the wearers", min(sure), "confidence",
              peer="the greatest", peer_value=max(sure)),
        claim("questions without answer", sum(r.unanswered for r in reports), "windows", goal=0),
    ]  # fmt: skip


def _away(
    wearers: list[Wearer],
    sure: list[NDArray[np.float64]],
    away: list[Told],
    labelled: list[Told],
) -> list[Claim]:
    """With the server ended: the student's answers, and what waiting for nobody cost.

    With labels the device corrects itself before anybody is asked: what the cascade adds to that
    is the hub's part.
    """
    y = np.concatenate([w.y for w in wearers])
    alone = 100 * float(1 - (np.concatenate(sure).argmax(axis=1) == y).mean())
    wrong = 100 * float(1 - np.concatenate([each.right for each in away]).mean())
    taught = 100 * float(1 - np.concatenate([each.right for each in labelled]).mean())
    waits = sum(each.report.questions for each in away)
    return [
        claim("hub away, wrong", wrong, "%", peer="student alone", peer_value=alone, goal=alone),
        claim(
            "hub away, corrected by the labels alone, wrong",
            taught,
            "%",
            peer="student alone",
            peer_value=alone,
        ),
        claim("hub away, deadlines waited for", waits / len(away), "a wearer"),
    ]


if __name__ == "__main__":
    main("cascade", measure)
