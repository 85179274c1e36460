"""One edition of a text into another, for a mixture-of-experts encoder-decoder."""

from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cloud.trainers.plans import DataPlan, TrainPlan
from cloud.trainers.task import IGNORED, Task
from cloud.trainers.tasks.labelled import sum_of
from federation.datasets.cached import load_corpus
from federation.datasets.texts import pair
from federation.errors import ConfigError
from moe_serving.layers.gating import Choice
from moe_serving.models.config import TranslationConfig
from moe_serving.models.translation import EncoderDecoder
from moe_serving.tokens import ByteTokenizer

BLOCK = 25
"""So many pairs that follow each other are held out together: neighbours tell of each other."""

_ARROW = "->"

Pairs: TypeAlias = list[tuple[list[int], list[int]]]


@dataclass(frozen=True, slots=True, eq=False)
class TokenPairs:
    """Sources and targets, as they are served: a source without marks, a target with an end.

    Inputs are one tensor (B, width + L): the source, padded, and behind it what the decoder is
    given. Targets are (B, L). L is what the longest target of the batch needs; no source is
    longer than `width`.
    """

    pairs: Pairs
    width: int
    config: TranslationConfig

    def __len__(self) -> int:
        """How many there are."""
        return len(self.pairs)

    def batch(self, places: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Sources and what the decoder is given, and the token after each of that."""
        chosen = [self.pairs[place] for place in places]
        length = 1 + max(len(target) for _, target in chosen)
        x = np.full((len(chosen), self.width + length), self.config.pad_id, np.int64)
        y = np.full((len(chosen), length), IGNORED, np.int64)
        for row, (source, target) in enumerate(chosen):
            x[row, : len(source)] = source
            given = [self.config.start_id, *target]
            x[row, self.width : self.width + len(given)] = given
            y[row, : len(given)] = [*target, self.config.end_id]
        return torch.from_numpy(x), torch.from_numpy(y)


def of_pairs(plan: TrainPlan, config: TranslationConfig, cache: Path) -> Task:
    """An encoder-decoder from one corpus to another, `data.set` being `from->to`.

    Pairs of which one side is longer than `data.length` bytes are left out. Of the rest, every so
    many blocks of neighbours are held out, for a share of `data.test_share`.

    Raises:
        ConfigError: a set that names no two corpora, a vocabulary without room for bytes, or
            texts longer than the model takes.
        DataError: a corpus that is unknown or was not fetched, or two that do not align.
    """
    tokenizer = ByteTokenizer()
    if config.vocabulary_size < tokenizer.vocabulary_size or plan.data.length >= config.max_length:
        raise ConfigError(
            f"moe.vocabulary_size is {config.vocabulary_size} and moe.max_length "
            f"{config.max_length}; expected at least {tokenizer.vocabulary_size} for bytes and "
            f"more than data.length, {plan.data.length}: correct [moe]"
        )
    if (config.start_id, config.end_id, config.pad_id) != (tokenizer.start, tokenizer.end, 0):
        raise ConfigError(
            f"moe has start_id {config.start_id}, end_id {config.end_id} and pad_id "
            f"{config.pad_id}; bytes have 0, 1 and 0: leave them out"
        )
    train, test = split_pairs(aligned(plan.data.set, cache), plan.data)
    torch.manual_seed(plan.seed)
    model, width = EncoderDecoder(config), plan.data.length

    def forward(x: Tensor) -> tuple[Tensor, Tensor | None]:
        choices: list[Choice] = []
        source = x[:, :width]
        longest = int((source != config.pad_id).sum(dim=1).max())
        logits = model(source[:, :longest], x[:, width:], choices)
        return logits.transpose(1, 2), plan.balance * sum_of(choices)

    return Task(
        model=model,
        train=TokenPairs(_encoded(train, tokenizer), width, config),
        test=TokenPairs(_encoded(test, tokenizer), width, config),
        forward=forward,
    )


def aligned(name: str, cache: Path) -> list[tuple[str, str]]:
    """The pairs of the two corpora that `from->to` names.

    Raises:
        ConfigError: a name that is not of this form.
        DataError: as `of_pairs`.
    """
    one, arrow, other = name.partition(_ARROW)
    if not (one and arrow and other):
        raise ConfigError(
            f'data.set is {name!r}; a translation goes from one corpus to another: write "from'
            f'{_ARROW}to", as in "kjv{_ARROW}reina-valera"'
        )
    return pair(load_corpus(one, cache=cache), load_corpus(other, cache=cache))


def split_pairs(
    pairs: list[tuple[str, str]], plan: DataPlan
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Pairs to train and to test on; with `at_most`, so many to train, spread evenly."""
    fits = [max(len(one.encode()), len(other.encode())) <= plan.length for one, other in pairs]
    every = max(2, round(1 / plan.test_share))
    train: list[tuple[str, str]] = []
    test: list[tuple[str, str]] = []
    for place, (both, is_short) in enumerate(zip(pairs, fits, strict=True)):
        if is_short:
            is_held = place // BLOCK % every == every - 1
            (test if is_held else train).append(both)
    if plan.at_most and plan.at_most < len(train):
        train = [train[place * len(train) // plan.at_most] for place in range(plan.at_most)]
    return train, test


def _encoded(pairs: list[tuple[str, str]], tokenizer: ByteTokenizer) -> Pairs:
    return [(tokenizer.encode(one), tokenizer.encode(other)) for one, other in pairs]
