"""The model families: rows of many sequences give what whole sequences give."""

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from federation.errors import ConfigError, DataError
from moe_serving.kernels.registry import best_kernel, serve_resident
from moe_serving.layers.gating import Choice, balance_loss
from moe_serving.models.classifier import WindowClassifier
from moe_serving.models.config import ClassifierConfig, DecoderConfig, TranslationConfig
from moe_serving.models.decoder import DecoderLM
from moe_serving.models.families import build
from moe_serving.models.rows import KVCache
from moe_serving.models.translation import EncoderDecoder

LM = DecoderConfig(
    vocabulary_size=50, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_head=8, d_expert=24,
    n_experts=5, top_k=2, max_length=40,
)  # fmt: skip
TRANSLATION = TranslationConfig(
    vocabulary_size=50, d_model=32, n_heads=4, d_head=8, d_expert=24, n_encoder_layers=2,
    n_decoder_layers=2, encoder_moe=(1,), decoder_moe=(0, 1), n_experts=4, top_k=1, max_length=40,
)  # fmt: skip
CLASSIFIER = ClassifierConfig(
    n_channels=6, window_length=64, patch_length=8, n_classes=5, d_model=32, n_layers=2, n_heads=2,
    d_expert=24, n_experts=4,
)  # fmt: skip


@cache
def served_lm() -> DecoderLM:
    torch.manual_seed(5)
    model = DecoderLM(LM).eval()
    serve_resident(model.moe_layers(), best_kernel())
    return model


@cache
def served_translator() -> EncoderDecoder:
    torch.manual_seed(5)
    model = EncoderDecoder(TRANSLATION).eval()
    serve_resident(model.moe_layers(), best_kernel())
    return model


def rows(parts: list[tuple[Tensor, int, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, positions and slots of (tokens, first position, slot) one after the other."""
    return (
        torch.cat([tokens for tokens, _, _ in parts]),
        torch.cat([first + torch.arange(len(tokens)) for tokens, first, _ in parts]),
        torch.cat([torch.full((len(tokens),), slot) for tokens, _, slot in parts]),
    )


def token_rows(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randint(2, 50, shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_any_schedule_of_steps_gives_the_whole_sequences(seed: int) -> None:
    """However prompts and single tokens of many sequences are mixed, logits are the forward's."""
    rng = np.random.default_rng(seed)
    model = served_lm()
    lengths = rng.integers(1, 21, size=rng.integers(1, 5)).tolist()
    slots = rng.permutation(5)[: len(lengths)].tolist()
    sequences = [token_rows((length,), seed) for seed, length in enumerate(lengths)]
    cache, done = model.new_cache(5, 24), [0] * len(lengths)
    found: list[list[Tensor]] = [[] for _ in lengths]

    while any(at < length for at, length in zip(done, lengths, strict=True)):
        parts, owners = [], []
        for s, sequence in enumerate(sequences):
            count = min(int(rng.choice([0, 1, 1, 2, 9])), lengths[s] - done[s])
            if count:
                parts.append((sequence[done[s] : done[s] + count], done[s], slots[s]))
                owners += [s] * count
                done[s] += count
        if parts:
            for owner, logits_V in zip(owners, model.step(*rows(parts), cache), strict=True):
                found[owner].append(logits_V)

    for sequence, logits in zip(sequences, found, strict=True):
        with torch.no_grad():
            whole = model(sequence[None])[0]
        torch.testing.assert_close(torch.stack(logits), whole, rtol=1e-4, atol=1e-5)


def test_a_sequence_does_not_depend_on_its_batch_mates() -> None:
    """A sequence decoded among others gets the logits it gets alone."""
    model = served_lm()
    mine, others = token_rows((12,)), token_rows((4, 12), seed=1)
    alone, crowded = model.new_cache(1), model.new_cache(6)
    model.step(*rows([(mine[:6], 0, 0)]), alone)
    model.step(*rows([(other[:8], 0, s) for s, other in enumerate(others)]), crowded)
    model.step(*rows([(mine[:6], 0, 5)]), crowded)

    for at in range(6, 12):
        by_itself = model.step(*rows([(mine[at : at + 1], at, 0)]), alone)[0]
        mates = [(other[at : at + 1], at + 2, s) for s, other in enumerate(others)]
        among = model.step(*rows([*mates, (mine[at : at + 1], at, 5)]), crowded)[-1]
        torch.testing.assert_close(among, by_itself, rtol=1e-4, atol=1e-5)


def test_a_slot_may_be_used_again() -> None:
    """A new sequence in a used slot gets what it gets in a fresh cache."""
    model = served_lm()
    cache = model.new_cache(1)
    model.step(*rows([(token_rows((20,)), 0, 0)]), cache)
    second = token_rows((7,), seed=9)

    reused = model.step(*rows([(second, 0, 0)]), cache)

    assert torch.equal(reused, model.step(*rows([(second, 0, 0)]), model.new_cache(1)))


def test_only_wanted_rows_get_logits() -> None:
    """`wanted` picks rows before the head: the same logits, fewer of them."""
    model = served_lm()
    tokens = token_rows((9,))
    everything = model.step(*rows([(tokens, 0, 0)]), model.new_cache(1))

    last = model.step(*rows([(tokens, 0, 0)]), model.new_cache(1), wanted=torch.tensor([8]))

    torch.testing.assert_close(last, everything[8:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([(token_rows((3,)), 0, 4)], "slot 4 is not there"),
        ([(token_rows((3,)), 8, 0)], "room for 10"),
        ([(token_rows((3,)), 0, -1)], "slot -1 is not there"),
        (
            [(token_rows((2,)), 0, 0), (token_rows((2,)), 0, 1), (token_rows((1,)), 2, 0)],
            "together",
        ),
        ([(token_rows((2,)), 0, 0), (token_rows((2,)), 0, 0)], "together"),
    ],
)  # fmt: skip
def test_rows_without_a_place_are_refused(parts: list[tuple[Tensor, int, int]], said: str) -> None:
    """Slots and positions beyond the cache, and rows out of order, are a `DataError`."""
    model = served_lm()

    with pytest.raises(DataError, match=said):
        model.step(*rows(parts), model.new_cache(3, 10))


@settings(max_examples=10, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 14), st.integers(2, 12)), min_size=1, max_size=4),
    prompt=st.integers(1, 5),
)
def test_translations_side_by_side_equal_the_padded_batch(
    lengths: list[tuple[int, int]], prompt: int
) -> None:
    """Sources read together and targets written in steps give the padded forward's logits."""
    model = served_translator()
    sources = [token_rows((n,), seed) for seed, (n, _) in enumerate(lengths)]
    targets = [token_rows((n,), 50 + seed) for seed, (_, n) in enumerate(lengths)]
    cache = model.new_cache(len(lengths) + 1)
    model.encode(*rows([(source, 0, s + 1) for s, source in enumerate(sources)]), cache)

    found: list[list[Tensor]] = [[] for _ in lengths]
    begun = [(t[: min(prompt, len(t))], 0, s + 1) for s, t in enumerate(targets)]
    owners = [s for s, (part, _, _) in enumerate(begun) for _ in range(len(part))]
    for owner, logits_V in zip(owners, model.step(*rows(begun), cache), strict=True):
        found[owner].append(logits_V)
    for at in range(prompt, 12):
        going = [s for s, target in enumerate(targets) if at < len(target)]
        if going:
            step = rows([(targets[s][at : at + 1], at, s + 1) for s in going])
            for owner, logits_V in zip(going, model.step(*step, cache), strict=True):
                found[owner].append(logits_V)

    padded = torch.nn.utils.rnn.pad_sequence(sources, batch_first=True)
    written = torch.nn.utils.rnn.pad_sequence(targets, batch_first=True)
    with torch.no_grad():
        whole = model(padded, written)
    for s, logits in enumerate(found):
        torch.testing.assert_close(
            torch.stack(logits), whole[s, : len(targets[s])], rtol=1e-4, atol=1e-4
        )


def test_a_source_must_begin_at_its_beginning() -> None:
    """A part of a source cannot be read by itself: every row sees the whole."""
    model = served_translator()

    with pytest.raises(DataError, match="begins at 3, not at 0"):
        model.encode(*rows([(token_rows((4,)), 3, 0)]), model.new_cache(1))


def test_windows_are_classified_one_by_one() -> None:
    """A window's classes do not depend on the windows beside it; served equals trained."""
    torch.manual_seed(5)
    model = WindowClassifier(CLASSIFIER).eval()
    windows = torch.randn(7, 64, 6)
    trained = model(windows).detach()
    serve_resident(model.moe_layers(), best_kernel())

    with torch.no_grad():
        alone = torch.cat([model(window[None]) for window in windows])

    torch.testing.assert_close(alone, trained, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [LM, TRANSLATION, CLASSIFIER], ids=lambda c: type(c).__name__)
def test_every_parameter_learns(
    config: DecoderConfig | TranslationConfig | ClassifierConfig,
) -> None:
    """A training step gives every parameter a gradient, and each expert layer a choice."""
    torch.manual_seed(5)
    model = build(config)
    choices: list[Choice] = []
    match model:
        case DecoderLM():
            answer = model(token_rows((16, 30)), choices)
        case EncoderDecoder():
            answer = model(token_rows((16, 30)), token_rows((16, 20)), choices)
        case WindowClassifier():
            answer = model(torch.randn(64, 64, 6), choices)

    (answer.square().mean() + sum(balance_loss(choice) for choice in choices)).backward()

    assert len(choices) == len(list(model.moe_layers()))
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


def test_expert_layers_are_numbered_in_order() -> None:
    """Layers carry the numbers that stores and files know them by, an encoder's first."""
    for config in (LM, TRANSLATION, CLASSIFIER):
        numbers = [layer.number for layer in build(config).moe_layers()]
        assert numbers == list(range(len(numbers)))


def test_a_cache_says_what_it_takes() -> None:
    """A cache's bytes are two tensors a layer, allocated at once."""
    cache = KVCache(3, n_slots=2, n_heads=4, max_length=10, d_head=8)

    assert cache.size_bytes == 3 * 2 * (2 * 4 * 10 * 8) * 4
    assert served_lm().new_cache(2).size_bytes == 2 * 2 * (2 * 2 * 40 * 8) * 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"top_k": 6}, "top_k is 6, but there are 5 experts"),
        ({"d_head": 7}, "rotary positions need it even"),
        ({"n_kv_heads": 3}, "does not divide n_heads"),
        ({"d_expert": 0}, "d_expert is 0"),
    ],
)
def test_impossible_models_are_refused(change: dict[str, int], said: str) -> None:
    """A record that no model can be built from is a `ConfigError` that names the field."""
    fields = {name: getattr(LM, name) for name in LM.__struct_fields__} | change

    with pytest.raises(ConfigError, match=said):
        build(DecoderConfig(**fields))
