"""Texts as tokens: what a manifest names as a model's tokenizer."""

import codecs
from collections.abc import Iterable, Sequence
from typing import Protocol

from federation.errors import StoreError


class Tokenizer(Protocol):
    """Text to tokens and back. `start` begins a translation, `end` ends an answer; -1: none."""

    @property
    def start(self) -> int:
        """The token that stands before the first."""
        ...

    @property
    def end(self) -> int:
        """The token after which nothing comes."""
        ...

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without `start` and `end`.

        Raises:
            ValueError: The tokenizer knows tokens only by their numbers.
        """
        ...

    def decoder(self) -> "Decoder":
        """What makes text of tokens as they come."""
        ...


class Decoder(Protocol):
    """Text of one answer, piece by piece; a character may need several tokens."""

    def push(self, token: int) -> str:
        """What this token adds; empty while a character is not whole."""
        ...

    def flush(self) -> str:
        """What is left at the end."""
        ...


class ByteTokenizer:
    """UTF-8 bytes as ByT5 numbers them (arXiv:2105.13626): byte b is token b + 3.

    Token 0 pads and starts, 1 ends, 2 stands for nothing known; so there are 259.
    """

    vocabulary_size = 259
    start, end = 0, 1

    def encode(self, text: str) -> list[int]:
        """The text's bytes; what is no character (a lone surrogate) becomes a question mark."""
        return [byte + 3 for byte in text.encode("utf-8", errors="replace")]

    def decoder(self) -> Decoder:
        """Gives a character when its last byte is there."""
        return _ByteDecoder()


class _ByteDecoder:
    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return self._utf8.decode(bytes([token - 3])) if 3 <= token < 259 else ""

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class NumberTokenizer:
    """Tokens by their numbers, for checkpoints that come without a tokenizer of ours."""

    start = end = -1

    def encode(self, text: str) -> list[int]:
        """Refuses all text."""
        raise ValueError(f"this model takes tokens by their numbers, not text ({len(text)} long)")

    def decoder(self) -> Decoder:
        """Writes each number, with a blank before it."""
        return _NumberDecoder()


class _NumberDecoder:
    def push(self, token: int) -> str:
        return f" {token}"

    def flush(self) -> str:
        return ""


_TOKENIZERS: dict[str, Tokenizer] = {"bytes": ByteTokenizer(), "numbers": NumberTokenizer()}


def tokenizer_named(name: str) -> Tokenizer:
    """The tokenizer that a manifest names.

    Raises:
        StoreError: there is none of this name.
    """
    if name not in _TOKENIZERS:
        raise StoreError(
            f"tokenizer {name!r} is not known; expected {' or '.join(_TOKENIZERS)}: "
            "publish the model with one of them"
        )
    return _TOKENIZERS[name]


def decode(tokenizer: Tokenizer, tokens: Iterable[int]) -> str:
    """The whole text of these tokens."""
    return "".join(pieces(tokenizer, list(tokens)))


def pieces(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[str]:
    """What each token adds to the text, so that together they are all of it."""
    decoder = tokenizer.decoder()
    found = [decoder.push(token) for token in tokens]
    if found:
        found[-1] += decoder.flush()
    return found
