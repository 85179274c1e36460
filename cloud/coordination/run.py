"""The active run: its newest model, its open round, and how updates become the next model."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from cloud.config import RunPlan
from cloud.coordination.facts import RunMemory
from cloud.coordination.rounds import Attempt, Round
from federation.learning.aggregation import staleness_weight
from federation.learning.methods import method_named
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
from federation.protocol.transfer import content_of

CHUNK_BYTES = 64 * 1024
"""How models are cut on their way down: passes every broker's default limit but one."""


REMEMBERED_ROUNDS = 50
"""What became of attempts is known for this many rounds."""


def attempt_id(run: str, number: int, device: str) -> str:
    """The name of one device's part in one round; it may stand in a topic."""
    return f"{run}_{number}_{device}"


def parse_attempt(attempt: str) -> tuple[str, int, str] | None:
    """Run, round and device of an attempt; None where it is not one of ours."""
    match attempt.split("_"):
        case [run, number, device] if number.isdecimal() and len(number) < 10:
            return run, int(number), device
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

    def __init__(self, memory: RunMemory) -> None:
        self.plan: RunPlan = memory.plan
        self.content: Content = memory.content
        self.model: bytes = memory.model
        self.weights: Weights = codec.decode(memory.model)
        self.number: int = memory.round
        self.abandoned_in_a_row = memory.abandoned_in_a_row
        self.bytes_up, self.bytes_down = memory.bytes_up, memory.bytes_down
        self.gathering_since: float | None = None
        self._asked = dict(memory.asked)
        self.round: Round | None = None
        if memory.is_open:
            self.round = Round(
                memory.round, memory.plan.policy, memory.deadline, memory.attempts.values()
            )
        self._contributions: dict[str, Contribution] = {}
        for kept in memory.accepted:
            update = codec.decode(kept.data)
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

    def open_round(self, devices: tuple[str, ...], now: float) -> Round:
        """Begin the next round with these devices."""
        self.number += 1
        self.gathering_since = None
        self._contributions = {
            name: kept for name, kept in self._contributions.items() if kept.round < self.number
        }
        attempts = [Attempt(attempt_id(self.plan.name, self.number, d), d) for d in devices]
        self._asked[self.number] = set(devices)
        self._asked.pop(self.number - REMEMBERED_ROUNDS, None)
        deadline = now + self.plan.policy.deadline_s
        self.round = Round(self.number, self.plan.policy, deadline, attempts)
        return self.round

    def assignment(self, attempt: Attempt, remaining_s: float) -> Assignment:
        """The letter that asks a device to train in the open round."""
        small = self.content.size <= INLINE_BYTES
        return Assignment(
            attempt=attempt.attempt,
            run=self.plan.name,
            round=self.number,
            deadline_s=max(remaining_s, 0.0),
            base=self.content,
            plan=self.local_plan(attempt.device),
            inline=self.model if small else None,
        )

    def local_plan(self, device: str) -> LocalPlan:
        """How this device trains in the open round."""
        training, method = self.plan.training, self.plan.method
        # A device's name is part of its seed, so no two devices draw the same batches, and a
        # device draws the same ones whoever else takes part.
        words = [self.plan.seed, self.number, zlib.crc32(device.encode())]
        seed = int(np.random.SeedSequence(words).generate_state(1)[0])
        return LocalPlan(
            model=ModelSpec(name=self.plan.model.name, sizes=self.plan.model.sizes),
            method=method.name,
            epochs=training.epochs,
            max_steps=training.max_steps,
            batch_size=training.batch_size,
            learning_rate=training.learning_rate,
            momentum=training.momentum,
            weight_decay=training.weight_decay,
            seed=seed,
            encoding=training.encoding,
            params=method_named(method.name).settings(method.params),
        )

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

        An update of an earlier round weighs less by its age: FedAsync (arXiv:1903.03934), the
        polynomial staleness function of its section 5.2.
        """
        aggregator = method_named(self.plan.method.name).aggregator()
        for name in sorted(self._contributions):
            kept = self._contributions[name]
            age = self.number - kept.round
            weight = kept.report.samples * staleness_weight(age)
            aggregator.add(f"{kept.device}@{kept.round}", kept.update, weight)
        self.weights = aggregator.apply(self.weights)
        self.model = codec.encode(self.weights)
        self.content = content_of(self.model, CHUNK_BYTES)
        self._contributions = {}
        self.abandoned_in_a_row = 0
        self.round = None

    def abandon_round(self) -> None:
        """Give the round up: the model stays, late updates that were kept stay for the next."""
        self.abandoned_in_a_row += 1
        self._contributions = {
            name: kept for name, kept in self._contributions.items() if kept.round < self.number
        }
        self.round = None


def _sum_reports(reports: Mapping[str, Report]) -> Report:
    ordered = [reports[name] for name in sorted(reports)]
    return Report(
        samples=sum(report.samples for report in ordered),
        steps=sum(report.steps for report in ordered),
        loss_sum=sum(report.loss_sum for report in ordered),
        correct=sum(report.correct for report in ordered),
        seconds=sum(report.seconds for report in ordered),
    )
