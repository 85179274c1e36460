"""Which agents of a swarm drop out of a round, at which moment, how, and for how long."""

import random
from dataclasses import dataclass
from typing import Literal

from edge_agent.facts import AgentFact, AssignmentKept, ChunkKept, UpdateKept
from federation.protocol import messages as m
from federation.protocol.effects import Effect, Record, Send, Train
from simulations.tables import PHASES

Kind = Literal["cut", "killed"]


@dataclass(frozen=True, slots=True)
class Dropping:
    """What share of the agents drops out of each round (0 to 1), and for about how long."""

    share: float = 0.0
    away_s: float = 1.0
    seed: int = 0


NOBODY = Dropping()


@dataclass(frozen=True, slots=True)
class Drop:
    """An agent's link is cut, or its process killed, when it comes to this phase."""

    kind: Kind
    phase: str
    away_s: float


def drop_of(dropping: Dropping, attempt: str) -> Drop | None:
    """What shall befall an agent during an attempt; the same each time it is asked."""
    rng = random.Random(f"{dropping.seed}/drop/{attempt}")  # noqa: S311 - nothing secret is drawn
    if rng.random() >= dropping.share:
        return None
    kind: Kind = "cut" if rng.random() < 0.5 else "killed"
    return Drop(kind, rng.choice(PHASES), dropping.away_s * rng.uniform(0.5, 1.5))


def phase_of(effect: Effect[AgentFact], in_hand: str) -> tuple[str, str]:
    """The phase that begins with this effect, and the attempt; empty where none does.

    `in_hand` is the attempt that is worked on.
    """
    match effect:
        case Record(AssignmentKept(assignment)):
            return "before-download", assignment.attempt
        case Record(ChunkKept()):
            return "mid-download", in_hand
        case Train(assignment):
            return "mid-training", assignment.attempt
        case Record(UpdateKept(attempt=attempt)):
            return "before-upload", attempt
        case Send(m.UpdateChunk(attempt=attempt)):
            return "mid-upload", attempt
        case _:
            pass
    return "", ""


def is_due(drop: Drop, phase: str) -> bool:
    """Whether it befalls the agent now: small contents pass some phases over."""
    return PHASES.index(phase) >= PHASES.index(drop.phase)
