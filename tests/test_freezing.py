"""Modules that have learned what they will stop training, and cost nothing more."""

from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch
import torch.distributed as dist
from msgspec.structs import replace as changed
from safetensors.torch import load_file
from torch import Tensor, nn

from cloud.config import ModelChoice
from cloud.trainers.checkpoints import Checkpoints
from cloud.trainers.freezing.activations import Activations
from cloud.trainers.freezing.chain import chain_of, even_cuts
from cloud.trainers.freezing.controller import QUEUED, Beside
from cloud.trainers.freezing.plasticity import Front, Mode, Rule, plasticity
from cloud.trainers.freezing.reference import Answer, Int8Linear, Question, Reference
from cloud.trainers.freezing.schedules import freeze_out_scale, freeze_out_times, front_at
from cloud.trainers.freezing.technique import Freezing
from cloud.trainers.loop import ALONE, Place, Trainer, learning_rate
from cloud.trainers.plans import (
    DataPlan,
    FreezingPlan,
    OptimizerPlan,
    ParallelPlan,
    SparsePlan,
    TrainPlan,
)
from cloud.trainers.running import Setting, run_training
from cloud.trainers.state import TrainingState
from cloud.trainers.task import Arrays, Task
from cloud.trainers.tasks.labelled import sum_of
from federation.errors import ConfigError
from moe_serving.layers.gating import Choice
from moe_serving.models.classifier import WindowClassifier
from moe_serving.models.config import ClassifierConfig, DecoderConfig
from moe_serving.models.decoder import DecoderLM
from tests.ranks import on_ranks

SAMPLES, BATCH = 96, 16
TIMES = FreezingPlan(rule="times", times=(0.25, 0.5))
PLAN = TrainPlan(
    name="small",
    data=DataPlan(set="digits"),
    moe=ClassifierConfig(
        n_channels=2,
        window_length=16,
        patch_length=4,
        n_classes=3,
        d_model=16,
        n_layers=3,
        n_heads=2,
        d_expert=8,
        n_experts=4,
    ),
    epochs=4,
    batch_size=BATCH,
    optimizer=OptimizerPlan(name="sgd", learning_rate=0.05, weight_decay=0.1, momentum=0.9),
    freezing=TIMES,
)


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Flatten()),
        nn.Linear(128, 3),
    )


def _task(model: nn.Module | None = None) -> Task:
    model = model or _network()
    rng = np.random.default_rng(0)
    x = rng.standard_normal((SAMPLES, 1, 8, 8), dtype=np.float32)
    data = Arrays(x, rng.integers(0, 3, SAMPLES))
    return Task(model=model, train=data, test=data, forward=lambda x: (model(x), None))


def _training(
    plan: TrainPlan, folder: Path, place: Place = ALONE, **options: Callable[..., object]
) -> tuple[Trainer, Freezing]:
    task = _task()
    chain = chain_of(task.model, plan.freezing.modules if plan.freezing else 0)
    buckets = [module.parameters for module in chain.modules]
    state = TrainingState(task.model, plan.optimizer, buckets=buckets, group=place.group)
    freezing = Freezing(plan, task, state, chain, folder=folder, place=place, **options)  # type: ignore[arg-type]
    trainer = Trainer(plan, task, state, place=place)
    trainer.technique = freezing
    return trainer, freezing


def _after(front: Front, readings: list[float], rate: float = 0.1) -> Front:
    for reading in readings:
        front = front.after((reading,) * len(front.watched), rate)
    return front


@pytest.mark.parametrize("mode", ["signed", "absolute"])
@pytest.mark.parametrize("window", [2, 5, 10])
def test_a_flat_plasticity_freezes_after_a_window_of_stale_readings(
    mode: Mode, window: int
) -> None:
    """Three slopes set the tolerance; then exactly a window of stale ones freeze one module."""
    front = _after(Front(4, Rule(mode, window)), [0.5] * (4 + window - 1))
    assert front.front == 0
    assert _after(front, [0.5]).front == 1


def test_a_falling_plasticity_freezes_by_its_sign_only() -> None:
    """What still falls is stale for the paper's algorithm, not for its text, nor for us."""
    falling = [1.0 - 0.02 * step for step in range(30)]
    assert _after(Front(3, Rule("signed", 5)), falling).front > 0
    assert _after(Front(3, Rule("absolute", 5)), falling).front == 0
    assert _after(Front(3, Rule("settled", 5, share=0.3)), falling).front == 0


def test_noise_around_a_constant_freezes() -> None:
    """After a rise, noise about a level is flat to both readings of the paper's rule."""
    rng = np.random.default_rng(1)
    noisy = [0.0, 0.5, 1.0, *(1.0 + 0.01 * rng.standard_normal(40))]
    assert _after(Front(3, Rule("signed", 5)), noisy).front > 0
    assert _after(Front(3, Rule("absolute", 5)), noisy).front > 0


def test_settled_is_who_moves_little_and_not_who_moves_steadily() -> None:
    """Constant plasticity never freezes under our rule; a fall below the share does, for all."""
    rule = Rule("settled", window=4, share=0.3, patience=2)
    front = _after(Front(4, rule), [1.0] * 50)
    assert front.front == 0
    front = _after(front, [0.1] * 4)
    assert front.front == 0, "the average of a window is below the share once"
    assert _after(front, [0.1]).front == 3, "all but the last together"


def test_the_last_module_never_freezes() -> None:
    """However stale, one module trains."""
    for mode in ("signed", "absolute", "settled"):
        front = _after(Front(3, Rule(mode, 3)), [1.0] * 4 + [0.0] * 200)
        assert front.front == 2
        assert not front.watched


def test_a_rate_that_fell_tenfold_thaws_and_halves_the_window() -> None:
    """All modules train again, and refreeze after half as many readings."""
    front = _after(Front(4, Rule("absolute", 8)), [0.5] * 12, rate=0.1)
    assert (front.front, front.frozen_at) == (1, 0.1)
    assert front.thawed(0.011, 10.0) == front
    thawed = front.thawed(0.01, 10.0)
    assert (thawed.front, thawed.rule.window, thawed.frozen_at) == (0, 4, 0.0)
    assert _after(thawed, [0.5] * 8).front == 1
    assert thawed.thawed(0.0001, 10.0) == thawed


def test_nothing_freezes_in_the_critical_period() -> None:
    """Readings count while the loss still falls fast, but freeze nobody."""
    front = Front(3, Rule("absolute", 2))
    for _ in range(10):
        front = front.after((0.5,), 0.1, at_most=0)
    assert front.front == 0
    assert front.after((0.5,), 0.1).front == 1


def test_plasticity_is_the_loss_of_similarities() -> None:
    """It is zero for turned or scaled activations, and the formula's value for others."""
    torch.manual_seed(0)
    trained, reference = torch.randn(6, 2, 5), torch.randn(6, 2, 5)
    turned = trained.flatten(1) @ torch.linalg.qr(torch.randn(10, 10)).Q
    grams = [t.reshape(6, 10).numpy() for t in (trained, reference)]
    rows = [g @ g.T for g in grams]
    normed = [g / np.linalg.norm(g, axis=1, keepdims=True) for g in rows]

    assert plasticity(trained, 3.0 * turned) < 1e-12
    expected = ((normed[0] - normed[1]) ** 2).sum() / 36
    assert plasticity(trained, reference) == pytest.approx(expected, rel=1e-5)


def test_a_linear_layer_in_int8_says_nearly_the_same() -> None:
    """Eight-bit answers are within two percent, with and without a bias."""
    torch.manual_seed(0)
    x = 3 * torch.randn(8, 5, 64) + 1
    for bias in (True, False):
        linear = nn.Linear(64, 48, bias=bias)
        with torch.no_grad():
            exact = linear(x)
            error = (Int8Linear(linear)(x) - exact).norm() / exact.norm()
        assert 0 < error < 0.02


def test_a_chain_is_the_model() -> None:
    """Modules one after the other are the model's own pass, and hold each parameter once."""
    torch.manual_seed(0)
    assert isinstance(PLAN.moe, ClassifierConfig)
    config = DecoderConfig(
        vocabulary_size=32,
        d_model=8,
        n_layers=2,
        n_heads=2,
        n_kv_heads=2,
        d_head=4,
        d_expert=8,
        n_experts=4,
        top_k=2,
        max_length=8,
    )
    decoder = DecoderLM(config)
    models: list[tuple[nn.Module, Tensor, int]] = [
        (_network(), torch.randn(4, 1, 8, 8), 3),
        (WindowClassifier(PLAN.moe), torch.randn(4, 16, 2), 3),
        (decoder, torch.randint(0, 32, (4, 8)), 2),
    ]
    for model, x, count in models:
        chain = chain_of(model)
        assert len(chain.modules) == count
        names = [name for module in chain.modules for name in module.parameters]
        assert sorted(names) == sorted(name for name, _ in model.named_parameters())
        mine: list[Choice] = []
        theirs: list[Choice] = []
        said = x
        for module in chain.modules:
            said = module.run(model, said, mine)
        outputs, penalty = chain.finish(said, mine, 0.5)
        logits = model(x) if isinstance(model, nn.Sequential) else model(x, theirs)
        assert torch.equal(outputs, logits.transpose(1, 2) if model is decoder else logits)
        assert penalty is None if not theirs else penalty == 0.5 * sum_of(theirs)


def test_modules_are_cut_evenly() -> None:
    """The heaviest run of neighbours is as light as can be, and none is empty."""
    assert even_cuts([1, 1, 1, 1, 4], 2) == [4, 5]
    assert even_cuts([5, 1, 1, 1, 1], 3) == [1, 3, 5] or even_cuts([5, 1, 1, 1, 1], 3)[0] == 1
    assert even_cuts([2, 3], 2) == [1, 2]
    assert len(chain_of(_network(), 2).modules) == 2
    with pytest.raises(ConfigError, match=r"freezing\.modules is 4"):
        chain_of(_network(), 4)
    with pytest.raises(ConfigError, match="leave out"):
        chain_of(nn.Linear(3, 3))


def test_frozen_parameters_keep_their_bits(tmp_path: Path) -> None:
    """Weight decay and momentum move no frozen parameter; the others go on."""
    trainer, freezing = _training(PLAN, tmp_path / "cuts")
    model = trainer.task.model
    trainer.run(until=6)
    assert freezing.front == 1
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.run(until=11)
    after = dict(model.named_parameters())
    assert [name for name in before if torch.equal(before[name], after[name])] == [
        "0.0.weight",
        "0.0.bias",
    ]
    trainer.run()
    assert freezing.frozen_at == [(6, 1), (12, 2)]
    assert not [n for n in before if after[n].grad is not None]


def test_cached_activations_train_as_computed_ones(tmp_path: Path) -> None:
    """With the cache every parameter ends with the bits it has without, and it was read."""
    runs = []
    for size_mb in (0, 64):
        plan = changed(PLAN, freezing=changed(TIMES, cache_mb=size_mb), batch_size=48, epochs=12)
        trainer, freezing = _training(plan, tmp_path / str(size_mb))
        trainer.run(until=20)
        runs.append({name: p.detach().clone() for name, p in trainer.task.model.named_parameters()})
        reads = freezing._cache.read if freezing._cache is not None else 0
        assert (reads > 0) == (size_mb > 0)
        freezing.close()
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not list((tmp_path / "64").iterdir()), "a closed cache leaves nothing"


def test_a_cache_forgets_when_the_cut_moves(tmp_path: Path) -> None:
    """One cut's activations are never taken for another's, and only five batches wait."""
    trainer, freezing = _training(PLAN, tmp_path / "cuts")
    trainer.run(until=8)
    first = freezing._cache
    trainer.run(until=12)
    assert first is not None
    assert freezing._cache is not first
    assert first.take(np.arange(2)) is None
    cache = Activations(tmp_path / "own", SAMPLES, 10**6)
    cache.put(np.arange(SAMPLES), torch.arange(SAMPLES * 3.0).view(SAMPLES, 3))
    for start in range(12):
        cache.prefetch(np.arange(start, start + 4))
    assert len(cache._ahead) == 5
    taken = cache.take(np.array([7, 2]))
    assert taken is not None
    assert taken.tolist() == [[21, 22, 23], [6, 7, 8]]
    small = Activations(tmp_path / "small", SAMPLES, 100)
    small.put(np.arange(2), torch.zeros(2, 3))
    assert small.take(np.arange(2)) is None
    for each in (cache, small):
        each.close()


def test_a_dead_controller_only_stops_freezing(tmp_path: Path) -> None:
    """A reference that fails ends the readings; training goes to its end, and nothing freezes."""

    def fail(_: Question) -> Answer:
        raise RuntimeError("the reference is gone")

    plan = changed(PLAN, freezing=FreezingPlan(rule="signed", every=1, window=2))
    controller = Beside(fail)
    trainer, freezing = _training(plan, tmp_path / "cuts", controller=controller)  # type: ignore[arg-type]
    trainer.run()
    controller._thread.join(30)

    assert trainer.done == trainer.steps
    assert freezing.front == 0
    assert isinstance(controller.failure, RuntimeError)
    assert not controller.is_alive
    question = Question(1, range(1), torch.zeros(2, 2), [])
    assert not controller.ask(question)
    trainer.close()


def test_nobody_waits_for_a_slow_controller() -> None:
    """Questions beyond the few that may wait are dropped at once."""
    begun, may_go_on = Event(), Event()

    def answer(question: Question) -> Answer:
        begun.set()
        may_go_on.wait(30)
        return Answer(question.asked, question.modules, (0.0,))

    controller = Beside(answer)
    question = Question(1, range(1), torch.zeros(2, 2), [])
    assert controller.ask(question)
    assert begun.wait(30)
    assert [controller.ask(question) for _ in range(QUEUED + 2)] == [True] * QUEUED + [False] * 2
    may_go_on.set()
    controller.close()


def test_readings_freeze_a_model_in_training(tmp_path: Path) -> None:
    """By any rule modules freeze in a real training, by an int8 reference asked in or beside it."""
    for rule in ("signed", "settled"):
        how = FreezingPlan(
            rule=rule, every=1, window=2, share=0.9, critical=1.0, is_asynchronous=False
        )
        plan = changed(PLAN, freezing=how, optimizer=changed(PLAN.optimizer, schedule="cosine"))
        trainer, freezing = _training(plan, tmp_path / "cuts")
        trainer.run()
        trainer.close()
        again, other = _training(plan, tmp_path / "cuts")
        again.run()
        again.close()
        assert freezing.front > 0, rule
        assert other.frozen_at == freezing.frozen_at, "asked at once, readings are the same"


def test_a_reference_compares_with_who_we_were() -> None:
    """Its plasticity is the quantisation's at first, more after a change, and less once fresh."""
    model = _network()
    chain = chain_of(model)
    reference = Reference(model, chain, "int8")
    x = torch.randn(8, 1, 8, 8)
    with torch.no_grad():
        same = chain.modules[0].run(model, x, [])
        first = reference.answer(Question(1, range(1), x, [same])).readings[0]
        model[0][0].weight.add_(0.3 * torch.randn(4, 1, 3, 3))  # type: ignore[index]
        moved = chain.modules[0].run(model, x, [])
    weights = {name: model.get_parameter(name).detach() for name in chain.modules[0].parameters}
    second = reference.answer(Question(2, range(1), x, [moved], weights)).readings[0]
    third = reference.answer(Question(3, range(1), x, [moved])).readings[0]
    assert first < 1e-9
    assert second > 1e-4
    assert third < 1e-9


def _synchronised(rank: int, ranks: int) -> Mapping[str, Tensor]:
    how = FreezingPlan(
        every=1, window=3, share=1.0, critical=1.0, is_asynchronous=False, cache_mb=0
    )
    place = Place(rank, ranks, dist.group.WORLD)
    trainer, freezing = _training(changed(PLAN, freezing=how), Path("absent"), place)
    expected, state = 0, trainer.state
    assert isinstance(state, TrainingState)
    for step in range(1, trainer.steps + 1):
        expected += sum(4 * len(b.master) for b in state.buckets if not b.is_frozen)
        trainer.run(until=step)
    found = {"front": freezing.front, "reduced": state.reduced_bytes, "expected": expected}
    whole = trainer.steps * sum(4 * len(bucket.master) for bucket in state.buckets)
    numbers = {name: torch.tensor(n) for name, n in (found | {"whole": whole}).items()}
    return numbers | {f"p/{name}": tensor for name, tensor in state.weights().items()}


def test_frozen_modules_are_not_reduced(tmp_path: Path) -> None:
    """What goes into all-reduces is the active modules' gradients, step by step."""
    where = f"file://{tmp_path / 'store'}"
    dist.init_process_group("gloo", init_method=where, rank=0, world_size=1)
    try:
        found = _synchronised(0, 1)
    finally:
        dist.destroy_process_group()
    assert found["front"] > 0
    assert found["reduced"] == found["expected"] < found["whole"]


@pytest.mark.slow
def test_frozen_modules_are_not_synchronised(tmp_path: Path) -> None:
    """Ranks freeze the same modules at the same steps, and reduce the active ones' bytes only."""
    first, second = on_ranks(_synchronised, 2, tmp_path)

    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["front"] > 0
    assert first["reduced"] == first["expected"] < first["whole"]


def test_a_frozen_training_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    """After a kill what was frozen is, and the parameters end with the bits they would have."""
    plan = changed(PLAN, freezing=changed(TIMES, cache_mb=0))
    whole, _ = _training(plan, tmp_path / "cuts")
    whole.run()
    cut, freezing = _training(plan, tmp_path / "cuts")
    cut.run(until=13)
    kept = Checkpoints(tmp_path / "kept", "plan")
    kept.save(cut.done, cut.state.tensors() | freezing.tensors())
    late, resumed = _training(plan, tmp_path / "cuts")
    late._checkpoints = kept
    assert late.resume() == 13
    assert resumed.front == freezing.front == 2
    late.run()
    theirs = late.state.weights()
    assert all(torch.equal(t, theirs[name]) for name, t in whole.state.weights().items())


def test_freeze_out_learns_as_much_in_less_time() -> None:
    """Each module's rate falls to zero at its time, as a cosine, under the same area."""
    times = freeze_out_times(5, 0.5)
    assert times == (0.5, 0.625, 0.75, 0.875)
    assert freeze_out_times(3, 0.5, is_cubed=True)[0] == pytest.approx(0.5)
    plan = OptimizerPlan(learning_rate=0.2, schedule="cosine")
    steps = 1000
    for end in (0.5, 0.75, 1.0):
        rates = [
            freeze_out_scale(plan, end, step, steps) * learning_rate(plan, step, steps)
            for step in range(round(end * steps))
        ]
        cosine = [0.1 / end * (1 + np.cos(np.pi * t / (end * steps))) for t in range(len(rates))]
        assert rates == pytest.approx(cosine, abs=2e-3)
        assert sum(rates) == pytest.approx(0.1 * steps, rel=0.01)
    assert [front_at(times, done) for done in (0.0, 0.5, 0.7, 0.9, 1.0)] == [0, 1, 2, 4, 4]


def test_a_plan_freezes_what_it_pruned(tmp_path: Path) -> None:
    """[sparse] and [freezing] compose: the pruned model's front keeps its bits to the end."""
    plan = TrainPlan(
        name="digits",
        data=DataPlan(set="digits", at_most=320),
        model=ModelChoice(name="deep_mlp"),
        epochs=2,
        optimizer=OptimizerPlan(weight_decay=0.1),
        sparse=SparsePlan(rule="magnitude", sparsity=0.5),
        freezing=FreezingPlan(rule="times", times=(0.0, 0.5)),
    )
    setting = Setting(tmp_path / "out", tmp_path, ALONE, torch.device("cpu"))
    outcome = run_training(plan, setting)
    start = load_file(tmp_path / "out" / "start.safetensors")

    assert outcome.result.kept == pytest.approx(0.5, abs=0.01)
    assert not list((tmp_path / "out" / "activations").iterdir())
    frozen = outcome.task.model.state_dict()
    first = next(name for name in start if name.startswith("stage1") and name.endswith("weight"))
    one_step = start[first] - frozen[first]
    assert one_step[frozen[first] != 0].abs().max() < 3e-3, "it froze after the first step"


def test_what_makes_no_sense_is_refused() -> None:
    """Times without their rule, in disorder, too many, or shards that freeze: words, not traces."""
    with pytest.raises(ConfigError, match="goes with"):
        FreezingPlan(times=(0.5,))
    with pytest.raises(ConfigError, match="sort them"):
        FreezingPlan(rule="times", times=(0.5, 0.2))
    with pytest.raises(ConfigError, match="leave one out"):
        changed(PLAN, parallel=ParallelPlan())
    with pytest.raises(ConfigError, match="leave some out"):
        _training(changed(PLAN, freezing=changed(TIMES, times=(0.1, 0.2, 0.3))), Path("unused"))
