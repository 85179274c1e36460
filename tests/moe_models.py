"""Tiny real models of each family, published, and engines over them, for tests of serving."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from moe_serving.checkpoint import load, save
from moe_serving.config import ModelConfig, MoeConfig
from moe_serving.hosting import Host
from moe_serving.models.config import (
    ClassifierConfig,
    DecoderConfig,
    TranslationConfig,
)
from moe_serving.models.config import (
    ModelConfig as Record,
)
from moe_serving.models.decoder import DecoderLM
from moe_serving.models.families import build
from moe_serving.repository import About, publish
from moe_serving.requests import Ending, Generated, Ticket, Work

LM = DecoderConfig(
    vocabulary_size=259, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_head=8,
    d_expert=32, n_experts=4, top_k=2, max_length=256,
)  # fmt: skip
TRANSLATION = TranslationConfig(
    vocabulary_size=259, d_model=32, n_heads=4, d_head=8, d_expert=32, n_encoder_layers=2,
    n_decoder_layers=2, encoder_moe=(1,), decoder_moe=(1,), n_experts=4, top_k=1, max_length=128,
)  # fmt: skip
CLASSIFIER = ClassifierConfig(
    n_channels=3, window_length=32, patch_length=8, n_classes=4, d_model=32, n_layers=2,
    n_heads=2, d_expert=32, n_experts=4,
)  # fmt: skip
LABELS = ("rest", "walk", "run", "stairs")

ABOUT = {
    "poet": (LM, About(kind="lm")),
    "interpreter": (TRANSLATION, About(kind="translation")),
    "watch": (CLASSIFIER, About(kind="classifier", labels=LABELS)),
}


def publish_tiny(repository: Path, name: str, seed: int = 0, record: Record | None = None) -> int:
    """Publish a new version of one of the three, with random weights."""
    known, about = ABOUT[name]
    folder = repository.parent / f"made-{name}"
    torch.manual_seed(seed)
    save(build(record or known), folder)
    repository.mkdir(exist_ok=True)
    return publish(repository, name, folder, about)


def offline_logprobs(folder: Path, tokens: list[int]) -> list[float]:
    """What the model itself says of each token but the first, in one forward pass."""
    model = load(folder)
    assert isinstance(model, DecoderLM)
    with torch.no_grad():
        logprobs = model(torch.tensor([tokens]))[0].log_softmax(dim=-1)
    return [float(logprobs[n, token]) for n, token in enumerate(tokens[1:])]


@dataclass
class Tally:
    """An observer that keeps everything it is told."""

    settled: list[tuple[Ticket, Ending]] = field(default_factory=list)
    steps: list[tuple[int, float, int, int]] = field(default_factory=list)

    def on_settled(self, ticket: Ticket, ending: Ending, now: float) -> None:  # noqa: ARG002
        self.settled.append((ticket, ending))

    def on_step(self, tokens: int, seconds: float, waiting_tokens: int, running: int) -> None:
        self.steps.append((tokens, seconds, waiting_tokens, running))


class Waiting:
    """Hears what comes of one request, and lets a test wait for the end of it."""

    def __init__(self) -> None:
        self.parts: list[Generated] = []
        self.endings: list[Ending] = []
        self._done = threading.Event()

    def __call__(self, event: Generated | Ending) -> None:
        if isinstance(event, Ending):
            self.endings.append(event)
            self._done.set()
        else:
            self.parts.append(event)

    def ending(self) -> Ending:
        assert self._done.wait(30), "no ending within 30 s"
        return self.endings[0]


@contextmanager
def hosting(repository: Path, tally: Tally | None = None, **models: ModelConfig) -> Iterator[Host]:
    """A host that serves these models (all, if none is named), and is closed in the end."""
    observer = tally or Tally()
    config = MoeConfig(repository=repository, models=models)
    host = Host(config, observe=lambda _name, _version: observer)
    try:
        host.begin()
        yield host
    finally:
        host.drain(0.0)


def ask(host: Host, name: str, work: Work, client: str = "c", **options: float) -> Waiting:
    """Submit a request, and what hears its ending."""
    heard = Waiting()
    host.submit(host.find(name), client, work, heard, **options)
    return heard


Publish = Callable[..., int]
