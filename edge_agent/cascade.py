"""The small model on the device, and the big one at the hub where that is worth asking.

Each window is answered by the device's own model. Where its calibrated confidence is low, the
link is up and the budget allows, the hub's model is asked, and its answer stands if it comes
before the deadline; else the device's does. What it said teaches a correction of the device's own
model for this wearer. Nothing here waits for longer than one deadline a call,
and a hub that is silent is left alone for a while. No torch.
"""

import hashlib
import random
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_agent.agreement import Agreement, AgreementState, Choice
from edge_agent.calibration import probabilities
from edge_agent.cascade_config import CascadeConfig
from edge_agent.cascade_report import CascadeReport, Tally
from edge_agent.correction import Correction, Example

Windows: TypeAlias = NDArray[np.float32]
Source: TypeAlias = Literal["local", "hub", "cache"]

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 300.0
"""How long a silent hub is left alone; twice as long each time, until it answers."""

BURST_SHARE = 0.25
"""How much of an hour's bytes may go at once."""


@dataclass(frozen=True, slots=True)
class Advice:
    """What the hub's model says of windows: logits (N, classes), and what the exchange took."""

    logits: NDArray[np.float32]
    labels: tuple[str, ...]
    version: int
    up_bytes: int
    down_bytes: int


@dataclass(frozen=True, slots=True)
class NoAdvice:
    """Nobody said anything of use in time, and why; `retry_after_s` where the hub named it."""

    reason: str
    up_bytes: int = 0
    retry_after_s: float = 0.0


Ask: TypeAlias = Callable[[Windows, float], Advice | NoAdvice]
"""Asks about windows (N, ...) with a deadline in seconds; returns by then, and raises nothing."""


@dataclass(frozen=True, slots=True)
class Student:
    """The device's own model: logits (N, classes) of windows, labels, and its temperature.

    `labelled` are windows of this wearer and their classes, which it was not trained on.
    """

    predict: Callable[[Windows], NDArray[np.float32]]
    labels: tuple[str, ...]
    temperature: float = 1.0
    labelled: tuple[Windows, NDArray[np.int64]] | None = None

    def calibrated(self, windows: Windows) -> NDArray[np.float64]:
        """Its logits (N, classes), divided by the temperature."""
        return self.predict(windows).astype(np.float64) / self.temperature


@dataclass(frozen=True, slots=True)
class Answered:
    """The answer about one window, the probability its giver has for it, and who that was."""

    label: str
    probability: float
    source: Source


class CascadeState(msgspec.Struct, frozen=True, kw_only=True):
    """What a device keeps between two starts: what was learned, and the bytes it may send.

    `allowance` is in bytes, as of the moment `at` in seconds since 1970. `examples` taught the
    correction of the device's model that `model` names.
    """

    agreement: AgreementState = AgreementState()
    allowance: float = -1.0
    at: float = 0.0
    model: str = ""
    examples: tuple[Example, ...] = ()


class Cascade:
    """Answers windows with two models; for one thread.

    Args:
        student: the device's own model.
        ask: how the hub is asked.
        config: when, and how often.
        state: what an earlier start has learned.
        clock: seconds since 1970, never falling.
        rng: decides which windows are explored.
    """

    def __init__(
        self,
        student: Student,
        ask: Ask,
        config: CascadeConfig,
        *,
        state: CascadeState,
        clock: Callable[[], float],
        rng: random.Random,
    ) -> None:
        self._student, self._ask, self._config = student, ask, config
        self._clock, self._rng = clock, rng
        self._agreement = Agreement(
            state.agreement, share=config.share, cost=config.cost, explore=config.explore
        )
        burst = BURST_SHARE * config.bytes_per_hour
        self._allowance = burst if state.allowance < 0 else min(burst, state.allowance)
        self._filled_at = state.at or clock()
        self._known: OrderedDict[bytes, Answered] = OrderedDict()
        self._version = 0
        self._pause_s, self._silent_until = FIRST_PAUSE_S, 0.0
        self._tally = Tally()
        self._model, self._correction = state.model, Correction(state.examples)
        if config.corrects and student.labelled is not None and not state.examples:
            self._study(student.labelled)

    @property
    def state(self) -> CascadeState:
        """What to keep for the next start."""
        return CascadeState(
            agreement=self._agreement.state,
            allowance=self._allowance,
            at=self._filled_at,
            model=self._model,
            examples=self._correction.examples,
        )

    def report(self) -> CascadeReport:
        """What has been done so far, and what it took."""
        return self._tally.report(self._agreement.threshold)

    def answer(self, windows: Windows) -> list[Answered]:
        """One answer a window, in order.

        Raises:
            DataError: windows of another shape than the device's model takes.
        """
        size = self._config.together
        parts = [windows[at : at + size] for at in range(0, max(1, len(windows)), size)]
        return [answered for part in parts for answered in self._answer_part(part)]

    def _answer_part(self, windows: Windows) -> list[Answered]:
        began = self._clock()
        logits = self._student.calibrated(windows)
        shares = probabilities(self._correction.apply(windows, logits), 1.0)
        keys = [_digest(window) for window in windows]
        answers = [
            self._known.get(key) or self._own(row) for key, row in zip(keys, shares, strict=True)
        ]
        fresh = [place for place, each in enumerate(answers) if each.source == "local"]
        confidence = {place: answers[place].probability for place in fresh}
        asked = self._chosen(windows, confidence)
        self._tally.count(len(windows), cached=len(windows) - len(fresh))
        self._tally.took(self._clock() - began)
        if asked:
            said = self._consult(windows[asked])
            for place, answer in zip(asked, said, strict=False):
                agreed = answer.label == answers[place].label
                self._agreement.hear(confidence[place], agreed=agreed)
                self._tally.hear(agreed=agreed)
                self._remember(keys[place], answer)
                self._teach(windows[place], logits[place], answer.label)
                answers[place] = answer
        return answers

    def _study(self, labelled: tuple[Windows, NDArray[np.int64]]) -> None:
        """Learn from the wearer's own labels before the hub has said anything."""
        logits = self._student.calibrated(labelled[0])
        for window, row, answer in zip(labelled[0], logits, labelled[1], strict=True):
            self._correction.learn(window, row, int(answer))

    def _teach(self, window: Windows, logits: NDArray[np.float64], label: str) -> None:
        """Learn from the hub's answer, if it is one the device could have given."""
        names = self._student.labels or tuple(map(str, range(len(logits))))
        if self._config.corrects and label in names:
            self._correction.learn(window, logits, names.index(label))

    def _own(self, shares: NDArray[np.float64]) -> Answered:
        best = int(shares.argmax())
        return Answered(_name(self._student.labels, best), float(shares[best]), "local")

    def _chosen(self, windows: Windows, confidence: dict[int, float]) -> list[int]:
        """The windows to ask about, as far as the budget goes; none while the hub is silent."""
        now = self._clock()
        if now < self._silent_until:
            return []
        each = _wire_bytes(windows[0], self._config) if len(windows) else 0
        room = self._room(now)
        chosen: list[int] = []
        for place, sure in confidence.items():
            if each * (len(chosen) + 1) > room:
                break
            choice: Choice = self._agreement.choose(sure, self._rng.random())
            if choice != "stay":
                chosen.append(place)
                self._tally.send(is_explored=choice == "explore")
        return chosen

    def _room(self, now: float) -> float:
        """The bytes that may be sent now."""
        rate = self._config.bytes_per_hour
        if not rate:
            return float("inf")
        gained = max(0.0, now - self._filled_at) * rate / 3600.0
        self._allowance = min(BURST_SHARE * rate, self._allowance + gained)
        self._filled_at = now
        return self._allowance

    def _consult(self, windows: Windows) -> list[Answered]:
        """The hub's answers, or none if it does not give any."""
        began = self._clock()
        said = self._ask(windows, self._config.deadline_s)
        took = self._clock() - began
        if self._config.bytes_per_hour:
            self._allowance -= said.up_bytes
        if isinstance(said, Advice) and len(said.logits) == len(windows):
            self._pause_s = FIRST_PAUSE_S
            self._tally.advised(took, said.up_bytes, said.down_bytes)
            if said.version != self._version:
                self._version = said.version
                self._known.clear()
            return _advised(said)
        self._tally.unadvised(took, said.up_bytes, len(windows))
        named = said.retry_after_s if isinstance(said, NoAdvice) else 0.0
        self._silent_until = self._clock() + max(named, self._pause_s)
        self._pause_s = min(LONGEST_PAUSE_S, 2.0 * self._pause_s)
        return []

    def _remember(self, key: bytes, answer: Answered) -> None:
        if not self._config.cached:
            return
        while len(self._known) >= self._config.cached:
            self._known.popitem(last=False)
        self._known[key] = Answered(answer.label, answer.probability, "cache")


def _advised(said: Advice) -> list[Answered]:
    shares = probabilities(said.logits, 1.0)
    best = shares.argmax(axis=1)
    return [
        Answered(_name(said.labels, int(place)), float(row[place]), "hub")
        for place, row in zip(best, shares, strict=True)
    ]


def _name(labels: Sequence[str], place: int) -> str:
    return labels[place] if labels else str(place)


def _digest(window: Windows) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(window).tobytes()).digest()


def _wire_bytes(window: Windows, config: CascadeConfig) -> int:
    return int(window.size) * (2 if config.datatype == "FP16" else 4)
