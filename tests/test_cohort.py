import dataclasses
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.trainer import fulfil
from federation.errors import ConfigError, HeadwaterError
from federation.learning.cohort import Task, feed, train_cohort, training
from federation.learning.cohort.shuffling import Shuffles
from federation.learning.data import LocalData
from federation.learning.fulfilment import fulfil_all
from federation.learning.methods import METHODS
from federation.learning.models import initial_weights, input_shape
from federation.learning.training import LocalResult, train_locally
from federation.protocol.codec import Weights, decode, encode
from federation.protocol.messages import Assignment, Content, LocalPlan, ModelSpec, Uplink

SIZES = {
    "linear": {"inputs": 6, "classes": 5},
    "mlp": {"inputs": 6, "hidden": 8, "classes": 5},
    "cnn": {"height": 8, "width": 8, "filters": 2, "hidden": 6, "classes": 5},
    "conv1d": {"length": 20, "channels": 2, "filters": 4, "classes": 5},
    "deep_mlp": {"inputs": 6, "hidden1": 8, "hidden2": 5, "hidden3": 4, "classes": 5, "exits": 1},
    "fedlp_cnn": {"height": 16, "width": 16, "filters": 8, "hidden": 8, "classes": 5, "exits": 1},
    "rebafl_cnn": {"height": 16, "width": 16, "filters1": 2, "filters2": 3, "hidden": 6}
    | {"classes": 5},
}
OF_LEVELS = {"fedlp_hetero": 0, "full_depth_only": 0, "fedlp_exits": 1, "depthfl": 1}
"""Methods for models with levels, and whether all devices share the exits."""

MLP = ModelSpec(name="mlp", sizes=SIZES["mlp"])

SHARES = ((37, 3), (1, 5), (8, 1), (9, 2), (20, 5), (16, 3), (50, 4))
"""Samples and classes of clients that differ: below a batch, just above one, one class only."""


def samples(model: ModelSpec, count: int, classes: int = 5, seed: int = 0) -> LocalData:
    rng = np.random.default_rng(seed)
    x = 0.5 * rng.standard_normal((count, *input_shape(model)))
    return LocalData(x.astype(np.float32), rng.integers(0, classes, count))


def plan_of(model: ModelSpec, seed: int = 0, **changes: Any) -> LocalPlan:
    # Small steps: a ReLU that two roundings put on different sides must not decide a test.
    wanted = {"epochs": 2, "batch_size": 8, "learning_rate": 0.005, "momentum": 0.5}
    plan = LocalPlan(model=model, seed=seed, weight_decay=0.01)
    return msgspec.structs.replace(plan, **{**wanted, **changes})


def base_of(method: str, model: ModelSpec) -> Weights:
    """First weights, and what the method sends beside them, as if some rounds were over."""
    weights, rng = initial_weights(model, 1), np.random.default_rng(2)
    state = METHODS[method].state(weights, METHODS[method].settings({}))
    return weights | {n: (2.0 * rng.random(t.shape)).astype(np.float32) for n, t in state.items()}


def alone(task: Task) -> LocalResult:
    return train_locally(task.weights, task.data, task.plan, memory=task.memory)


def assert_close(found: object, expected: LocalResult) -> None:
    assert isinstance(found, LocalResult), found
    for name in ("weights", "state", "memory"):
        mine, theirs = getattr(found, name), getattr(expected, name)
        assert list(mine) == list(theirs)
        for tensor, value in theirs.items():
            np.testing.assert_allclose(mine[tensor], value, rtol=1e-5, atol=1e-5, err_msg=tensor)
    report, other = found.report, expected.report
    assert report.loss_sum == pytest.approx(other.loss_sum, rel=1e-4, abs=1e-4)
    assert (report.samples, report.steps) == (other.samples, other.steps)
    assert report.correct == other.correct


def assert_same_bits(found: object, expected: LocalResult) -> None:
    assert isinstance(found, LocalResult), found
    for name in ("weights", "state", "memory"):
        assert encode(getattr(found, name)) == encode(getattr(expected, name))
    assert found.report.loss_sum == expected.report.loss_sum
    assert found.report.correct == expected.report.correct


def two_rounds(method: str, model: ModelSpec) -> None:
    weights = base_of(method, model)
    memory: list[Weights] = [{} for _ in SHARES]
    for _ in range(2):
        tasks = [
            Task(weights, samples(model, count, classes, at), plan_of(model, at, method=method), m)
            for at, ((count, classes), m) in enumerate(zip(SHARES, memory, strict=True))
        ]

        found = train_cohort(tasks, accelerator="cpu")

        expected = [alone(task) for task in tasks]
        for mine, theirs in zip(found, expected, strict=True):
            assert_close(mine, theirs)
        memory = [theirs.memory for theirs in expected]


@pytest.mark.parametrize("method", sorted(METHODS.keys() - OF_LEVELS.keys()))
def test_every_method_trains_side_by_side(method: str) -> None:
    """Clients that differ in size and labels get what each would get alone, memory included."""
    two_rounds(method, MLP)


@pytest.mark.parametrize("method", OF_LEVELS)
def test_methods_of_levels_train_side_by_side(method: str) -> None:
    """So do the methods that need a model with levels and exits."""
    sizes = {**SIZES["deep_mlp"], "exits": OF_LEVELS[method]}
    two_rounds(method, ModelSpec(name="deep_mlp", sizes=sizes))


@pytest.mark.parametrize("name", sorted(SIZES))
def test_every_model_trains_side_by_side(name: str) -> None:
    """Every model of the zoo does, and with prototypes too, where features are looked at."""
    model = ModelSpec(name=name, sizes=SIZES[name])

    two_rounds("rebafl" if "rebafl" in METHODS and name != "deep_mlp" else "fedavg", model)


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    batch_size=st.integers(1, 20),
    epochs=st.integers(1, 3),
    max_steps=st.integers(0, 5),
    momentum=st.sampled_from([0.0, 0.9]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    method=st.sampled_from(["fedavg", "fedprox", "scaffold"]),
    seed=st.integers(0, 2**64 - 1),
)
def test_a_cohort_is_its_clients(
    sizes: list[int], seed: int, method: str, **numbers: int | float
) -> None:
    """Whatever the sizes and numbers, a client's result is that of training it alone."""
    model = ModelSpec(name="linear", sizes=SIZES["linear"])
    weights = base_of(method, model)
    tasks = [
        Task(
            weights,
            samples(model, count, seed=at),
            plan_of(model, (seed + at) % 2**64, method=method, **numbers),
        )
        for at, count in enumerate(sizes)
    ]

    found = train_cohort(tasks, accelerator="cpu")

    for mine, task in zip(found, tasks, strict=True):
        assert_close(mine, alone(task))


@given(seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 5), count=st.integers(1, 200))
def test_shuffles_are_those_of_numpy(seed: int, epoch: int, count: int) -> None:
    """An order drawn for many clients at once is that of NumPy's own seeding."""
    expected = np.random.default_rng([seed, epoch]).permutation(count)

    found = Shuffles([0, seed], epoch + 1).order(1, count, epoch)

    assert found.tolist() == expected.tolist()


def a_mixed_cohort() -> list[Task]:
    """Levels, widths, methods and numbers of many kinds, in no order."""
    deep = ModelSpec(name="deep_mlp", sizes=SIZES["deep_mlp"])
    specs = [
        msgspec.structs.replace(deep, sizes={**deep.sizes, "level": level, "narrow": narrow})
        for level, narrow in ((1, 0), (2, 0), (0, 0), (1, 0), (2, 0))
    ]
    whole = initial_weights(deep, 3)
    tasks = [
        Task(whole, samples(spec, 5 + at, seed=at), plan_of(spec, at, layers=("stage1.hidden",)))
        for at, spec in enumerate(specs)
    ]
    narrow = msgspec.structs.replace(MLP, sizes={**MLP.sizes, "narrow": 1})
    wide = initial_weights(MLP, 1)
    for at, (spec, rate) in enumerate(((MLP, 0.01), (narrow, 0.01), (MLP, 0.02), (narrow, 0.01))):
        wanted = plan_of(spec, at, learning_rate=rate)
        tasks.insert(2 * at, Task(wide, samples(spec, 11, seed=at), wanted))
    return tasks


def test_a_mixed_cohort_comes_back_in_order() -> None:
    """Tasks of different models, levels, widths and plans come in one cohort, in any order."""
    tasks = a_mixed_cohort()

    found = train_cohort(tasks, accelerator="cpu")

    for mine, task in zip(found, tasks, strict=True):
        assert_close(mine, alone(task))


def test_exact_gives_the_bits_of_training_alone() -> None:
    """With `exact`, weights, state, memory and report are those of `train_locally` to the bit."""
    tasks = a_mixed_cohort()

    found = train_cohort(tasks, exact=True)

    for mine, task in zip(found, tasks, strict=True):
        assert_same_bits(mine, alone(task))


def test_the_same_cohort_gives_the_same_bits() -> None:
    """A cohort trained again, with memory that was used before, gives identical results."""
    tasks = a_mixed_cohort()
    first = train_cohort(tasks, accelerator="cpu")
    kept = [encode(each.weights) for each in first if isinstance(each, LocalResult)]

    again = train_cohort(tasks, accelerator="cpu")

    assert [encode(each.weights) for each in again if isinstance(each, LocalResult)] == kept
    # What was handed out belongs to whoever got it: the second run did not write on it.
    assert [encode(each.weights) for each in first if isinstance(each, LocalResult)] == kept


def test_little_memory_changes_nothing_but_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for one model and one step at a time, results are the same within 1e-5."""
    weights = base_of("fedavg", MLP)
    tasks = [
        Task(weights, samples(MLP, count, seed=at), plan_of(MLP, at))
        for at, (count, _) in enumerate(SHARES)
    ]
    monkeypatch.setattr(training, "CPU_BYTES", 1)
    monkeypatch.setattr(feed, "LAID_OUT_BYTES", 1)

    found = train_cohort(tasks, accelerator="cpu")

    for mine, task in zip(found, tasks, strict=True):
        assert_close(mine, alone(task))


def broken_tasks(good: Task) -> dict[str, Task]:
    data, plan = good.data, good.plan
    outlier = LocalData(np.full_like(data.x, 3e38), data.y)
    foreign = {**good.weights, "hidden.bias": np.zeros(7, np.float32)}
    changed = dataclasses.replace
    return {
        "no local data": changed(good, data=LocalData(data.x[:0], data.y[:0])),
        "the loss is": changed(good, data=outlier),
        "labels run from": changed(good, data=LocalData(data.x, data.y + 4)),
        "samples have shape": changed(good, data=LocalData(data.x[:, :2], data.y)),
        "no model is called": changed(
            good, plan=msgspec.structs.replace(plan, model=ModelSpec(name="nothing"))
        ),
        "no method is called": changed(good, plan=msgspec.structs.replace(plan, method="nothing")),
        "out of range": changed(good, plan=msgspec.structs.replace(plan, learning_rate=-1.0)),
        "has mu =": changed(
            good, plan=msgspec.structs.replace(plan, method="fedprox", params={"mu": -1.0})
        ),
        "hidden.bias": changed(good, weights=foreign),
    }


def test_a_bad_client_gives_its_error_and_harms_no_other() -> None:
    """Errors stand in their places and say what training alone says; the others are well."""
    weights = base_of("fedavg", MLP)
    good = [Task(weights, samples(MLP, 9 + at, seed=at), plan_of(MLP, at)) for at in range(3)]
    bad = broken_tasks(good[0])

    found = train_cohort([good[0], *bad.values(), good[1], good[2]], accelerator="cpu")

    for said, (words, task) in zip(found[1:-2], bad.items(), strict=True):
        with pytest.raises(HeadwaterError) as refused:
            alone(task)
        assert isinstance(said, HeadwaterError)
        assert str(said) == str(refused.value)
        assert words in str(said)
    for mine, task in zip((found[0], *found[-2:]), good, strict=True):
        assert_close(mine, alone(task))


def test_a_plan_without_epochs_is_an_echo() -> None:
    """A task that asks for no epoch gets the base back as it is."""
    weights = base_of("fedavg", MLP)
    task = Task(weights, samples(MLP, 5), plan_of(MLP, epochs=0))

    (echo,) = train_cohort([task])

    assert_same_bits(echo, alone(task))


def test_the_threads_of_torch_are_left_as_they_were() -> None:
    """A cohort trains with the threads it is given, and hands back those it found."""
    before = torch.get_num_threads()

    train_cohort([], threads=before + 1)

    assert torch.get_num_threads() == before


@pytest.mark.parametrize("accelerator", ["tpu"] + ["cuda"] * (not torch.cuda.is_available()))
def test_an_accelerator_that_is_not_there_is_refused(accelerator: str) -> None:
    """What torch does not have is refused before anything is trained."""
    with pytest.raises(ConfigError, match="accelerator is"):
        train_cohort([], accelerator=accelerator)


def some_jobs() -> list[tuple[Assignment, bytes, LocalData, bytes]]:
    base = encode(base_of("scaffold", MLP))
    jobs = []
    for at, (count, classes) in enumerate(SHARES):
        uplink = Uplink(delta=True, top_k=0.5, residual=True) if at % 2 else Uplink(delta=True)
        wanted = plan_of(MLP, at, method="scaffold", uplink=uplink)
        assignment = an_assignment(f"attempt-{at}", wanted)
        data = samples(MLP, count, classes, at)
        memory = fulfil(assignment, base, data).memory
        jobs.append((assignment, base, data, memory))
    return jobs


def an_assignment(attempt: str, wanted: LocalPlan) -> Assignment:
    content = Content(digest="0" * 64, size=0, chunk_bytes=1)
    return Assignment(
        attempt=attempt, run="run", round=1, deadline_s=9.0, base=content, plan=wanted
    )


def test_fulfilling_all_exactly_is_fulfilling_each() -> None:
    """With `exact`, updates and memories are those of `fulfil`, to the byte."""
    jobs = some_jobs()

    found = fulfil_all(jobs, exact=True)

    expected = [fulfil(*job) for job in jobs]
    assert [(f.attempt, f.update, f.memory) for f in found] == [
        (e.attempt, e.update, e.memory) for e in expected
    ]


def test_fulfilling_all_is_fulfilling_each() -> None:
    """Updates agree within 1e-5, and a job that fails says so in its place."""
    jobs = some_jobs()
    assignment, _, data, _ = jobs[0]
    jobs = [(a, base, d, b"") for a, base, d, _ in jobs if not a.plan.uplink.residual]
    jobs[1:1] = [(assignment, b"no model", data, b"")]

    found = fulfil_all(jobs, accelerator="cpu")

    expected = [fulfil(*job) for job in jobs]
    assert found[1] == expected[1]
    assert found[1].failure
    like = decode(jobs[0][1])
    for mine, theirs in zip(found[:1] + found[2:], expected[:1] + expected[2:], strict=True):
        assert not mine.failure
        update, reference = (decode(each.update, like=like) for each in (mine, theirs))
        for name, tensor in reference.items():
            np.testing.assert_allclose(update[name], tensor, rtol=1e-4, atol=1e-5)
