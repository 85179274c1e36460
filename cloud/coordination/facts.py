"""What the hub must not forget: the facts a `Coordinator` records, and what comes back.

The store writes each batch of facts in one transaction before any letter that follows from
them is sent. `HubMemory` is what a coordinator is built from, at the first start and after a
crash.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from cloud.config import RunPlan
from cloud.coordination.rounds import Attempt, Status
from federation.protocol.messages import Capability, Content, Release, Report, Verdict
from federation.protocol.wishes import DesiredState
from optimizer.selection import Planned


@dataclass(frozen=True, slots=True)
class DeviceBorn:
    """A device said its birth."""

    device: str
    epoch: int
    capability: Capability
    at: float


@dataclass(frozen=True, slots=True)
class PresenceChanged:
    """A device came or went."""

    device: str
    epoch: int
    state: str
    at: float


@dataclass(frozen=True, slots=True)
class DeviceReported:
    """A device said how it is set up, and what it made of each key that is desired of it."""

    device: str
    applied: int
    results: dict[str, str]
    document: dict[str, Any]
    at: float


@dataclass(frozen=True, slots=True)
class RunOpened:
    """A run that was asked for has begun; `model` are its encoded initial weights."""

    run: str
    content: Content
    model: bytes
    at: float


@dataclass(frozen=True, slots=True)
class RunEnded:
    """A run is over."""

    run: str
    status: Literal["finished", "failed", "stopped"]
    reason: str
    at: float


@dataclass(frozen=True, slots=True)
class RoundOpened:
    """A round has begun: who was asked, and who was not and why; `planned` if a plan chose."""

    run: str
    round: int
    base: str
    deadline: float
    attempts: tuple[Attempt, ...]
    excluded: dict[str, str]
    at: float
    unnamed: dict[str, int] = field(default_factory=dict)
    planned: Planned | None = None


@dataclass(frozen=True, slots=True)
class Waiting:
    """What the run waits for now, with its reason and its latest end."""

    run: str
    round: int
    name: str
    reason: str
    until: float
    at: float


@dataclass(frozen=True, slots=True)
class AttemptChanged:
    """Something became of an attempt, short of its update."""

    run: str
    round: int
    attempt: str
    device: str
    status: Status
    reason: str
    at: float


@dataclass(frozen=True, slots=True)
class ChunkStored:
    """One chunk of an update that is on its way."""

    attempt: str
    content: Content
    index: int
    data: bytes
    report: Report


@dataclass(frozen=True, slots=True)
class UpdateAccepted:
    """An update that counts, exactly once; its bytes are the chunks stored under its digest.

    `run` and `round` are those it was made for; `counts_in` is the round it is added to,
    which is a later one for a late update that was kept. `opened_at` is when its first letter
    came; None where an earlier hub took that. `stood_in` says why the device's digital agent made
    it; it is empty where the device did.
    """

    attempt: str
    run: str
    round: int
    device: str
    content: Content
    report: Report
    counts_in: int
    at: float
    opened_at: float | None = None
    stood_in: str = ""


@dataclass(frozen=True, slots=True)
class MirrorTaken:
    """A device's samples came whole; `data` are their bytes, to be kept apart from the record."""

    attempt: str
    run: str
    round: int
    device: str
    data: bytes
    at: float


@dataclass(frozen=True, slots=True)
class UpdateRefused:
    """An update that does not count, and why; what was stored of it may go."""

    attempt: str
    device: str
    digest: str
    verdict: Verdict
    reason: str
    at: float


@dataclass(frozen=True, slots=True)
class RoundClosed:
    """The updates were aggregated into a new model; `memory` is what the method keeps here."""

    run: str
    round: int
    content: Content
    model: bytes
    memory: bytes
    devices: tuple[str, ...]
    report: Report
    bytes_up: int
    bytes_down: int
    at: float


@dataclass(frozen=True, slots=True)
class RoundAbandoned:
    """The round gave no new model; the one before it stays."""

    run: str
    round: int
    reason: str
    at: float


@dataclass(frozen=True, slots=True)
class Released:
    """A model was exported for inference; `onnx` is the file."""

    release: Release
    onnx: bytes
    at: float


@dataclass(frozen=True, slots=True)
class LetterRefused:
    """A letter that was not acted upon, and why."""

    sender: str
    reason: str
    at: float


HubFact: TypeAlias = (
    DeviceBorn
    | PresenceChanged
    | DeviceReported
    | RunOpened
    | RunEnded
    | RoundOpened
    | Waiting
    | AttemptChanged
    | ChunkStored
    | UpdateAccepted
    | MirrorTaken
    | UpdateRefused
    | RoundClosed
    | RoundAbandoned
    | Released
    | LetterRefused
)


@dataclass(slots=True)
class DeviceMemory:
    """What the hub knows of one device."""

    device: str
    epoch: int
    state: str
    capability: Capability


@dataclass(slots=True)
class UploadMemory:
    """An update that is on its way: what has arrived of it."""

    attempt: str
    content: Content
    report: Report
    parts: dict[int, bytes]


@dataclass(slots=True)
class AcceptedMemory:
    """An update that counts in the open round, with its bytes."""

    attempt: str
    device: str
    round: int
    report: Report
    data: bytes


@dataclass(slots=True)
class RunMemory:
    """The active run: its plan, its newest model, and its open round if there is one.

    `memory` is what the method keeps at the hub from round to round, encoded (empty: nothing).
    `round` is the number of the round open now, or of the last one when `is_open` is false.
    `asked` names the devices asked in each of the recent rounds.
    `settled` gives the verdict on updates of recent rounds, by attempt, so that one that comes
    again is told the same.
    """

    plan: RunPlan
    content: Content
    model: bytes
    memory: bytes = b""
    round: int = 0
    is_open: bool = False
    deadline: float = 0.0
    abandoned_in_a_row: int = 0
    attempts: dict[str, Attempt] = field(default_factory=dict)
    accepted: list[AcceptedMemory] = field(default_factory=list)
    asked: dict[int, set[str]] = field(default_factory=dict)
    settled: dict[str, Verdict] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0


@dataclass(slots=True)
class HubMemory:
    """All that a coordinator begins from."""

    devices: dict[str, DeviceMemory] = field(default_factory=dict)
    run: RunMemory | None = None
    uploads: dict[str, UploadMemory] = field(default_factory=dict)
    releases: dict[str, Release] = field(default_factory=dict)
    wishes: dict[str, DesiredState] = field(default_factory=dict)
