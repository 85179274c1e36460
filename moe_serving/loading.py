"""From a published version to an engine that is known to work.

A version is served only after its files were checked, its weights found finite (experts within a
budget: each as it is first read), and a probe answered alone and in company alike. The same probe
says how many tokens a second the model does, which admission begins with.
"""

import time
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

from federation.errors import ConfigError, HeadwaterError, StoreError
from moe_serving.admission import Pace
from moe_serving.batching import Batcher, Continuous
from moe_serving.buffering.store import BufferedStore, open_store
from moe_serving.buffering.store import Settings as BufferSettings
from moe_serving.checkpoint import load
from moe_serving.config import ModelConfig
from moe_serving.kernels.plain import pack_plain
from moe_serving.kernels.registry import best_kernel, serve_resident
from moe_serving.layers.experts import Pack
from moe_serving.models.classifier import WindowClassifier
from moe_serving.models.config import ClassifierConfig, DecoderConfig, TranslationConfig
from moe_serving.models.decoder import DecoderLM
from moe_serving.models.families import Model
from moe_serving.repository import Published
from moe_serving.requests import (
    Classified,
    Classify,
    Ending,
    Generate,
    Generated,
    RefusedError,
    Ticket,
    Work,
)
from moe_serving.stepping import LanguageSteps, TranslationSteps
from moe_serving.tokens import Tokenizer, tokenizer_named
from moe_serving.windows import WindowBatches

Record: TypeAlias = DecoderConfig | TranslationConfig | ClassifierConfig

PROBE_TOKENS, PROBE_ANSWER, PROBE_COMPANY = 16, 8, 8

TOLERANCE = {"exact": 1e-3, "8bit": 5e-2}
"""How far a log-probability or logit may move when others are in the batch."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that answered its probe, and how fast."""

    published: Published
    record: Record
    tokenizer: Tokenizer
    batcher: Batcher
    pace: Pace
    store: BufferedStore | None = None

    def close(self) -> None:
        """Give back what its experts are read from."""
        if self.store is not None:
            self.store.close()


def load_version(published: Published, settings: ModelConfig) -> Loaded:
    """Load a version, and see that it answers.

    Raises:
        StoreError: a damaged checkpoint, another kind than the manifest says, or a failed probe.
        ConfigError: settings that no kernel here can obey.
    """
    tokenizer = tokenizer_named(published.about.tokenizer)
    model, store = _load(published, settings)
    try:
        _check_about(published, model)
        batcher = _batcher(model, tokenizer, settings)
        pace = _probe(published, model, batcher, settings)
    except HeadwaterError:
        if store is not None:
            store.close()
        raise
    return Loaded(published, model.config, tokenizer, batcher, pace, store)


def _load(published: Published, settings: ModelConfig) -> tuple[Model, BufferedStore | None]:
    """The model with all experts in memory, or with a store that keeps within their budget."""
    device, store = torch.device(settings.device), None
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda' and there is no GPU here: serve it on the CPU")
    try:
        if settings.experts_mb:
            # Packing is paid for by each miss: exact weights run as they lie in the file.
            pack: Pack = pack_plain
            if settings.precision != "exact":
                pack = best_kernel(settings.device, settings.precision, is_single=True).pack or pack
            budget = BufferSettings(int(settings.experts_mb * 1e6))
            store = open_store(published.folder, budget, pack=pack, device=device)
            return load(published.folder, store=store).to(device), store
        model = load(published.folder).to(device)
        serve_resident(model.moe_layers(), best_kernel(settings.device, settings.precision))
    except MemoryError as error:
        raise StoreError(
            f"{published.folder} does not fit into memory; set experts_mb for model "
            f"{published.name!r}, or serve it on a larger machine"
        ) from error
    return model, None


def _check_about(published: Published, model: Model) -> None:
    about = published.about
    kinds = {DecoderConfig: "lm", TranslationConfig: "translation", ClassifierConfig: "classifier"}
    kind = kinds[type(model.config)]
    if about.kind != kind:
        raise StoreError(
            f"{published.folder} says it is a {about.kind} and holds a {kind}: publish it again "
            f"as a {kind}"
        )
    classes = model.config.n_classes if isinstance(model, WindowClassifier) else 0
    if len(about.labels) not in {0, classes}:
        raise StoreError(
            f"{published.folder} has {len(about.labels)} labels and {classes} classes: "
            "publish it again with one label a class"
        )


def _batcher(model: Model, tokenizer: Tokenizer, settings: ModelConfig) -> Batcher:
    if isinstance(model, WindowClassifier):
        return WindowBatches(model, windows=settings.windows, wait_s=settings.wait_s)
    length = settings.length or model.config.max_length
    slots, rows = settings.slots, settings.rows
    if isinstance(model, DecoderLM):
        steps = LanguageSteps(model, slots=slots, length=length)
        return Continuous(steps, slots=slots, rows=rows, end=tokenizer.end)
    translates = TranslationSteps(model, slots=slots, length=length)
    return Continuous(translates, slots=slots, rows=rows, end=model.config.end_id)


def _probe(published: Published, model: Model, batcher: Batcher, settings: ModelConfig) -> Pace:
    """Ask alone, then in company, and compare; the time of the second is the rate."""
    rng = np.random.default_rng(0)
    company = min(PROBE_COMPANY, settings.windows if _is_classifier(model) else settings.slots)
    works = [_question(model.config, rng) for _ in range(company)]
    try:
        alone, _ = _answer(batcher, works[:1])
        _answer(batcher, works)
        together, tokens_per_s = _answer(batcher, works)
    except (RefusedError, ConfigError) as error:
        raise StoreError(f"{published.folder} cannot answer its probe: {error}") from error
    size = min(alone[0].size, together[0].size)
    gap = float(np.abs(alone[0].ravel()[:size] - together[0].ravel()[:size]).max(initial=0.0))
    if not gap <= TOLERANCE[settings.precision]:
        raise StoreError(
            f"{published.folder} answers differently in company, by {gap:.2g}: "
            "serve it with precision = 'exact'; if it is so already, its weights are damaged"
        )
    return Pace(tokens_per_s)


def _is_classifier(model: Model) -> bool:
    return isinstance(model, WindowClassifier)


def _question(record: Record, rng: np.random.Generator) -> Work:
    if isinstance(record, ClassifierConfig):
        shape = (1, record.window_length, record.n_channels)
        return Classify(rng.standard_normal(shape).astype(np.float32))
    length = max(1, min(PROBE_TOKENS, record.max_length - PROBE_ANSWER))
    tokens = rng.integers(0, record.vocabulary_size, length)
    can_echo = isinstance(record, DecoderConfig)
    return Generate(
        tokens=tuple(tokens.tolist()),
        max_tokens=min(PROBE_ANSWER, record.max_length - length),
        top_logprobs=0,
        echo=can_echo,
    )


def _answer(batcher: Batcher, works: list[Work]) -> tuple[list[np.ndarray], float]:
    """The numbers that came back for each, and tokens a second."""
    endings: dict[Ticket, Ending] = {}
    tickets = []
    for work in works:
        batcher.check(work)
        ticket = Ticket("", work, accepted_at=0.0, deadline=np.inf, deliver=lambda _: None)
        batcher.join(ticket)
        tickets.append(ticket)
    begun, tokens = time.perf_counter(), 0
    while batcher.running:
        done, ended = batcher.step(0.0)
        tokens += done
        endings |= dict(ended)
    seconds = time.perf_counter() - begun
    return [_numbers(endings[ticket]) for ticket in tickets], tokens / seconds


def _numbers(ending: Ending) -> np.ndarray:
    match ending.result:
        case Classified(logits_BK):
            return logits_BK
        case Generated(tokens):
            # Which token is chosen may turn on a tie, and what follows from it: so only what was
            # given is compared, and the first that was chosen.
            compared = tokens[: PROBE_TOKENS if tokens[:1] and tokens[0].logprob is None else 1]
            return np.array([scored.logprob or 0.0 for scored in compared])
        case _:
            raise RefusedError("failed", ending.reason)
