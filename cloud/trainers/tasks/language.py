"""The next byte of a text, for a mixture-of-experts language model."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cloud.trainers.plans import DataPlan, TrainPlan
from cloud.trainers.task import Task
from cloud.trainers.tasks.labelled import sum_of
from federation.datasets.cached import load_corpus
from federation.datasets.texts import Corpus
from federation.errors import ConfigError
from moe_serving.layers.gating import Choice
from moe_serving.models.config import DecoderConfig
from moe_serving.models.decoder import DecoderLM
from moe_serving.tokens import ByteTokenizer


@dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """Windows of `length` tokens of one long text; each predicts its next tokens.

    They lie side by side; with `at_most` so many of them, spread evenly over the text, since its
    beginning alone speaks of one time only.
    """

    tokens: NDArray[np.int64]
    length: int
    at_most: int = 0

    def __len__(self) -> int:
        """How many there are."""
        return min(self._all, self.at_most) if self.at_most else self._all

    @property
    def _all(self) -> int:
        return (len(self.tokens) - 1) // self.length

    def batch(self, places: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Tokens (B, length), and the token after each (B, length)."""
        spread = places * self._all // max(1, len(self))
        at = spread[:, None] * self.length + np.arange(self.length + 1)
        cut = torch.from_numpy(self.tokens[at])
        return cut[:, :-1], cut[:, 1:]


def of_text(plan: TrainPlan, config: DecoderConfig, cache: Path) -> Task:
    """A decoder language model on the bytes of a corpus; authors may be held out.

    Raises:
        ConfigError: a vocabulary without room for bytes, windows longer than the model takes,
            or authors the corpus does not have.
        DataError: a corpus that is unknown or was not fetched.
    """
    tokenizer = ByteTokenizer()
    if config.vocabulary_size < tokenizer.vocabulary_size or plan.data.length > config.max_length:
        raise ConfigError(
            f"moe.vocabulary_size is {config.vocabulary_size} and moe.max_length "
            f"{config.max_length}; expected at least {tokenizer.vocabulary_size} for bytes and "
            f"{plan.data.length} for data.length: correct [moe]"
        )
    train, test = split_texts(load_corpus(plan.data.set, cache=cache), plan.data)
    torch.manual_seed(plan.seed)
    model = DecoderLM(config)

    def forward(x: Tensor) -> tuple[Tensor, Tensor | None]:
        choices: list[Choice] = []
        logits = model(x, choices)
        return logits.transpose(1, 2), plan.balance * sum_of(choices)

    return Task(model=model, train=train, test=test, forward=forward)


def split_texts(corpus: Corpus, plan: DataPlan) -> tuple[Windows, Windows]:
    """Windows to train and to test on: authors held out, else the last documents.

    Raises:
        ConfigError: authors the corpus does not have.
    """
    if unknown := [name for name in plan.held_out if name not in corpus.client_names]:
        raise ConfigError(
            f"data.held_out names {unknown[0]!r}; the authors of {corpus.name} are "
            f"{', '.join(corpus.client_names) or 'not known'}: name some of them, or none"
        )
    if plan.held_out and corpus.client is not None:
        held = {corpus.client_names.index(name) for name in plan.held_out}
        is_held = [int(author) in held for author in corpus.client]
    else:
        count = len(corpus.documents)
        cut = count - max(1, round(plan.test_share * count))
        is_held = [place >= cut for place in range(count)]
    documents = list(zip(corpus.documents, is_held, strict=True))
    train = _windows([text for text, held in documents if not held], plan.length, plan.at_most)
    return train, _windows([text for text, held in documents if held], plan.length)


def _windows(documents: list[str], length: int, at_most: int = 0) -> Windows:
    tokenizer = ByteTokenizer()
    tokens: list[int] = []
    for text in documents:
        tokens += [*tokenizer.encode(text), tokenizer.end]
    return Windows(np.array(tokens, np.int64), length, at_most)
