"""The engine: many answers at once, each as if it were alone, and each ended exactly once."""

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_serving.checkpoint import load
from moe_serving.config import ModelConfig
from moe_serving.hosting import Host
from moe_serving.models.classifier import WindowClassifier
from moe_serving.requests import (
    Classified,
    Classify,
    Ending,
    Generate,
    Generated,
    RefusedError,
    Scored,
)
from moe_serving.sampling import choose
from tests.moe_models import ABOUT, Tally, Waiting, ask, hosting, offline_logprobs, publish_tiny

RNG = np.random.default_rng(7)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One version of each of the three."""
    folder = tmp_path_factory.mktemp("moe") / "repository"
    for name in ABOUT:
        publish_tiny(folder, name)
    return folder


@pytest.fixture(scope="module")
def host(repository: Path) -> Iterator[Host]:
    """All three, with slots and rows so few that prompts are read in parts."""
    few = ModelConfig(slots=4, rows=16, target_wait_s=3600.0)
    with hosting(repository, poet=few, interpreter=few, watch=ModelConfig()) as served:
        yield served


def prompt(length: int) -> tuple[int, ...]:
    """Random bytes as tokens."""
    return tuple(RNG.integers(3, 259, length).tolist())


def scores(ending: Ending) -> tuple[Scored, ...]:
    """The tokens of an answer that ended well."""
    assert ending.outcome == "ok", ending.reason
    assert isinstance(ending.result, Generated)
    return ending.result.tokens


def test_a_prompt_is_scored_as_offline_though_read_in_parts_and_in_company(
    host: Host, repository: Path
) -> None:
    """Echoed log-probabilities equal one forward pass of the model, to 1e-4 each."""
    prompts = [prompt(length) for length in (1, 2, 15, 16, 17, 60, 100, 200)]
    works = [Generate(tokens=p, max_tokens=3, top_logprobs=0, echo=True) for p in prompts]

    answers = [ask(host, "poet", work) for work in works]

    for given, answer in zip(prompts, answers, strict=True):
        found = scores(answer.ending())
        expected = offline_logprobs(repository / "poet" / "1", [s.token for s in found])
        assert tuple(s.token for s in found[: len(given)]) == given
        assert found[0].logprob is None
        assert [s.logprob for s in found[1:]] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", ["poet", "interpreter"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_does_not_depend_on_who_else_is_served(
    host: Host, name: str, temperature: float
) -> None:
    """The same seed gives the same tokens alone and among twelve others in four slots."""
    works = [
        Generate(tokens=prompt(5 + n), max_tokens=12, temperature=temperature, seed=n)
        for n in range(13)
    ]
    alone = [scores(ask(host, name, work).ending()) for work in works[:3]]

    together = [ask(host, name, work) for work in works]

    assert [scores(each.ending()) for each in together][:3] == alone


def test_a_classifier_answers_as_the_model_does(host: Host, repository: Path) -> None:
    """Windows of many requests in one batch get the logits of a plain forward pass."""
    windows = [RNG.standard_normal((n, 32, 3)).astype(np.float32) for n in (1, 3, 2, 5)]
    model = load(repository / "watch" / "1")
    assert isinstance(model, WindowClassifier)

    answers = [ask(host, "watch", Classify(each)) for each in windows]

    for x_BLC, answer in zip(windows, answers, strict=True):
        result = answer.ending().result
        assert isinstance(result, Classified)
        with torch.no_grad():
            expected = model(torch.from_numpy(x_BLC)).numpy()
        np.testing.assert_allclose(result.logits_BK, expected, atol=1e-5)


def test_windows_that_wait_for_company_share_a_batch(repository: Path) -> None:
    """Requests within the wait go together; a full batch and a near deadline do not wait."""
    tally, one = Tally(), Classify(np.zeros((1, 32, 3), np.float32))
    patient = ModelConfig(windows=8, wait_s=1.0)
    with hosting(repository, tally, watch=patient) as host:
        full = [ask(host, "watch", one) for _ in range(8)]
        begun = time.monotonic()
        for each in full:
            each.ending()
        assert time.monotonic() - begun < 0.9

        hasty = ask(host, "watch", one, deadline_s=0.5)

        assert hasty.ending().outcome == "ok"
        assert [tokens for tokens, *_ in tally.steps] == [8, 1]


def test_streamed_parts_and_the_ending_together_are_the_answer(host: Host) -> None:
    """Nothing is told twice or left out, and no part holds the beginning of a stop."""
    base = Generate(tokens=prompt(9), max_tokens=10)
    plain = scores(ask(host, "poet", base).ending())
    stop = (tuple(s.token for s in plain[5:8]),)
    work = Generate(tokens=base.tokens, max_tokens=10, stop=stop, streams=True)

    heard = ask(host, "poet", work)
    ending = heard.ending()

    told = [s.token for part in heard.parts for s in part.tokens]
    told += [s.token for s in scores(ending)]
    assert told == [s.token for s in plain[:5]]
    assert isinstance(ending.result, Generated)
    assert ending.result.finish == "stop"
    assert heard.parts


def test_draws_follow_the_distribution_and_top_p() -> None:
    """Over even draws each token comes as often as its share; beyond top_p none comes."""
    shares = torch.tensor([0.1, 0.4, 0.2, 0.3])
    draws = [(n + 0.5) / 1000 for n in range(1000)]

    def counts(top_p: float) -> list[float]:
        work = Generate(tokens=(1,), max_tokens=1, temperature=1.0, top_p=top_p)
        chosen = choose(shares.log().repeat(1000, 1), [work] * 1000, draws)
        return [chosen.count(token) / 1000 for token in range(4)]

    assert counts(1.0) == pytest.approx([0.1, 0.4, 0.2, 0.3], abs=0.002)
    assert counts(0.65) == pytest.approx([0.0, 4 / 7, 0.0, 3 / 7], abs=0.002)


@pytest.mark.parametrize(
    ("name", "work", "pointer"),
    [
        ("poet", Generate(tokens=(), max_tokens=1), ""),
        ("poet", Generate(tokens=(5,) * 250, max_tokens=7), "prompt"),
        ("poet", Generate(tokens=(259,), max_tokens=1), "prompt"),
        ("poet", Classify(np.zeros((1, 32, 3), np.float32)), ""),
        ("interpreter", Generate(tokens=(5,), max_tokens=1, echo=True), "echo"),
        ("interpreter", Generate(tokens=(5,) * 129, max_tokens=1), "prompt"),
        ("watch", Classify(np.zeros((1, 31, 3), np.float32)), "inputs[0].shape"),
        ("watch", Classify(np.zeros((0, 32, 3), np.float32)), "inputs[0].shape"),
        ("watch", Classify(np.zeros((65, 32, 3), np.float32)), "inputs[0].shape"),
        ("watch", Classify(np.full((1, 32, 3), np.nan, np.float32)), "inputs[0].data"),
    ],
)
def test_what_a_model_cannot_answer_is_refused_with_the_place_of_the_fault(
    host: Host, name: str, work: Generate | Classify, pointer: str
) -> None:
    """Empty, too long, out of the vocabulary, of another shape or not finite: `invalid`."""
    with pytest.raises(RefusedError) as refused:
        ask(host, name, work)

    assert (refused.value.outcome, refused.value.pointer) == ("invalid", pointer)


def test_a_deadline_ends_what_waits_and_what_runs(repository: Path) -> None:
    """With one slot: who runs too long, and who waits behind, both end as `expired`."""
    with hosting(repository, poet=ModelConfig(slots=1, target_wait_s=3600.0)) as host:
        long = Generate(tokens=prompt(20), max_tokens=230, temperature=1.0)
        running = ask(host, "poet", long, "a", deadline_s=0.05)
        until = time.monotonic() + 20
        while host.find("poet").engine.waiting_tokens:
            assert time.monotonic() < until, "it never ran"
        waiting = ask(host, "poet", long, "b", deadline_s=0.05)

        endings = [running.ending(), waiting.ending()]

        assert [each.outcome for each in endings] == ["expired", "expired"]
        assert ask(host, "poet", Generate(tokens=(5,), max_tokens=1)).ending().outcome == "ok"


def test_a_client_that_goes_frees_its_place(repository: Path) -> None:
    """Cancelled while it runs or waits, a request ends as such, and the next is served."""
    with hosting(repository, poet=ModelConfig(slots=1, target_wait_s=3600.0)) as host:
        hosted = host.find("poet")
        long = Generate(tokens=prompt(20), max_tokens=230, temperature=1.0)
        heard = [Waiting(), Waiting()]
        tickets = [host.submit(hosted, "c", long, each)[1] for each in heard]

        for ticket in reversed(tickets):
            hosted.engine.cancel(ticket)

        assert [each.ending().outcome for each in heard] == ["cancelled", "cancelled"]
        assert ask(host, "poet", Generate(tokens=(5,), max_tokens=1)).ending().outcome == "ok"


def test_under_twice_the_load_every_request_ends_exactly_once(repository: Path) -> None:
    """Of a flood some are refused, all others end once, within the deadline, and are counted."""
    tally, deadline_s = Tally(), 3.0
    tight = ModelConfig(slots=8, rows=64, target_wait_s=0.2, deadline_s=deadline_s)
    with hosting(repository, tally, poet=tight) as host:
        accepted, refused, pauses = [], Counter[str](), []
        for n in range(400):
            work = Generate(tokens=prompt(1 + n % 40), max_tokens=1 + n % 10, seed=n)
            try:
                accepted.append(ask(host, "poet", work, f"client {n % 20}"))
            except RefusedError as error:
                refused[error.outcome] += 1
                pauses.append(error.retry_after_s)
        endings = [each.ending() for each in accepted]
        assert host.drain(10.0) == 0

    assert set(refused) <= {"busy", "over-share"}
    assert refused.total() > 0
    assert min(pauses) >= 1.0
    assert all(len(each.endings) == 1 for each in accepted)
    assert {each.outcome for each in endings} == {"ok"}
    assert len(tally.settled) == len(accepted)


def test_draining_finishes_what_was_accepted_and_takes_no_more(repository: Path) -> None:
    """All accepted requests are answered, later ones refused as `draining`."""
    with hosting(repository, poet=ModelConfig(slots=4, target_wait_s=3600.0)) as host:
        work = Generate(tokens=prompt(9), max_tokens=20)
        accepted = [ask(host, "poet", work) for _ in range(12)]

        left = host.drain(20.0)

        assert left == 0
        assert {each.ending().outcome for each in accepted} == {"ok"}
        with pytest.raises(RefusedError) as refused:
            ask(host, "poet", Generate(tokens=(5,), max_tokens=1))
    assert refused.value.outcome == "draining"


def test_a_drain_without_time_tells_those_that_are_left(repository: Path) -> None:
    """With no grace, unfinished requests end as `draining`, once, and are counted."""
    with hosting(repository, poet=ModelConfig(slots=1, target_wait_s=3600.0)) as host:
        long = Generate(tokens=prompt(20), max_tokens=230, temperature=1.0)
        accepted = [ask(host, "poet", long, f"c{n}") for n in range(4)]

        left = host.drain(0.0)

        assert left >= 3
        outcomes = Counter(each.ending().outcome for each in accepted)
        assert outcomes["draining"] == left
        assert all(len(each.endings) == 1 for each in accepted)


def test_a_step_that_fails_costs_its_batch_and_no_more(host: Host) -> None:
    """When the model raises, those in the step end as `failed`; the engine serves the next."""
    hosted = host.find("watch")
    model = hosted.loaded.batcher._model  # type: ignore[attr-defined]
    handle = model.register_forward_pre_hook(_fail)
    one = Classify(np.zeros((1, 32, 3), np.float32))

    ending = ask(host, "watch", one).ending()
    handle.remove()

    assert ending.outcome == "failed"
    assert "out of luck" in ending.reason
    assert ask(host, "watch", one).ending().outcome == "ok"


def _fail(*_: object) -> None:
    raise RuntimeError("out of luck")


def test_answers_do_not_depend_on_how_many_experts_fit_in_memory(
    host: Host, repository: Path
) -> None:
    """With a budget of half of the experts the same tokens come, and the budget is kept."""
    works = [Generate(tokens=prompt(9 + n), max_tokens=9, seed=n) for n in range(5)]
    whole = [scores(each.ending()) for each in [ask(host, "poet", work) for work in works]]

    with hosting(repository, poet=ModelConfig(experts_mb=0.06, target_wait_s=3600.0)) as thrifty:
        found = [scores(each.ending()) for each in [ask(thrifty, "poet", w) for w in works]]
        store = thrifty.find("poet").loaded.store
        assert store is not None
        counters = store.counters()

    assert found == whole
    assert counters.misses > 0
    assert counters.peak_bytes <= 60_000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_gives_the_answers_of_the_cpu(host: Host, repository: Path) -> None:
    """Log-probabilities of an echoed prompt agree to 1e-3, translations and classes too."""
    work = Generate(tokens=prompt(60), max_tokens=0, top_logprobs=0, echo=True)
    translated = Generate(tokens=prompt(9), max_tokens=1, top_logprobs=0)
    windows = Classify(RNG.standard_normal((3, 32, 3)).astype(np.float32))
    on_gpu = ModelConfig(device="cuda")
    with hosting(repository, poet=on_gpu, interpreter=on_gpu, watch=on_gpu) as fast:
        for name, asked in (("poet", work), ("interpreter", translated)):
            pair = [scores(ask(each, name, asked).ending()) for each in (host, fast)]
            here, there = ([s.logprob or 0.0 for s in found] for found in pair)
            assert there == pytest.approx(here, abs=1e-3)
        results = [ask(each, "watch", windows).ending().result for each in (host, fast)]
        logits = [r.logits_BK for r in results if isinstance(r, Classified)]
        np.testing.assert_allclose(logits[0], logits[1], atol=1e-3)
