"""What a device must not forget over a power loss: the facts an `Agent` records.

The journal writes them down in the order given; `Held` is what it gives back.
"""

from dataclasses import dataclass, field
from typing import Any, TypeAlias

from edge_agent.peering_facts import PeerForgotten, PeerKept, StartKept
from federation.protocol.messages import Assignment, Content, Release, Report


@dataclass(frozen=True, slots=True)
class Memory:
    """What a training of a run left on the device for the next one, encoded."""

    run: str
    data: bytes


@dataclass(frozen=True, slots=True)
class AssignmentKept:
    """This assignment is the one in hand; it replaces any other."""

    assignment: Assignment


@dataclass(frozen=True, slots=True)
class AssignmentForgotten:
    """The assignment of this attempt is over; its checkpoint may go."""

    attempt: str


@dataclass(frozen=True, slots=True)
class ChunkKept:
    """One verified chunk of a content that is being fetched."""

    content: Content
    index: int
    data: bytes


@dataclass(frozen=True, slots=True)
class ContentForgotten:
    """What was fetched of this content is no longer needed, or was found damaged."""

    digest: str


@dataclass(frozen=True, slots=True)
class UpdateKept:
    """A finished update: kept until the hub's own acknowledgement came.

    `memory` is what its training left for the next one of its run, should the update count;
    `pace` is how fast it may travel, in bytes a second (0: as the link takes it).
    """

    attempt: str
    content: Content
    report: Report
    data: bytes
    memory: Memory | None = None
    pace: float = 0.0


@dataclass(frozen=True, slots=True)
class UpdateForgotten:
    """The hub has answered for this update: it may go.

    Where it counted, what its training left is from now on the device's memory; else it is as
    if there had been no such training.
    """

    attempt: str
    counted: bool


@dataclass(frozen=True, slots=True)
class ReleaseKept:
    """A released model is here in full: the predictor may change to it."""

    release: Release
    data: bytes


@dataclass(frozen=True, slots=True)
class WishKept:
    """What the hub desires of this device, as of a version of one of its epochs.

    Where bytes are bounded, `bytes_today` went on `day`, counted from 1970 in UTC.
    """

    epoch: int
    version: int
    document: dict[str, Any]
    day: int = 0
    bytes_today: int = 0


AgentFact: TypeAlias = (
    AssignmentKept
    | AssignmentForgotten
    | ChunkKept
    | ContentForgotten
    | UpdateKept
    | UpdateForgotten
    | ReleaseKept
    | WishKept
    | PeerKept
    | PeerForgotten
    | StartKept
)


@dataclass(slots=True)
class Held:
    """What a journal gives back: the sum of the facts recorded in it.

    `parts` holds, by digest, the chunks fetched so far of contents not yet forgotten. `memory`
    is that of the newest update that counted and left any, `wish` the hub's newest. `peer` is
    how far this device is as a peer, and `start` what it would go on from as one.
    """

    assignment: Assignment | None = None
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)
    updates: dict[str, UpdateKept] = field(default_factory=dict)
    release: Release | None = None
    memory: Memory | None = None
    wish: WishKept | None = None
    peer: PeerKept | None = None
    start: StartKept | None = None

    def record(self, fact: AgentFact) -> None:  # noqa: C901 - one case a fact
        """Take one fact in. The journal does the same on disk."""
        match fact:
            case AssignmentKept(assignment):
                self.assignment = assignment
            case AssignmentForgotten(attempt):
                if self.assignment is not None and self.assignment.attempt == attempt:
                    self.assignment = None
            case ChunkKept(content, index, data):
                self.parts.setdefault(content.digest, {})[index] = data
            case ContentForgotten(digest):
                self.parts.pop(digest, None)
            case UpdateKept():
                self.updates[fact.attempt] = fact
            case UpdateForgotten(attempt, counted):
                kept = self.updates.pop(attempt, None)
                if counted and kept is not None and kept.memory is not None:
                    self.memory = kept.memory
            case ReleaseKept(release):
                self.release = release
            case WishKept():
                self.wish = fact
            case StartKept():
                self.start = fact
            case _:
                self.peer = fact if isinstance(fact, PeerKept) else None
