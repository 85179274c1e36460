"""Moments in the life of an attempt at which a device can be made to fail: `tables.PHASES`."""

from dataclasses import dataclass

from edge_agent.facts import AgentFact, AssignmentKept, ChunkKept, Held, UpdateForgotten, UpdateKept
from federation.protocol import messages as m
from federation.protocol.effects import Effect, Record, Send


@dataclass(frozen=True, slots=True)
class Trap:
    """Kills a process at a phase of the first attempt in this round (0: in any round)."""

    phase: str
    round: int
    away_s: float


def phase_at(effect: Effect[AgentFact], held: Held, *, is_done: bool) -> tuple[str, str]:
    """The phase that begins with this effect, and the attempt it is of.

    What travels whole, within a letter, is in the middle of its way when that is sent, and
    before it is kept.
    """
    match effect:
        case Record(fact):
            return _phase_of_fact(fact, held, is_done=is_done)
        case Send(m.UpdateChunk(attempt=attempt)) if is_done:
            return "mid-upload", attempt
        case Send(m.UpdateOpen(attempt=attempt, inline=whole)) if is_done and whole is not None:
            return "mid-upload", attempt
    return "", ""


def _phase_of_fact(fact: AgentFact, held: Held, *, is_done: bool) -> tuple[str, str]:
    match fact:
        case AssignmentKept(assignment) if is_done or assignment.inline is not None:
            return "before-download" if is_done else "mid-download", assignment.attempt
        case ChunkKept() if is_done and held.assignment is not None:
            return "mid-download", held.assignment.attempt
        case UpdateKept(attempt=attempt) if is_done:
            return "before-upload", attempt
        case UpdateForgotten(attempt=attempt) if not is_done:
            return "before-ack", attempt
    return "", ""
