"""What the futures agree on, and how far they spread."""

import platform
from collections.abc import Sequence
from importlib.metadata import version

import msgspec
import numpy as np

from federation.protocol.codec import digest_of
from simulations.what_if.forking import Fork, revisions
from simulations.what_if.futures import Future, PlayedRound
from simulations.what_if.plan import WhatIf

SHARES = (0.05, 0.5, 0.95)


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """A quantity over the futures: its mean, and what 5, 50 and 95 % of them stay below."""

    mean: float
    low: float
    median: float
    high: float


class Provenance(msgspec.Struct, frozen=True, kw_only=True):
    """What a forecast follows from: asked again with these it comes out the same."""

    question_sha256: str
    revisions: dict[str, int]
    event: int
    at: float
    seed: int
    headwater: str
    python: str


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """A forecast of a run.

    `round_s` is of the closed rounds of all futures, `run_s` of whole runs, in seconds; `counted`
    of updates a round, bytes of a closed round. `closed` is the share of rounds that closed,
    `finished` that of futures whose run finished.
    """

    futures: int
    devices: int
    round_s: Spread
    run_s: Spread
    counted: Spread
    bytes_up: Spread
    bytes_down: Spread
    closed: float
    finished: float
    left_out: dict[str, str]
    provenance: Provenance


def answer(question: WhatIf, made: Fork, played: Sequence[Future]) -> Answer:
    """What these futures say together."""
    rounds = [each for future in played for each in future.rounds]
    closed = [each for each in rounds if each.is_closed]
    return Answer(
        futures=len(played),
        devices=len(made.twins),
        round_s=spread([each.seconds for each in closed]),
        run_s=spread([future.seconds for future in played]),
        counted=spread([each.counted for each in closed]),
        bytes_up=spread([each.bytes_up for each in closed]),
        bytes_down=spread([each.bytes_down for each in closed]),
        closed=len(closed) / max(1, len(rounds)),
        finished=sum(future.status == "finished" for future in played) / max(1, len(played)),
        left_out=dict(made.left_out),
        provenance=Provenance(
            question_sha256=digest_of(msgspec.json.encode(question, enc_hook=str)),
            revisions=dict(revisions(made)),
            event=made.event,
            at=made.at,
            seed=question.seed,
            headwater=version("headwater"),
            python=platform.python_version(),
        ),
    )


def round_medians(played: Sequence[Future]) -> list[float]:
    """The median seconds of each round by its number, over the futures in which it closed."""
    by_number: dict[int, list[PlayedRound]] = {}
    for future in played:
        for each in future.rounds:
            if each.is_closed:
                by_number.setdefault(each.number, []).append(each)
    return [
        float(np.median([each.seconds for each in by_number[number]]))
        for number in sorted(by_number)
    ]


def spread(values: Sequence[float]) -> Spread:
    """The spread of these values; of none, zeros."""
    if not values:
        return Spread(mean=0.0, low=0.0, median=0.0, high=0.0)
    low, median, high = np.quantile(np.asarray(values, np.float64), SHARES).tolist()
    return Spread(mean=float(np.mean(values)), low=low, median=median, high=high)
