"""Continuous batching: each step holds a row of every going answer, and parts of new prompts.

A sequence joins between two steps and leaves when it ends, so nobody waits for the longest of a
batch. Prompts are read in parts of what a step has room for, oldest first, so that a long one
delays the others' next token by no more than one step.
"""

import heapq
from collections.abc import Sequence as Several
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from moe_serving.requests import Ending, Generate, Generated, RefusedError, Scored, Ticket, Work
from moe_serving.sampling import choose, score


class Batcher(Protocol):
    """What an engine drives: it holds running tickets and does a step of their work.

    Only the engine's thread calls it, but for `check`.
    """

    def check(self, work: Work) -> None:
        """Refuse what the model cannot answer; from any thread.

        Raises:
            RefusedError: `invalid`, and which part of the request is.
        """
        ...

    @property
    def running(self) -> Several[Ticket]:
        """Those who joined and have not left."""
        ...

    def left_tokens(self) -> int:
        """What is still to do of those that run, at most."""
        ...

    def patience_s(self, waiting: int, waited_s: float, left_s: float) -> float:
        """How long to wait for more before a step; 0: do not.

        `waiting` is the tokens that wait, `waited_s` how long the oldest has, and `left_s` how
        long the most urgent still can.
        """
        ...

    def has_room(self, ticket: Ticket) -> bool:
        """Whether this one may join now."""
        ...

    def join(self, ticket: Ticket) -> None:
        """Take it into the next step."""
        ...

    def leave(self, ticket: Ticket) -> None:
        """Forget it, wherever its work stands."""
        ...

    def step(self, now: float) -> tuple[int, list[tuple[Ticket, Ending]]]:
        """One step of the model: tokens worked off, and who has come to an end by it."""
        ...


class Stepping(Protocol):
    """A generating model, as its family steps it."""

    vocabulary: int
    longest: int
    can_echo: bool

    def begin(self, work: Generate) -> list[int]:
        """The tokens that the model's own sequence begins with."""
        ...

    def read(self, sources: Several[tuple[int, Several[int]]]) -> int:
        """Read the sources of slots that begin, if the family has such; how many tokens."""
        ...

    def step(
        self, tokens: list[int], positions: list[int], slots: list[int], wanted: list[int]
    ) -> Tensor:
        """Logits of the wanted rows."""
        ...


@dataclass(slots=True, eq=False)
class _Sequence:
    """One answer in the making: the model's own sequence, and how much of it the cache holds."""

    ticket: Ticket
    work: Generate
    slot: int
    tokens: list[int]
    prompt: int
    rng: np.random.Generator
    read: int = 0
    answer: list[Scored] = field(default_factory=list)
    told: int = 0
    has_source: bool = True

    @property
    def scores_prompt(self) -> bool:
        return self.work.echo and self.work.top_logprobs >= 0


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows of one sequence in a step: tokens `first` to `last` of it."""

    sequence: _Sequence
    first: int
    last: int

    @property
    def wanted(self) -> range:
        """Which of its rows' logits are of use, counted in the sequence."""
        sequence = self.sequence
        if sequence.scores_prompt:
            return range(self.first, self.last)
        return range(self.last - (self.last == len(sequence.tokens)), self.last)


class Continuous:
    """The batcher of language models and of translation.

    `slots` answers run at a time; a step has at most `rows` rows, but always one for each going
    answer. `end` is the token that ends an answer (-1: none does).
    """

    def __init__(self, model: Stepping, *, slots: int, rows: int, end: int) -> None:
        self._model = model
        self._rows = max(rows, slots)
        self._end = end
        self._free = list(range(slots))
        self._sequences: dict[Ticket, _Sequence] = {}

    def check(self, work: Work) -> None:
        """Refuse an empty or too long prompt, and numbers that are no tokens."""
        if not isinstance(work, Generate):
            raise RefusedError("invalid", "this model takes a prompt, not windows")
        if not work.tokens:
            raise RefusedError("invalid", "the prompt is empty; one token at least is needed")
        if work.echo and not self._model.can_echo:
            raise RefusedError("invalid", "a translation has no prompt to echo", pointer="echo")
        room = self._model.longest
        length = len(self._model.begin(work)) + work.max_tokens
        if max(length, len(work.tokens)) > room:
            raise RefusedError(
                "invalid",
                f"prompt of {len(work.tokens)} tokens and answer of up to {work.max_tokens} do not "
                f"fit; the model has room for {room}: shorten the prompt, or lower max_tokens",
                pointer="prompt",
            )
        if not 0 <= min(work.tokens) <= max(work.tokens) < self._model.vocabulary:
            raise RefusedError(
                "invalid",
                f"the prompt holds a token outside 0 to {self._model.vocabulary - 1}",
                pointer="prompt",
            )

    @property
    def running(self) -> Several[Ticket]:
        """Those who joined and have not left."""
        return list(self._sequences)

    def left_tokens(self) -> int:
        """Of prompts what is not read, of answers what is not made."""
        return sum(s.prompt + s.work.max_tokens - s.read for s in self._sequences.values())

    def patience_s(self, waiting: int, waited_s: float, left_s: float) -> float:  # noqa: ARG002
        """Never: whoever comes next joins at the next step."""
        return 0.0

    def has_room(self, ticket: Ticket) -> bool:  # noqa: ARG002
        """Whether a slot is free."""
        return bool(self._free)

    def join(self, ticket: Ticket) -> None:
        """Give it the lowest free slot: caches read slots that adjoin without copying."""
        work = ticket.work
        if not isinstance(work, Generate):
            raise TypeError("a ticket was not checked before it joined")
        tokens = self._model.begin(work)
        self._sequences[ticket] = sequence = _Sequence(
            ticket,
            work,
            heapq.heappop(self._free),
            tokens,
            prompt=len(tokens),
            rng=np.random.default_rng(work.seed),
            has_source=False,
        )
        if work.echo:
            sequence.answer.append(Scored(tokens[0]))
            if not sequence.scores_prompt:
                sequence.answer += [Scored(token) for token in tokens[1:]]

    def leave(self, ticket: Ticket) -> None:
        """Free its slot."""
        sequence = self._sequences.pop(ticket, None)
        if sequence is not None:
            heapq.heappush(self._free, sequence.slot)

    def step(self, now: float) -> tuple[int, list[tuple[Ticket, Ending]]]:
        """Run the model once on a row of each answer and as much of prompts as has room."""
        read = self._read_sources()
        parts = self._parts()
        logits_WV = self._run(parts)
        ended = self._take(parts, logits_WV, now)
        for ticket, _ in ended:
            self.leave(ticket)
        return read + sum(part.last - part.first for part in parts), ended

    def _read_sources(self) -> int:
        """As many as a step has room for, and one at least."""
        fresh: list[tuple[int, Several[int]]] = []
        rows = 0
        for each in self._sequences.values():
            if not each.has_source and (not fresh or rows + len(each.work.tokens) <= self._rows):
                each.has_source = True
                rows += len(each.work.tokens)
                fresh.append((each.slot, each.work.tokens))
        return self._model.read(fresh) if fresh else 0

    def _parts(self) -> list[_Part]:
        """Going answers first, then prompts in the order they came; rows stand by slot."""
        ready = [s for s in self._sequences.values() if s.has_source]
        going = [s for s in ready if len(s.tokens) - s.read == 1]
        parts = [_Part(s, s.read, s.read + 1) for s in going]
        room = self._rows - len(parts)
        for sequence in ready:
            left = len(sequence.tokens) - sequence.read
            if left > 1 and room > 0:
                rows = min(left, room)
                parts.append(_Part(sequence, sequence.read, sequence.read + rows))
                room -= rows
        return sorted(parts, key=lambda part: part.sequence.slot)

    def _run(self, parts: list[_Part]) -> Tensor:
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        wanted: list[int] = []
        for part in parts:
            start = len(tokens) - part.first
            wanted += [start + place for place in part.wanted]
            tokens += part.sequence.tokens[part.first : part.last]
            positions += range(part.first, part.last)
            slots += [part.sequence.slot] * (part.last - part.first)
        return self._model.step(tokens, positions, slots, wanted)

    def _take(
        self, parts: list[_Part], logits_WV: Tensor, now: float
    ) -> list[tuple[Ticket, Ending]]:
        """Score prompts, choose next tokens, and see who has come to an end."""
        is_sound = torch.isfinite(logits_WV).all(dim=-1).tolist()
        ended: list[tuple[Ticket, Ending]] = []
        begin, going = 0, []
        for part in parts:
            sequence, rows = part.sequence, slice(begin, begin + len(part.wanted))
            begin = rows.stop
            sequence.read = part.last
            if not all(is_sound[rows]):
                ended.append((sequence.ticket, Ending("failed", reason=_UNSOUND)))
                continue
            if sequence.scores_prompt and part.first < sequence.prompt:
                _score_prompt(sequence, part, logits_WV[rows])
            if part.last == len(sequence.tokens):
                going.append((sequence, rows.stop - 1))
        ended += self._go_on(going, logits_WV, now)
        return ended

    def _go_on(
        self, going: list[tuple[_Sequence, int]], logits_WV: Tensor, now: float
    ) -> list[tuple[Ticket, Ending]]:
        """One more token for each of these, whose last row is given."""
        making = [(s, row) for s, row in going if s.work.max_tokens > 0]
        ended = [_end(s, "length") for s, _ in going if s.work.max_tokens == 0]
        if not making:
            return ended
        logits_NV = logits_WV[[row for _, row in making]]
        works = [s.work for s, _ in making]
        chosen = choose(logits_NV, works, [s.rng.random() for s, _ in making])
        scores = [Scored(token) for token in chosen]
        told = [n for n, work in enumerate(works) if work.top_logprobs >= 0]
        if told:
            tops = [works[n].top_logprobs for n in told]
            found = score(logits_NV[told], [chosen[n] for n in told], tops)
            for n, scored in zip(told, found, strict=True):
                scores[n] = scored
        for (sequence, _), scored in zip(making, scores, strict=True):
            sequence.ticket.first_at = sequence.ticket.first_at or now
            sequence.ticket.made += 1
            if ending := self._append(sequence, scored):
                ended.append(ending)
        return ended

    def _append(self, sequence: _Sequence, scored: Scored) -> tuple[Ticket, Ending] | None:
        if scored.token == self._end:
            return _end(sequence, "stop")
        sequence.tokens.append(scored.token)
        sequence.answer.append(scored)
        made = len(sequence.tokens) - sequence.prompt
        for run in sequence.work.stop:
            if made >= len(run) and tuple(sequence.tokens[-len(run) :]) == run:
                del sequence.answer[len(sequence.answer) - len(run) :]
                return _end(sequence, "stop")
        if made >= sequence.work.max_tokens:
            return _end(sequence, "length")
        _tell(sequence)
        return None


_UNSOUND = "the model gave numbers that are not finite: its weights are damaged"


def _score_prompt(sequence: _Sequence, part: _Part, logits_WV: Tensor) -> None:
    """Row n says how likely token n + 1 of the prompt was."""
    last = min(part.last, sequence.prompt - 1)
    following = sequence.tokens[part.first + 1 : last + 1]
    if following:
        tops = [sequence.work.top_logprobs] * len(following)
        sequence.answer += score(logits_WV[: len(following)], following, tops)


def _tell(sequence: _Sequence) -> None:
    """Stream what cannot be taken back: what may be the beginning of a stop is held."""
    if not sequence.work.streams:
        return
    held = max((len(run) - 1 for run in sequence.work.stop), default=0)
    until = len(sequence.answer) - held
    if until > sequence.told:
        sequence.ticket.tell(Generated(tuple(sequence.answer[sequence.told : until])))
        sequence.told = until


def _end(sequence: _Sequence, finish: str) -> tuple[Ticket, Ending]:
    answer = tuple(sequence.answer[sequence.told :])
    result = Generated(answer, "stop" if finish == "stop" else "length")
    return sequence.ticket, Ending("ok", result)
