"""Students learn from a teacher that is elsewhere: its answers are labels of their samples."""

import hashlib
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch.nn import functional

from federation.datasets.cached import load
from federation.errors import ConfigError, TrainingError
from federation.learning.cohort import Task, train_cohort
from federation.learning.data import LocalData
from federation.learning.distillation import answers, first_student, student_of
from federation.learning.evaluation import evaluate
from federation.learning.export import export_onnx
from federation.learning.losses.objective import Pass
from federation.learning.losses.taught import feature_imitation, logit_distillation
from federation.learning.methods import METHODS
from federation.learning.models import build_model, forward_pass, initial_weights, load_weights
from federation.learning.training import LocalResult, train_locally
from federation.protocol.codec import Weights, encode
from federation.protocol.messages import LocalPlan, ModelSpec
from twin.students import Student, enrol, school
from twin.teacher import Phase, Schooling, TeacherNote, keep, recall, taught_from, train_teacher

TEACHER = ModelSpec(name="mlp", sizes={"inputs": 64, "hidden": 24, "hidden2": 12, "classes": 5})
STUDENTS = {
    "d1": ModelSpec(name="mlp", sizes={"inputs": 64, "hidden": 8, "classes": 5}),
    "d2": ModelSpec(name="mlp", sizes={"inputs": 64, "hidden": 9, "hidden2": 7, "classes": 5}),
    "d3": ModelSpec(
        name="cnn", sizes={"height": 8, "width": 8, "filters": 2, "hidden": 6, "classes": 5}
    ),
}
SCHOOLING = Schooling(phases=(Phase(3, 0.05), Phase(2, 0.01)), batch_size=8)


def samples(count: int, seed: int = 0, classes: int = 5) -> LocalData:
    """Classes that differ in mean, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, count)
    centres = np.random.default_rng(99).standard_normal((5, 64))
    x = centres[y] + 0.5 * rng.standard_normal((count, 64))
    return LocalData(x.astype(np.float32), y)


MIRRORS = {
    "d1": samples(30, 1, classes=2),
    "d2": samples(21, 2, classes=4),
    "d3": samples(17, 3),
}


def plan_of(model: ModelSpec, method: str, **changes: Any) -> LocalPlan:
    plan = LocalPlan(model=model, method=method, epochs=2, batch_size=8, learning_rate=0.02)
    return msgspec.structs.replace(plan, momentum=0.5, weight_decay=0.01, seed=3, **changes)


def taught_task(device: str, method: str, said: Weights | None = None) -> Task:
    teacher_weights = initial_weights(TEACHER, 5)
    data, model = MIRRORS[device], STUDENTS[device]
    told = answers(TEACHER, teacher_weights, data) if said is None else said
    if method == "simkd":
        model = student_of(model, TEACHER)
        first = first_student(model, teacher_weights, 1)
    else:
        first = initial_weights(model, 1)
    return Task({**first, **told}, data, plan_of(model, method))


def test_simkd_is_the_squared_distance_of_features() -> None:
    """The loss is the mean square of what features lack, found by hand, plus labels if wanted."""
    rng = torch.Generator().manual_seed(0)
    features, known = torch.randn(6, 4, generator=rng), torch.randn(9, 4, generator=rng)
    logits, labels = torch.randn(6, 3, generator=rng), torch.tensor([0, 2, 1, 1, 0, 2])
    places = torch.tensor([8, 0, 3, 3, 1, 7])
    done = Pass(torch.empty(6, 0), labels, features, logits, indices=places)

    counts = torch.tensor([3.0, 4.0, 2.0])
    plain = feature_imitation(known, counts, 2.0, 0.0)(done)
    with_labels = feature_imitation(known, counts, 2.0, 0.3)(done)

    expected = 2.0 * ((features - known[places]) ** 2).mean() / (known**2).mean()
    torch.testing.assert_close(plain, expected)
    entropy = functional.cross_entropy(logits, labels)
    torch.testing.assert_close(with_labels, expected + 0.3 * entropy)


def test_logit_distillation_is_the_papers() -> None:
    """The loss is cross entropy + T^2 KL(teacher || student) at temperature T, by hand."""
    rng = torch.Generator().manual_seed(0)
    logits, known = torch.randn(4, 3, generator=rng), torch.randn(5, 3, generator=rng)
    labels, places = torch.tensor([0, 2, 1, 1]), torch.tensor([4, 0, 2, 2])
    done = Pass(torch.empty(4, 0), labels, torch.empty(4, 0), logits, indices=places)

    loss = logit_distillation(known, 4.0, 1.0)(done)

    p, q = (known[places] / 4).softmax(1), (logits / 4).softmax(1)
    kl = (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(loss, functional.cross_entropy(logits, labels) + 16 * kl)


@pytest.mark.parametrize("method", ["simkd", "logit_kd"])
def test_students_of_unlike_size_and_samples_train_side_by_side(method: str) -> None:
    """A cohort of three architectures, two devices each, gives what each would get alone."""
    tasks = [taught_task(device, method) for device in STUDENTS]
    longer = taught_task("d1", method)
    data = samples(41, 8)
    said = answers(TEACHER, initial_weights(TEACHER, 5), data)
    tasks.append(Task({**longer.weights, **said}, data, longer.plan))

    found = train_cohort(tasks, accelerator="cpu")

    for task, result in zip(tasks, found, strict=True):
        alone = train_locally(task.weights, task.data, task.plan)
        assert isinstance(result, LocalResult), result
        assert list(result.weights) == list(alone.weights)
        for name, tensor in alone.weights.items():
            np.testing.assert_allclose(result.weights[name], tensor, rtol=1e-5, atol=1e-5)
        assert not result.state
        assert not alone.state


def test_the_teachers_classifier_stays_the_teachers() -> None:
    """No step of SimKD changes the reused classifier, weight decay and momentum included."""
    task = taught_task("d2", "simkd")

    alone = train_locally(task.weights, task.data, task.plan)
    [together] = train_cohort([task], accelerator="cpu")

    assert isinstance(together, LocalResult)
    for name in ("classifier.weight", "classifier.bias"):
        np.testing.assert_array_equal(alone.weights[name], task.weights[name])
        np.testing.assert_array_equal(together.weights[name], task.weights[name])
    assert not np.array_equal(alone.weights["projector.weight"], task.weights["projector.weight"])


def test_answers_are_what_the_teacher_says_of_each_sample() -> None:
    """Row by row, answers are the teacher's features and logits, whatever the batch."""
    weights, data = initial_weights(TEACHER, 5), MIRRORS["d2"]

    told = answers(TEACHER, weights, data, batch=4)

    run = forward_pass(load_weights(build_model(TEACHER), weights))
    features, logits, _ = run(torch.tensor(data.x))
    torch.testing.assert_close(torch.tensor(told["taught/features"]), features.detach())
    torch.testing.assert_close(torch.tensor(told["taught/logits"]), logits.detach())


@pytest.mark.parametrize("together", [False, True])
def test_answers_of_other_samples_are_refused(together: bool) -> None:
    """A device whose samples are not those the teacher spoke of does not train on the answers."""
    task = taught_task("d1", "simkd")
    other = Task(task.weights, samples(30, 44, classes=2), task.plan)

    if together:
        [found] = train_cohort([other], accelerator="cpu")
        assert isinstance(found, TrainingError)
        assert "of other samples" in str(found)
    else:
        with pytest.raises(TrainingError, match="of other samples"):
            train_locally(other.weights, other.data, other.plan)


def test_too_few_answers_are_refused() -> None:
    """Answers with a row missing are refused before the first step."""
    task = taught_task("d1", "logit_kd")
    short = {**task.weights, "taught/logits": task.weights["taught/logits"][:-1]}

    with pytest.raises(TrainingError, match="a row for each of 30 samples"):
        train_locally(short, task.data, task.plan)


def test_a_teacher_of_another_width_is_refused() -> None:
    """A student of other classes or features than its teacher's is told so, alone or not."""
    for method, what in (("simkd", "features"), ("logit_kd", "logits")):
        task = taught_task("d1", method)
        for shape in ((30, 13), (30,), (30, 13, 2)):
            other = {**task.weights, f"taught/{what}": np.zeros(shape, np.float32)}

            [found] = train_cohort([Task(other, task.data, task.plan)], accelerator="cpu")

            assert isinstance(found, TrainingError)
            with pytest.raises(TrainingError, match="the teacher has"):
                train_locally(other, task.data, task.plan)


@pytest.mark.parametrize("method", ["simkd", "logit_kd"])
def test_without_answers_a_student_learns_alone(method: str) -> None:
    """Without a teacher's answers the update is, to the bit, that of learning alone."""
    task = taught_task("d3", method, said={})
    plain = msgspec.structs.replace(task.plan, method="fedavg")

    found = train_locally(task.weights, task.data, task.plan)

    assert encode(found.weights) == encode(train_locally(task.weights, task.data, plain).weights)


def test_an_echo_says_nothing_of_answers() -> None:
    """A plan without epochs gives the student back, and nothing of what the teacher said."""
    task = taught_task("d1", "simkd")

    echo = train_locally(task.weights, task.data, msgspec.structs.replace(task.plan, epochs=0))

    assert echo.weights.keys() == {name for name in task.weights if "/" not in name}
    assert not echo.state


def test_the_teachers_step_is_that_of_fedsgd_over_the_twins() -> None:
    """A full-batch step on the pool is the mean of the twins' own steps, weighted by samples."""
    schooling = Schooling(phases=(Phase(1, 0.1),), batch_size=0, weight_decay=0.0, seed=4)

    teacher = train_teacher(MIRRORS, TEACHER, schooling)

    first = initial_weights(TEACHER, 4)
    total = sum(data.samples for data in MIRRORS.values())
    expected = {name: np.zeros(tensor.shape) for name, tensor in first.items()}
    for data in MIRRORS.values():
        plan = LocalPlan(model=TEACHER, batch_size=data.samples, learning_rate=0.1, seed=4)
        for name, tensor in train_locally(first, data, plan).weights.items():
            expected[name] += data.samples / total * tensor
    for name, tensor in expected.items():
        np.testing.assert_allclose(teacher.weights[name], tensor, rtol=1e-5, atol=1e-6)


def test_a_taught_student_knows_classes_it_never_saw(tmp_path: Path) -> None:
    """Of digits a device has three classes; its student, taught, knows more of the ten."""
    digits = load("digits", cache=tmp_path)
    known = LocalData(digits.x[:500], digits.y[:500])
    test = LocalData(digits.x[500:], digits.y[500:])
    groups = {"d1": [0, 1, 2], "d2": [3, 4, 5, 6], "d3": [7, 8, 9]}
    mirrors = {d: known.take(np.flatnonzero(np.isin(known.y, g))) for d, g in groups.items()}
    large = ModelSpec(name="mlp", sizes={"hidden": 64})
    small = ModelSpec(name="mlp", sizes={"hidden": 32})
    schooling = Schooling(phases=(Phase(20, 0.02),), batch_size=32)
    teacher = train_teacher(mirrors, large, schooling)
    first = enrol({"d1": small}, teacher, "simkd", 0)

    taught = school(first, teacher, mirrors, "simkd", schooling)["d1"]

    plan = schooling.plans(small, mirrors["d1"].samples)[0]
    alone = train_locally(initial_weights(small, 0), mirrors["d1"], plan).weights
    own = evaluate(small, alone, test).accuracy
    assert own < 0.35
    assert evaluate(taught.model, taught.weights, test).accuracy > own + 0.15


def test_no_student_hears_of_another() -> None:
    """A student's weights are the same bits whatever the other students' data are."""
    teacher = train_teacher(MIRRORS, TEACHER, SCHOOLING)
    first = enrol(STUDENTS, teacher, "simkd", 0)
    changed = {**MIRRORS, "d2": samples(21, 55, classes=4)}

    one = school(first, teacher, MIRRORS, "simkd", SCHOOLING)
    other = school(first, teacher, changed, "simkd", SCHOOLING)

    assert encode(one["d1"].weights) == encode(other["d1"].weights)
    assert encode(one["d2"].weights) != encode(other["d2"].weights)


def test_a_student_is_exported_like_any_model() -> None:
    """A student with its projector passes the parity check of ONNX, so devices can run it."""
    model = student_of(STUDENTS["d3"], TEACHER)
    student = Student(model, first_student(model, initial_weights(TEACHER, 5), 0))

    example = MIRRORS["d3"].x[:4].reshape(4, 1, 8, 8)

    onnx = export_onnx(student.model, student.weights, example=example)

    assert len(onnx) > 1000


class Shelf:
    """Contents by digest, in memory."""

    def __init__(self) -> None:
        self.kept: dict[str, bytes] = {}

    def put(self, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        self.kept[digest] = data
        return digest

    def read(self, digest: str) -> bytes:
        return self.kept[digest]


def test_a_teacher_is_kept_with_whose_data_it_knows() -> None:
    """A teacher comes back as it was, and can be found by the digest of data deleted since."""
    shelf = Shelf()
    teacher = train_teacher(MIRRORS, TEACHER, Schooling(phases=(Phase(1, 0.02),)))

    found = recall(keep(teacher, shelf), shelf)

    assert encode(found.weights) == encode(teacher.weights)
    assert set(found.taught_by) == set(MIRRORS)
    note = TeacherNote(model=found.model, weights="", taught_by=dict(found.taught_by))
    assert taught_from([note], found.taught_by["d2"]) == [note]
    assert taught_from([note], "0" * 64) == []


def test_who_cannot_be_a_student_is_told() -> None:
    """An architecture without projector, and a method that teaches nobody, are refused."""
    teacher = train_teacher(MIRRORS, TEACHER, Schooling(phases=(Phase(1, 0.02),)))

    with pytest.raises(ConfigError, match="'linear' has no projector"):
        student_of(ModelSpec(name="linear"), TEACHER)
    with pytest.raises(ConfigError, match="other numbers of classes"):
        student_of(ModelSpec(name="mlp", sizes={"classes": 4}), TEACHER)
    with pytest.raises(ConfigError, match="'fedavg' teaches no students"):
        enrol(STUDENTS, teacher, "fedavg", 0)
    with pytest.raises(TrainingError, match="no device mirrors"):
        train_teacher({}, TEACHER, SCHOOLING)


@pytest.mark.parametrize("name", sorted(n for n, m in METHODS.items() if m.stands_in))
def test_methods_that_allow_a_stand_in_leave_nothing_on_the_device(name: str) -> None:
    """Where a digital agent may step in, a training leaves no memory that it would lack."""
    method, model = METHODS[name], STUDENTS["d1"]
    weights = initial_weights(model, 0)
    state = method.state(weights, method.settings({}))

    found = train_locally({**weights, **state}, MIRRORS["d1"], plan_of(model, name))

    assert not found.memory
