"""The active run: its newest model, its open round, and how updates become the next model."""

import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

import msgspec
import numpy as np

from cloud.config import RunPlan
from cloud.coordination.facts import RunMemory
from cloud.coordination.personal import own_base, read_mirror
from cloud.coordination.rounds import Attempt, Round
from federation.learning.aggregation.ballot import Ballot, Vote
from federation.learning.layers import model_part
from federation.learning.methods import method_named
from federation.learning.methods.record import Asked, Part
from federation.learning.uplink import absolute, unpack_update
from federation.protocol import codec
from federation.protocol.codec import Weights
from federation.protocol.messages import (
    INLINE_BYTES,
    Assignment,
    Content,
    LocalPlan,
    ModelSpec,
    Report,
)
from federation.protocol.mirror import MIRROR
from federation.protocol.transfer import content_of

NO_PACES: Mapping[str, float] = MappingProxyType({})
"""Everybody sends as fast as the link takes it."""

CHUNK_BYTES = 64 * 1024
"""How models are cut on their way down: passes every broker's default limit but one."""


REMEMBERED_ROUNDS = 50
"""What became of attempts is known for this many rounds."""


MAX_ATTEMPT = 64 + 1 + 9 + 1 + 64
"""The longest name of an attempt: run, number and device."""


def attempt_id(run: str, number: int, device: str) -> str:
    """The name of one device's part in one round; it may stand in a topic."""
    return f"{run}_{number}_{device}"


def parse_attempt(attempt: str) -> tuple[str, int, str] | None:
    """Run, round and device of an attempt; None where it is not one of ours.

    An attempt has one name: a device that writes its number in another way has no second.
    """
    # What is longer than a name of ours can be is not remembered: it may be hostile.
    return _parsed(attempt) if len(attempt) <= MAX_ATTEMPT else None


@lru_cache(maxsize=16_384)
def _parsed(attempt: str) -> tuple[str, int, str] | None:
    match attempt.split("_"):
        case [run, digits, device] if digits.isdecimal() and len(digits) < 10:
            number = int(digits)
            return (run, number, device) if attempt_id(run, number, device) == attempt else None
    return None


@dataclass(frozen=True, slots=True)
class Contribution:
    """An update that counts in the open round."""

    attempt: str
    device: str
    round: int
    update: Weights
    report: Report


class ActiveRun:
    """A run between its start and its end. `number` is the open round, or the last one."""

    def __init__(self, memory: RunMemory, *, shares_memory: bool = False) -> None:
        self.plan: RunPlan = memory.plan
        self.content: Content = memory.content
        self.model: bytes = memory.model
        self.weights: Weights = codec.decode(memory.model)
        self.memory = memory.memory
        self._method = method_named(memory.plan.method.name)
        self._params = self._method.settings(memory.plan.method.params)
        self.number: int = memory.round
        self.abandoned_in_a_row = memory.abandoned_in_a_row
        self.bytes_up, self.bytes_down = memory.bytes_up, memory.bytes_down
        self.gathering_since: float | None = None
        self._asked = dict(memory.asked)
        self._inline_bytes = sys.maxsize if shares_memory else INLINE_BYTES
        self._plans: dict[str, LocalPlan] = {}
        self._paces: Mapping[str, float] = NO_PACES
        self.round: Round | None = None
        if memory.is_open:
            self.round = Round(
                memory.round, memory.plan.policy, memory.deadline, memory.attempts.values()
            )
        self._parts = self._divide()
        self._bases: dict[str, tuple[Content, bytes]] = {}
        self._contributions: dict[str, Contribution] = {}
        for kept in memory.accepted:
            update = self.read_update(kept.data, kept.device)
            self.contribute(
                Contribution(kept.attempt, kept.device, kept.round, update, kept.report)
            )

    def was_asked(self, number: int, device: str) -> bool:
        """Whether this device was asked in this round, if the round is not long over."""
        return device in self._asked.get(number, ())

    @property
    def keeps_late(self) -> bool:
        """Whether an update of a round that is over may still count."""
        return self.plan.policy.late == "keep"

    def rng(self) -> np.random.Generator:
        """The generator that chooses devices for the round to come."""
        return np.random.default_rng([self.plan.seed, self.number + 1])

    def open_round(
        self, levels: Mapping[str, int], now: float, *, paces: Mapping[str, float] = NO_PACES
    ) -> Round:
        """Begin the next round with these devices, each with its capability's level.

        `paces` bounds what a device sends, in bytes a second. A hub that restarts forgets them.
        """
        self.number += 1
        self._paces = paces
        self.gathering_since = None
        self._contributions = {
            name: kept for name, kept in self._contributions.items() if kept.round < self.number
        }
        name, number = self.plan.name, self.number
        attempts = [
            Attempt(attempt_id(name, number, device), device, level=levels[device])
            for device in levels
        ]
        self._asked[self.number] = set(levels)
        self._asked.pop(self.number - REMEMBERED_ROUNDS, None)
        deadline = now + self.plan.policy.deadline_s
        self.round = Round(self.number, self.plan.policy, deadline, attempts)
        self._parts = self._divide()
        return self.round

    def assignment(self, attempt: Attempt, remaining_s: float) -> Assignment:
        """The letter that asks a device to train in the open round."""
        content, base = self._base(attempt.device)
        small = content.size <= self._inline_bytes
        return Assignment(
            attempt=attempt.attempt,
            run=self.plan.name,
            round=self.number,
            deadline_s=max(remaining_s, 0.0),
            base=content,
            plan=self.local_plan(attempt.device),
            inline=base if small else None,
        )

    def work(self, attempt: Attempt, remaining_s: float) -> tuple[Assignment, bytes]:
        """What a device is asked, with its base: for whoever trains in its place."""
        return self.assignment(attempt, remaining_s), self._base(attempt.device)[1]

    def content_named(self, digest: str) -> bytes | None:
        """The model, or what one device of the open round trains from; None if it is neither."""
        if digest == self.content.digest:
            return self.model
        if self._method.is_personal and self.round is not None:
            for entry in self.round.attempts.values():
                content, base = self._base(entry.device)
                if content.digest == digest:
                    return base
        return None

    def _base(self, device: str) -> tuple[Content, bytes]:
        """What this device trains from: the model, or its own where models are personal."""
        if not self._method.is_personal:
            return self.content, self.model
        if device not in self._bases:
            base = codec.encode(own_base(self.weights, device))
            self._bases[device] = content_of(base, CHUNK_BYTES), base
        return self._bases[device]

    def local_plan(self, device: str) -> LocalPlan:
        """How this device trains in the open round."""
        plan = self._plans.get(device)
        if plan is None:
            plan = self._plans[device] = self._plan_for(device)
        return plan

    def _plan_for(self, device: str) -> LocalPlan:
        training, part = self.plan.training, self._part(device)
        model = self.plan.students.get(device, self.plan.model)
        # A device's name is part of its seed, so no two devices draw the same batches, and a
        # device draws the same ones whoever else takes part.
        words = [self.plan.seed, self.number, zlib.crc32(device.encode())]
        seed = int(np.random.SeedSequence(words).generate_state(1)[0])
        return LocalPlan(
            model=ModelSpec(name=model.name, sizes={**model.sizes, **part.sizes}),
            method=MIRROR if self.plan.mirror else self._method.name,
            epochs=0 if device in self.plan.at_twin else training.epochs,
            max_steps=training.max_steps,
            batch_size=training.batch_size,
            learning_rate=training.learning_rate,
            momentum=training.momentum,
            weight_decay=training.weight_decay,
            seed=seed,
            layers=part.layers,
            uplink=msgspec.structs.replace(
                self.plan.uplink.as_letter(),
                pace=self._paces.get(device, self.plan.uplink.pace),
            ),
            params=self._params,
        )

    def _part(self, device: str) -> Part:
        """The device's part in the open round; whoever is late had all of the model."""
        return self._parts.get(device, Part())

    def _divide(self) -> dict[str, Part]:
        """The part of each device in the open round; one rule decides for all at once."""
        self._plans = {}
        if self.round is None:
            return {}
        levels = {entry.device: entry.level for entry in self.round.attempts.values()}
        asked = Asked(
            seed=self.plan.seed,
            round=self.number,
            devices=tuple(sorted(levels)),
            levels=levels,
            sizes=self.plan.model.sizes,
            model=self.plan.model.name,
            weights=model_part(self.weights),
            memory=self._kept(),
            params=self._params,
        )
        return self._method.parts(asked)

    def _kept(self) -> Weights:
        return codec.decode(self.memory) if self.memory else {}

    def read_update(self, data: bytes, device: str) -> Weights:
        """The tensors of an update, checked against what this device was asked to send.

        Raises:
            CodecError: unreadable, another shape or name, NaN or infinity.
        """
        if self.plan.mirror:
            return read_mirror(data)
        plan, base = self.local_plan(device), self.weights
        if self._method.is_personal:
            base = model_part(own_base(self.weights, device))
        return unpack_update(data, base, plan, narrower=self._method.narrower)

    def contribute(self, contribution: Contribution) -> None:
        """Add an update to the open round. A late one is told apart by its round."""
        self._contributions[contribution.attempt] = contribution

    @property
    def contributors(self) -> tuple[str, ...]:
        """The devices whose updates count in the open round, in order."""
        return tuple(sorted({kept.device for kept in self._contributions.values()}))

    def report(self) -> Report:
        """The sums of what the contributing devices reported."""
        return _sum_reports({name: c.report for name, c in self._contributions.items()})

    def close_round(self) -> None:
        """Aggregate what is in, in device order, into the newest model (semantics 2).

        A difference that travelled is added to the newest model, however old its own base. What
        is personal is never averaged: each update becomes the model of its own device.
        """
        if self.plan.mirror:
            pass
        elif self._method.is_personal:
            self._take_over()
        else:
            self._average()
        self.model = codec.encode(self.weights)
        self.content = content_of(self.model, CHUNK_BYTES)
        self._contributions, self._bases = {}, {}
        self.abandoned_in_a_row = 0
        self.round, self._parts, self._plans = None, {}, {}

    def _take_over(self) -> None:
        for kept in sorted(self._contributions.values(), key=lambda one: one.device):
            own = model_part(own_base(self.weights, kept.device))
            said = {**own, **absolute(kept.update, own, self.plan.uplink)}
            self.weights |= {f"{kept.device}/{name}": tensor for name, tensor in said.items()}

    def _average(self) -> None:
        votes = tuple(
            Vote(
                kept.device,
                self._proposal(kept),
                kept.report.samples,
                self.number - kept.round,
            )
            for kept in self._contributions.values()
        )
        ballot = Ballot(self.weights, votes, self._params, self._kept())
        outcome = self._method.aggregate(ballot)
        self.weights = outcome.weights
        self.memory = codec.encode(outcome.memory) if outcome.memory else b""

    def _proposal(self, kept: Contribution) -> Weights:
        """The weights an update proposes (semantics 18).

        A layer that a device holds back to add it next time is no change now. Left out of the
        mean, it would count in full today, through the others, and once more when it comes.
        """
        said = absolute(kept.update, self.weights, self.plan.uplink)
        defers = self.plan.uplink.residual and not self._part(kept.device).sizes
        return {**self.weights, **said} if defers else said

    def abandon_round(self) -> None:
        """Give the round up: the model stays, late updates that were kept stay for the next."""
        self.abandoned_in_a_row += 1
        self._contributions = {
            name: kept for name, kept in self._contributions.items() if kept.round < self.number
        }
        self.round, self._parts, self._plans = None, {}, {}


def _sum_reports(reports: Mapping[str, Report]) -> Report:
    ordered = [reports[name] for name in sorted(reports)]
    return Report(
        samples=sum(report.samples for report in ordered),
        steps=sum(report.steps for report in ordered),
        loss_sum=sum(report.loss_sum for report in ordered),
        correct=sum(report.correct for report in ordered),
        seconds=sum(report.seconds for report in ordered),
    )
