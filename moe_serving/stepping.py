"""The generating families as `batching` steps them: a language model, and a translation."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_serving.models.decoder import DecoderLM
from moe_serving.models.translation import EncoderDecoder
from moe_serving.requests import Generate


class LanguageSteps:
    """A language model with a cache of `slots` sequences of up to `length` tokens."""

    can_echo = True

    def __init__(self, model: DecoderLM, *, slots: int, length: int) -> None:
        self._model = model
        self._cache = model.new_cache(slots, length)
        self._device = model.embedding.weight.device
        self.vocabulary = model.config.vocabulary_size
        self.longest = self._cache.max_length

    def begin(self, work: Generate) -> list[int]:
        """The prompt itself."""
        return list(work.tokens)

    def read(self, sources: Sequence[tuple[int, Sequence[int]]]) -> int:  # noqa: ARG002
        """Nothing: a prompt is read in the steps."""
        return 0

    def step(
        self, tokens: list[int], positions: list[int], slots: list[int], wanted: list[int]
    ) -> Tensor:
        """Logits of the wanted rows."""
        tokens_N, positions_N, slots_N, wanted_W = (
            _rows(each, self._device) for each in (tokens, positions, slots, wanted)
        )
        return self._model.step(tokens_N, positions_N, slots_N, self._cache, wanted_W)


class TranslationSteps:
    """An encoder-decoder with a cache of `slots` translations of up to `length` tokens."""

    can_echo = False

    def __init__(self, model: EncoderDecoder, *, slots: int, length: int) -> None:
        self._model = model
        self._cache = model.new_cache(slots, length)
        self._device = model.embedding.weight.device
        self.vocabulary = model.config.vocabulary_size
        self.longest = self._cache.own.max_length

    def begin(self, work: Generate) -> list[int]:  # noqa: ARG002
        """The start of a translation; what is translated is read apart."""
        return [self._model.config.start_id]

    def read(self, sources: Sequence[tuple[int, Sequence[int]]]) -> int:
        """Encode whole sources, several at a time."""
        tokens = [token for _, source in sources for token in source]
        positions = [place for _, source in sources for place in range(len(source))]
        slots = [slot for slot, source in sources for _ in source]
        tokens_N, positions_N, slots_N = (
            _rows(each, self._device) for each in (tokens, positions, slots)
        )
        self._model.encode(tokens_N, positions_N, slots_N, self._cache)
        return len(tokens)

    def step(
        self, tokens: list[int], positions: list[int], slots: list[int], wanted: list[int]
    ) -> Tensor:
        """Logits of the wanted rows."""
        tokens_N, positions_N, slots_N, wanted_W = (
            _rows(each, self._device) for each in (tokens, positions, slots, wanted)
        )
        return self._model.step(tokens_N, positions_N, slots_N, self._cache, wanted_W)


def _rows(numbers: list[int], device: torch.device) -> Tensor:
    # With their type: there may be none, and a tensor of nothing would be one of floats.
    return torch.tensor(numbers, dtype=torch.long, device=device)
