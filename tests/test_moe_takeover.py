"""Versions of a model: one follows another without a gap, and a bad one never serves."""

import threading
from collections import Counter
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from federation.errors import HeadwaterError, StoreError
from moe_serving.config import ModelConfig
from moe_serving.repository import About, publish
from moe_serving.requests import Generate, Generated, RefusedError
from tests.moe_models import ABOUT, LABELS, Tally, ask, hosting, publish_tiny

WORK = Generate(tokens=(5, 6, 7), max_tokens=4, top_logprobs=0, echo=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """One version of the language model."""
    publish_tiny(tmp_path / "repository", "poet")
    return tmp_path / "repository"


def test_a_newer_version_takes_over_under_load_without_an_error(repository: Path) -> None:
    """While five clients ask without pause a new version serves; one or the other answers all."""
    tally, is_over = Tally(), threading.Event()
    outcomes: Counter[str] = Counter()

    def keep_asking(client: str) -> None:
        while not is_over.is_set():
            try:
                outcomes[ask(host, "poet", WORK, client).ending().outcome] += 1
            except RefusedError as error:
                outcomes[error.outcome] += 1

    with hosting(repository, tally, poet=ModelConfig(target_wait_s=3600.0)) as host:
        before = scores(host)
        clients = [threading.Thread(target=keep_asking, args=(f"c{n}",)) for n in range(5)]
        for each in clients:
            each.start()
        publish_tiny(repository, "poet", seed=1)
        host.follow()
        after = scores(host)
        is_over.set()
        for each in clients:
            each.join()

        assert host.find("poet").version == 2

    assert set(outcomes) == {"ok"}
    assert before != after
    assert len(tally.settled) == outcomes.total() + 2


def scores(host: object) -> list[float | None]:
    """What the model says of a fixed prompt, and so which version it is."""
    result = ask(host, "poet", WORK).ending().result  # type: ignore[arg-type]
    assert isinstance(result, Generated)
    return [round(each.logprob, 4) if each.logprob else None for each in result.tokens[:3]]


HARMS = ("truncated", "NaN", "shape", "no weights", "not JSON", "kind", "tokenizer", "altered")


@pytest.mark.parametrize("harm", HARMS)
def test_a_version_that_fails_to_load_leaves_the_one_that_serves(
    harm: str, repository: Path, tmp_path: Path
) -> None:
    """Whatever is wrong with version 2, version 1 answers, and the index says what it was."""
    with hosting(repository) as host:
        before = scores(host)
        publish_harmed(repository, tmp_path / "made-poet", harm)

        with pytest.raises(HeadwaterError) as refused:
            host.load("poet")

        rows = {row.version: row for row in host.index() if row.name == "poet"}
        assert scores(host) == before
        assert rows[1].state == "READY"
        assert (rows[2].state, rows[2].reason) == ("UNAVAILABLE", str(refused.value))
        host.follow()
        assert host.find("poet").version == 1


def publish_harmed(repository: Path, made: Path, harm: str) -> None:
    """A version 2 whose files are as its manifest says, and yet no model; or not even that."""
    about, weights, config = ABOUT["poet"][1], made / "model.safetensors", made / "config.json"
    match harm:
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "NaN":
            tensors = load_file(weights)
            tensors["norm.weight"][3] = torch.nan
            save_file(tensors, weights)
        case "shape":
            record = msgspec.json.decode(config.read_bytes())
            config.write_bytes(msgspec.json.encode(record | {"d_model": 64}))
        case "no weights":
            weights.unlink()
        case "not JSON":
            config.write_text("{")
        case "kind":
            about = About(kind="classifier", labels=LABELS)
        case "tokenizer":
            about = About(kind="lm", tokenizer="runes")
        case _:
            pass
    version = publish(repository, "poet", made, about)
    if harm == "altered":
        file = repository / "poet" / str(version) / "model.safetensors"
        data = file.read_bytes()
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def test_a_server_with_nothing_to_serve_says_why(tmp_path: Path) -> None:
    """Where the only model is damaged, the host does not begin, and names the damage."""
    publish_tiny(tmp_path / "repository", "poet")
    (tmp_path / "repository" / "poet" / "1" / "config.json").write_text("?")

    with (
        pytest.raises(StoreError, match=r"config\.json has 1 bytes"),
        hosting(tmp_path / "repository"),
    ):
        pass


def test_an_unloaded_model_is_unknown_until_it_is_loaded_again(repository: Path) -> None:
    """Unloading finishes what runs; following does not bring the same version back."""
    with hosting(repository) as host:
        running = ask(host, "poet", WORK)
        host.unload("poet")
        host.follow()

        with pytest.raises(RefusedError) as refused:
            host.find("poet")
        assert refused.value.outcome == "unknown"
        assert running.ending().outcome == "ok"
        host.load("poet")
        assert host.find("poet").version == 1


def test_a_name_that_is_none_leaves_no_trace(repository: Path) -> None:
    """Whoever asks to load or unload what cannot be a model's name leaves the index as it was."""
    with hosting(repository) as host:
        before = host.index()

        with pytest.raises(StoreError, match="cannot be a model's name"):
            host.load("../elsewhere")
        with pytest.raises(RefusedError, match="there is no model"):
            host.unload("../elsewhere")

        assert host.index() == before


def test_a_pinned_version_stays(repository: Path) -> None:
    """A version that the configuration names is served, whatever is published later."""
    with hosting(repository, poet=ModelConfig(version=1)) as host:
        publish_tiny(repository, "poet", seed=1)
        host.follow()

        assert host.find("poet").version == 1
