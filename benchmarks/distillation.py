"""Students of different architectures and their twins' teacher, beside learning otherwise."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from benchmarks.claims import Claim, Options, claim, main
from federation.datasets.cached import DataSet, cache_folder, load
from federation.errors import DataError
from federation.learning.aggregation.ballot import Ballot, Vote
from federation.learning.aggregation.mean import weighted_mean
from federation.learning.cohort import Task, train_cohort
from federation.learning.data import LocalData
from federation.learning.evaluation import evaluate
from federation.learning.models import initial_weights
from federation.learning.partitions import group_partition, iid_partition
from federation.learning.training import torch_threads
from federation.protocol.messages import LocalPlan, ModelSpec
from twin.students import Student, enrol, school
from twin.teacher import Phase, Schooling, Teacher, train_teacher, trained

LABELS_TOO = "simkd + labels"
WAYS = ("own data only", "logit_kd", "simkd", LABELS_TOO, "fedavg")
PAPER = {"own data only": (18.89, 75.50), "simkd": (26.65, 89.28), "fedavg": (1.32, 5.25)}
"""The paper's means over four students, disjoint classes of CIFAR-100 (Tables 1 and 2), in %."""

PHASES = (Phase(30, 0.02), Phase(10, 0.004), Phase(10, 8e-4))
"""Half the paper's epochs; its first rate, 0.05, is too much for a small CNN and logit KD."""

SHORT = (Phase(30, 0.03), Phase(10, 0.006))


@dataclass(frozen=True, slots=True)
class Study:
    """A data set, its users' students and their teacher. `split` gives (training, test) places.

    FedAvg has `rounds` of 3 epochs.
    """

    name: str
    teacher: ModelSpec
    students: tuple[ModelSpec, ...]
    split: Callable[[DataSet, np.random.Generator], tuple[np.ndarray, np.ndarray]]
    schooling: Schooling
    rounds: int = 30


@dataclass(frozen=True, slots=True)
class Scores:
    """Accuracy in %, a mean over users: on all classes, and on those each user has."""

    full: float
    private: float


def split_digits(data: DataSet, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Three quarters to learn from, a quarter to be tested on."""
    order = rng.permutation(len(data.y))
    cut = len(order) * 3 // 4
    return order[:cut], order[cut:]


def split_watch(data: DataSet, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """As the digits, of every second window, since neighbours overlap by half."""
    order = 2 * rng.permutation(len(data.y) // 2)
    cut = len(order) * 3 // 4
    return order[:cut], order[cut:]


def _model(name: str, **sizes: int) -> ModelSpec:
    return ModelSpec(name=name, sizes=sizes)


_SMALL_CNN = _model("cnn", height=8, width=8, filters=6, hidden=64)

DIGITS = Study(
    "digits",
    _model("mlp", hidden=256, hidden2=128),
    (
        _model("mlp", hidden=64),
        _model("mlp", hidden=48, hidden2=32),
        _SMALL_CNN,
        _model("mlp", hidden=64),
    ),
    split_digits,
    Schooling(phases=PHASES, batch_size=32),
)
WATCH = Study(
    "watch",
    _model("conv1d", filters=32),
    (
        _model("conv1d", filters=8),
        _model("conv1d", filters=16),
        _model("mlp", inputs=600, hidden=64, classes=7),
    ),
    split_watch,
    Schooling(phases=SHORT, batch_size=32),
    rounds=15,
)


def measure(options: Options) -> list[Claim]:
    """SimKD and logit KD against learning alone and FedAvg, under disjoint classes and IID.

    Each user has other classes than the others; students differ in architecture. Errors are
    means over users and seeds: "full" on all classes, "private" on those the user has. The paper's
    pattern is beside them; goals are those of issue 5. FedAvg averages the first student's
    architecture over 30 rounds of 3 epochs (watch: 15).
    """
    seeds = range(1 if options.is_quick else 3)
    claims: list[Claim] = []
    with torch_threads(1):
        for study in (DIGITS,) if options.is_quick else (DIGITS, WATCH):
            try:
                data = load(study.name, cache=cache_folder(os.environ))
            except DataError as error:
                options.tell(f"{study.name} is left out: {error}")
                continue
            for disjoint in (True, False):
                found = [_one(study, data, seed, disjoint, options) for seed in seeds]
                claims += _claims(study.name, disjoint, found)
    return claims


def _one(
    study: Study, data: DataSet, seed: int, disjoint: bool, options: Options
) -> dict[str, Scores]:
    rng = np.random.default_rng(seed)
    train, test = (_samples(data, places) for places in study.split(data, rng))
    users = len(study.students)
    parts = (
        group_partition(train.y, users, users, rng)
        if disjoint
        else iid_partition(train.samples, users, rng)
    )
    mirrors = {f"user-{at}": train.take(part) for at, part in enumerate(parts)}
    # Who has which architecture changes with the seed, so that none is tied to a user's classes.
    models = {
        device: study.students[(at + seed) % users] for at, device in enumerate(sorted(mirrors))
    }
    schooling = _seeded(study.schooling, seed)
    teacher = train_teacher(mirrors, study.teacher, schooling)
    scores = {"teacher": _score(_same(mirrors, teacher), test, mirrors)}
    for way in WAYS:
        scores[way] = _score(
            _learn(way, models, teacher, mirrors, schooling, study.rounds), test, mirrors
        )
    split = "disjoint" if disjoint else "IID"
    told = ", ".join(f"{way} {s.full:.1f}/{s.private:.1f}" for way, s in scores.items())
    options.tell(f"{study.name}, {split}, seed {seed}: {told}")
    return scores


def _learn(
    way: str,
    models: Mapping[str, ModelSpec],
    teacher: Teacher,
    mirrors: Mapping[str, LocalData],
    schooling: Schooling,
    rounds: int,
) -> dict[str, Student]:
    match way:
        case "own data only":
            return _alone(models, mirrors, schooling)
        case "fedavg":
            return _averaged(models, mirrors, schooling.seed, rounds)
        case _:
            method, params = ("simkd", {"labels": 1.0}) if way == LABELS_TOO else (way, {})
            first = enrol(models, teacher, method, schooling.seed)
            return school(first, teacher, mirrors, method, schooling, params=params)


def _alone(
    models: Mapping[str, ModelSpec], mirrors: Mapping[str, LocalData], schooling: Schooling
) -> dict[str, Student]:
    students = {}
    for place, (device, model) in enumerate(models.items()):
        weights, data = initial_weights(model, schooling.seed + place), mirrors[device]
        for plan in schooling.plans(model, data.samples):
            [found] = train_cohort([Task(weights, data, plan)])
            weights = trained(found).weights
        students[device] = Student(model, weights)
    return students


def _averaged(
    models: Mapping[str, ModelSpec], mirrors: Mapping[str, LocalData], seed: int, rounds: int
) -> dict[str, Student]:
    model = next(iter(models.values()))
    weights = initial_weights(model, seed)
    for number in range(rounds):
        tasks = [
            Task(weights, data, _fedavg_plan(model, 1000 * number + place))
            for place, data in enumerate(mirrors.values())
        ]
        votes = tuple(
            Vote(device, trained(found).weights, data.samples)
            for (device, data), found in zip(mirrors.items(), train_cohort(tasks), strict=True)
        )
        weights = weighted_mean(Ballot(weights, votes, {})).weights
    return {device: Student(model, weights) for device in models}


def _fedavg_plan(model: ModelSpec, seed: int) -> LocalPlan:
    return LocalPlan(
        model=model,
        epochs=3,
        batch_size=32,
        learning_rate=0.05,
        momentum=0.5,
        weight_decay=5e-4,
        seed=seed,
    )


def _same(mirrors: Mapping[str, LocalData], teacher: Teacher) -> dict[str, Student]:
    return {device: Student(teacher.model, teacher.weights) for device in mirrors}


def _score(
    students: Mapping[str, Student], test: LocalData, mirrors: Mapping[str, LocalData]
) -> Scores:
    full, private = [], []
    for device, student in students.items():
        own = np.flatnonzero(np.isin(test.y, np.unique(mirrors[device].y)))
        full.append(evaluate(student.model, student.weights, test).accuracy)
        private.append(evaluate(student.model, student.weights, test.take(own)).accuracy)
    return Scores(100 * fmean(full), 100 * fmean(private))


def _claims(study: str, disjoint: bool, found: list[dict[str, Scores]]) -> list[Claim]:
    """Errors in %, and for SimKD under disjoint classes the goals."""
    full = {way: 100 - fmean(each[way].full for each in found) for way in found[0]}
    private = {way: 100 - fmean(each[way].private for each in found) for way in found[0]}
    name = f"{study}, {'disjoint' if disjoint else 'IID'}"
    claims = []
    for kind, errors, column in (("full", full, 0), ("private", private, 1)):
        for way, error in errors.items():
            paper = 100 - PAPER[way][column] if disjoint and way in PAPER else None
            claims.append(
                claim(
                    f"{name}: {kind} error, {way}",
                    error,
                    "%",
                    peer="paper, CIFAR-100" if paper is not None else "",
                    peer_value=paper,
                )
            )
    return claims + (_goals(name, full, private) if disjoint else [])


def _goals(name: str, full: Mapping[str, float], private: Mapping[str, float]) -> list[Claim]:
    goals = (
        ("full", full, "own data only", -15.0),
        ("full", full, "logit_kd", -5.0),
        ("private", private, "own data only", 0.5),
        ("private", private, "fedavg", -10.0),
    )
    return [
        claim(
            f"{name}: {kind} error of {way} beside {peer}",
            errors[way],
            "%",
            peer=peer,
            peer_value=errors[peer],
            goal=errors[peer] + margin,
        )
        for way in ("simkd", LABELS_TOO)
        for kind, errors, peer, margin in goals
    ]


def _samples(data: DataSet, places: np.ndarray) -> LocalData:
    return LocalData(data.x[places], data.y[places])


def _seeded(schooling: Schooling, seed: int) -> Schooling:
    import msgspec

    return msgspec.structs.replace(schooling, seed=100 * seed)


if __name__ == "__main__":
    main("distillation", measure)
