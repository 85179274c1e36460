"""Translation as the hub trains it: pairs, held-out verses, and a model that is served."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from cloud.trainers.loop import Place
from cloud.trainers.plans import DataPlan, OptimizerPlan, TrainPlan
from cloud.trainers.publishing import MODELS, publish
from cloud.trainers.ready import find_plan, ready_plans
from cloud.trainers.running import Setting, run_training
from cloud.trainers.task import IGNORED
from cloud.trainers.tasks import open_task
from cloud.trainers.tasks.translation import BLOCK, split_pairs
from federation.config import read_config
from federation.datasets.cached import cached_file
from federation.datasets.texts import pack_documents
from federation.errors import ConfigError
from moe_serving.config import ModelConfig
from moe_serving.models.config import TranslationConfig
from moe_serving.requests import Generate
from moe_serving.tokens import ByteTokenizer, decode
from tests.moe_models import TRANSLATION, ask, hosting

VERSES = 32361
"""As many as both editions have; the cache refuses others."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Two editions in the cache's own form: short verses of a small language, the same in both."""
    folder = tmp_path_factory.mktemp("cache")
    rng = np.random.default_rng(0)
    for name, words in (
        ("kjv", ("sun ", "moon", "sea ")),
        ("reina-valera", ("sol ", "luna", "mar ")),
    ):
        rng = np.random.default_rng(0)
        texts = ["".join(words[n] for n in rng.integers(0, 3, 2)) for _ in range(VERSES)]
        np.savez(cached_file(name, cache=folder), **pack_documents(texts))
    return folder


def plan(**options):
    given = {
        "name": "verses",
        "data": DataPlan(set="kjv->reina-valera", length=16, at_most=640, test_share=0.01),
        "moe": TRANSLATION,
        "batch_size": 32,
        "epochs": 6,
        "optimizer": OptimizerPlan(learning_rate=5e-3, schedule="cosine", warmup=5),
    }
    return TrainPlan(**(given | options))


@pytest.fixture(scope="module")
def trained(cache, tmp_path_factory):
    """The plan carried out, and its result published."""
    setting = Setting(tmp_path_factory.mktemp("out"), cache, Place(), torch.device("cpu"))
    outcome = run_training(plan(), setting)
    publish(plan(), outcome.task, outcome.weights, setting.out, 0.0)
    return outcome, setting.out / MODELS


def test_a_model_learns_to_translate_and_is_served(trained):
    """Verses it never saw come out word by word; who cannot see the source does not get there."""
    outcome, repository = trained
    blind = (2 * (1 / 3 + 3) + 1) / 9  # of each word the first letter cannot be known

    with hosting(repository, verses=ModelConfig()) as host:
        asked = Generate(tokens=tuple(ByteTokenizer().encode("moonsea ")), max_tokens=16)
        said = ask(host, "verses", asked).ending().result

    assert outcome.result.accuracy > (1 + blind) / 2
    assert decode(ByteTokenizer(), [each.token for each in said.tokens]) == "lunamar "


def test_a_batch_is_what_the_server_will_see(cache):
    """Sources stand without marks, targets begin with the start and end with the end."""
    task = open_task(plan(), cache)
    x, y = task.train.batch(np.array([3, 5]))
    one, other = task.train.pairs[3]

    assert x[0, : len(one)].tolist() == one
    assert not x[0, len(one) : task.train.width + 1].any()
    assert x[0, task.train.width + 1 :].tolist()[: len(other)] == other
    assert y[0].tolist()[: len(other) + 1] == [*other, TRANSLATION.end_id]
    assert (y[0, len(other) + 1 :] == IGNORED).all()


def test_padding_changes_no_loss(cache):
    """A pair has the loss in a batch that it has alone."""
    task = open_task(plan(), cache)
    task.train.pairs[0] = (task.train.pairs[0][0][:5], task.train.pairs[0][1][:3])
    task.model.eval()

    def losses(places):
        x, y = task.train.batch(np.array(places))
        with torch.inference_mode():
            rows = [(x[i : i + 1], y[i : i + 1]) for i in range(len(y))]
            return [task.loss(task.forward(one)[0], other).item() for one, other in rows]

    together, alone = losses([0, 1]), [losses([0])[0], losses([1])[0]]

    assert together == pytest.approx(alone, rel=1e-5)


def test_blocks_of_neighbours_are_held_out():
    """A held-out verse has its neighbours beside it in the test; nothing is in both."""
    pairs = [(f"{n:04d}", f"{n:04d}") for n in range(1000)]

    train, test = split_pairs(pairs, DataPlan(set="a->b", length=4, test_share=0.1))
    few, _ = split_pairs(pairs, DataPlan(set="a->b", length=4, test_share=0.1, at_most=9))

    numbers = [int(one) for one, _ in test]
    assert sorted(train + test) == pairs
    assert len(numbers) == 100
    assert all(
        numbers[at : at + BLOCK] == list(range(numbers[at], numbers[at] + BLOCK))
        for at in range(0, 100, BLOCK)
    )
    assert len(few) == 9
    assert int(few[-1][0]) > 850
    assert split_pairs(pairs, DataPlan(set="a->b", length=3)) == ([], [])


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"data": DataPlan(set="kjv", length=16)}, "from one corpus to another"),
        ({"data": DataPlan(set="kjv->reina-valera", length=500)}, "more than data.length, 500"),
        ({"moe": msgspec.structs.replace(TRANSLATION, start_id=5)}, "bytes have 0, 1 and 0"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(cache, options, word):
    """Data and model that do not fit are said in words."""
    with pytest.raises(ConfigError, match=word):
        open_task(plan(**options), cache)


def test_the_ready_plans_are_plans():
    """Each can be named without its folder; what is a file goes first; unknown names stay."""
    assert set(ready_plans()) == {"sotu", "kjv-rv", "watch", "hapt"}
    for name in ready_plans():
        assert read_config(find_plan(Path(name)), TrainPlan).name == name
    assert find_plan(Path("nothing")) == Path("nothing")
    assert isinstance(read_config(find_plan(Path("kjv-rv")), TrainPlan).moe, TranslationConfig)
