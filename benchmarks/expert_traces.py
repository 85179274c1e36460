"""What a served language model's gates ask for, recorded on two sets of real texts."""

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.claims import CACHE, Options
from federation.datasets.cached import cache_folder, load_corpus
from federation.errors import ConfigError
from moe_serving.buffering.trace import Shape, Trace, TraceRecorder
from moe_serving.checkpoint import load, save
from moe_serving.kernels.registry import kernel_named, serve_resident
from moe_serving.layers.gating import Choice, balance_loss
from moe_serving.models.config import DecoderConfig
from moe_serving.models.decoder import DecoderLM
from moe_serving.tokens import ByteTokenizer

CHECKPOINT = "HEADWATER_MOE_LM"
"""Environment variable with the folder of another byte-level language model to serve."""

PROMPTS = {"speeches": "sotu", "Spanish verses": "reina-valera"}
TRAINED_ON = ("sotu", "kjv", "reina-valera")
HELD_OUT = 0.1
"""The last part of each text: never trained on, and what prompts are taken from."""

TINY = DecoderConfig(
    vocabulary_size=ByteTokenizer.vocabulary_size, d_model=96, n_layers=4, n_heads=4,
    n_kv_heads=2, d_head=24, d_expert=96, n_experts=32, top_k=2, max_length=4096, is_tied=True,
)  # fmt: skip
STEPS, QUICK_STEPS = 160, 40
BATCH, LENGTH, RATE = 16, 64, 4e-3
BALANCE = 0.01
CONTEXT = 256


def served_lm(options: Options) -> Path:
    """The folder of the model to serve: that of the environment, or a tiny one trained here.

    Raises:
        ConfigError: The environment names a checkpoint that is no language model.
    """
    if given := os.environ.get(CHECKPOINT):
        if not isinstance(load(Path(given)), DecoderLM):
            raise ConfigError(f"{CHECKPOINT} names {given}, which is no language model")
        return Path(given)
    full, quick = CACHE / "expert-lm", CACHE / "expert-lm-quick"
    kept = quick if options.is_quick and not full.exists() else full
    if not kept.exists():
        options.tell("training a tiny language model on speeches and two Bibles")
        save(_train(QUICK_STEPS if options.is_quick else STEPS, options), options.folder / "lm")
        (options.folder / "lm").rename(kept)
    return kept


def record(folder: Path, text_set: str, streams: int, passes: int) -> Trace:
    """Serves held-out texts, one token of each stream a pass, and records what gates ask for."""
    torch.set_num_threads(1)
    model = load(folder)
    if not isinstance(model, DecoderLM):
        raise ConfigError(f"{folder} holds no language model")
    recorder = TraceRecorder(Shape(model.config.n_layers, model.config.n_experts), most=10**6)
    for layer in model.moe_layers():
        layer.watch = lambda number, _, plan: recorder.record(number, plan.counts_E.tolist())
    serve_resident(model.moe_layers(), kernel_named("plain"))
    serve(model, text_set, streams, passes)
    return recorder.trace()


def serve(model: DecoderLM, text_set: str, streams: int, passes: int) -> None:
    """Lets a model read held-out texts, one token of each stream a pass.

    A stream begins anew when its context is full, each at another time.
    """
    rows = held_out(text_set, streams, passes)
    cache, slots = model.new_cache(streams, CONTEXT), torch.arange(streams)
    positions = torch.zeros(streams, dtype=torch.int64)
    ends = CONTEXT - slots * CONTEXT // (2 * streams)
    for step in range(passes):
        model.step(rows[step], positions, slots, cache)
        positions = (positions + 1) % ends


def held_out(text_set: str, streams: int, passes: int) -> Tensor:
    """Tokens by pass and stream, from stretches of the text that nobody was trained on."""
    tokens = _tokens(PROMPTS[text_set])
    tokens = tokens[int(len(tokens) * (1 - HELD_OUT)) :]
    begins = np.linspace(0, len(tokens) - passes - 1, streams).astype(np.int64)
    return torch.stack([tokens[begin : begin + passes] for begin in begins.tolist()], dim=1)


def _tokens(name: str) -> Tensor:
    corpus = load_corpus(name, cache=cache_folder(os.environ))
    return torch.tensor(ByteTokenizer().encode("\n".join(filter(None, corpus.documents))))


def _train(steps: int, options: Options) -> DecoderLM:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = DecoderLM(TINY)
    texts = [_tokens(name) for name in TRAINED_ON]
    rng = np.random.default_rng(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for step in range(steps):
        rows = _draw(texts, rng)
        choices: list[Choice] = []
        logits = model(rows[:, :-1], choices)
        loss = functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        balance = torch.stack([balance_loss(choice) for choice in choices]).mean()
        optimizer.zero_grad()
        (loss + BALANCE * balance).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            options.tell(f"  step {step}: {float(loss.detach()) / np.log(2):.2f} bit a byte")
    return model


def _draw(texts: list[Tensor], rng: np.random.Generator) -> Tensor:
    rows = []
    for _ in range(BATCH):
        text = texts[rng.integers(len(texts))]
        begin = int(rng.integers(int(len(text) * (1 - HELD_OUT)) - LENGTH))
        rows.append(text[begin : begin + LENGTH + 1])
    return torch.stack(rows)
