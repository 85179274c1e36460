"""Every letter that travels, as frozen records, and their one encoding.

A letter travels in an `Envelope` as MessagePack. Decoding is typed and bounded: size is
checked before parsing, unknown fields are ignored (a newer minor version may add some),
unknown letters and another major version are refused. Times travel as *remaining seconds*,
never as wall time: clocks of devices are wrong.
"""

from typing import Annotated, Literal, TypeAlias

import msgspec

from federation.errors import ProtocolError
from federation.protocol.wishes import OfTwins

MAJOR = 1
"""The protocol's major version: part of every topic and of every envelope."""

MAX_LETTER_BYTES = 512 * 1024
"""No letter is larger; a chunk is at most 256 KiB, an inline content at most 32 KiB."""

INLINE_BYTES = 32 * 1024
"""Content up to this size travels inside its letter; larger content travels as chunks."""

Params: TypeAlias = dict[str, float]

Verdict: TypeAlias = Literal["open", "stored", "duplicate", "rejected", "too-late"]
"""What an update is told; every verdict but `open` is final."""

State: TypeAlias = Literal["ready", "disconnected", "lost"]

TaskState: TypeAlias = Literal["accepted", "declined", "training", "failed", "cancelled"]


class Letter(msgspec.Struct, frozen=True, kw_only=True, tag_field="letter"):
    """What all letters share: a tag on the wire, and nothing else."""


class Content(msgspec.Struct, frozen=True, kw_only=True):
    """Names a run of bytes by what it is: the manifest of a transfer.

    `digest` is the SHA-256 in lower-case hexadecimal, `size` the number of bytes; chunk n
    covers bytes [n * chunk_bytes, (n + 1) * chunk_bytes).
    """

    digest: str
    size: int
    chunk_bytes: int

    @property
    def chunks(self) -> int:
        """How many chunks the content has."""
        return -(-self.size // self.chunk_bytes)


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A model of the zoo by name, with its sizes: `federation.learning.models.build_model`."""

    name: str
    sizes: dict[str, int] = {}


class Uplink(msgspec.Struct, frozen=True, kw_only=True):
    """What an update looks like on its way to the hub.

    With `delta` the difference to the base travels. `top_k`, above 0 to 1, is the share of entries
    that travel, the largest; below 1 it needs `delta`. With `residual` a device adds next time what
    did not travel (arXiv:1901.09847). `pace` bounds the bytes sent a second (0: as the link can).
    """

    encoding: Literal["dense", "int8"] = "dense"
    delta: bool = False
    top_k: float = 1.0
    residual: bool = False
    pace: float = 0.0


class HoldOut(msgspec.Struct, frozen=True, kw_only=True):
    """The share (0 to 1) of local samples a peer measures models on; with each turn, the next."""

    share: float = 0.25
    turn: int = 0


class LocalPlan(msgspec.Struct, frozen=True, kw_only=True):
    """How a device shall train: declarative, no code travels.

    `model` may be a part of the model in the base: shallower, or narrower. `epochs` of 0 asks for
    an echo of the base, `max_steps` of 0 means no cap. `seed` fixes the order of batches. `layers`
    names the layers that travel back (none: all), `uplink` how. `params` are the method's own
    numbers. What is in `hold_out` is not trained on.
    """

    model: ModelSpec
    method: str = "fedavg"
    epochs: int = 1
    max_steps: int = 0
    batch_size: int = 32
    learning_rate: float = 0.05
    momentum: float = 0.0
    weight_decay: float = 0.0
    seed: int = 0
    layers: tuple[str, ...] | None = None
    uplink: Uplink = Uplink()
    params: Params = {}
    hold_out: HoldOut | None = None


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What a device says of its training: sums that add up over devices, and its cost."""

    samples: int
    steps: int = 0
    loss_sum: float = 0.0
    correct: int = 0
    seconds: float = 0.0


class Capability(msgspec.Struct, frozen=True, kw_only=True):
    """What a device is and can do, said at birth.

    `level` is how much of a model with levels it can train, from 1 to 64 (0: all of it), `mirrors`
    whether its owner lets the hub keep a copy of its data.
    """

    agent: str
    memory_mb: int = 0
    cores: int = 1
    level: Annotated[int, msgspec.Meta(ge=0, le=64)] = 0
    trains: bool = True
    infers: bool = False
    mirrors: bool = False
    models: tuple[str, ...] = ()


# From a device to the hub -----------------------------------------------------------------


class Presence(Letter, frozen=True, kw_only=True, tag="presence"):
    """A device's state, retained; with state `lost` it is also the device's last will."""

    state: State


class Birth(Letter, frozen=True, kw_only=True, tag="birth"):
    """A device begins to talk: what it can do, and the attempts it still holds.

    `working` is the attempt it fetches for or trains; `finished` are updates not acknowledged yet.
    """

    capability: Capability
    working: str | None = None
    finished: tuple[str, ...] = ()
    release: str | None = None


class Heartbeat(Letter, frozen=True, kw_only=True, tag="heartbeat"):
    """A sign of life, best effort: the attempt in hand and how far it is (0 to 1)."""

    attempt: str | None = None
    progress: float = 0.0
    uptime_s: float = 0.0


class TaskEvent(Letter, frozen=True, kw_only=True, tag="task-event"):
    """What became of an assignment, short of its update."""

    attempt: str
    event: TaskState
    reason: str = ""


class BlobRequest(Letter, frozen=True, kw_only=True, tag="blob-request"):
    """A device pulls: please send these chunks of this content."""

    content: Content
    wanted: tuple[int, ...]


class UpdateOpen(Letter, frozen=True, kw_only=True, tag="update-open"):
    """A finished update is about to travel; small content rides along in `inline`."""

    attempt: str
    content: Content
    report: Report
    inline: bytes | None = None


class UpdateChunk(Letter, frozen=True, kw_only=True, tag="update-chunk"):
    """One chunk of an update; `digest` names the content, `crc32` guards this chunk."""

    attempt: str
    digest: str
    index: int
    crc32: int
    data: bytes


# From the hub to a device -----------------------------------------------------------------


class Welcome(Letter, frozen=True, kw_only=True, tag="welcome"):
    """The hub's answer to the birth of this epoch: the attempts it believes open for this device.

    A broker may deliver one of an older epoch late; what it says is out of date.
    """

    epoch: int
    open_attempts: tuple[str, ...] = ()


class Assignment(Letter, frozen=True, kw_only=True, tag="assignment"):
    """Please train: base model, plan, and the seconds that remain until the deadline."""

    attempt: str
    run: str
    round: int
    deadline_s: float
    base: Content
    plan: LocalPlan
    inline: bytes | None = None


class Cancel(Letter, frozen=True, kw_only=True, tag="cancel"):
    """The attempt is over for the hub, whatever the device holds of it."""

    attempt: str
    reason: str


class UpdateAck(Letter, frozen=True, kw_only=True, tag="update-ack"):
    """The hub's own acknowledgement, sent after its commit.

    `received` is a bitmap of the chunks stored (bit n of byte n // 8, lowest first). Every
    verdict but `open` ends the transfer and lets the device forget the update.
    """

    attempt: str
    digest: str
    received: bytes = b""
    verdict: Verdict = "open"
    reason: str = ""


class BlobChunk(Letter, frozen=True, kw_only=True, tag="blob-chunk"):
    """One chunk of the content a device asked for."""

    digest: str
    index: int
    crc32: int
    data: bytes


class BlobGone(Letter, frozen=True, kw_only=True, tag="blob-gone"):
    """The hub has no such content (any more)."""

    digest: str
    reason: str


class Rebirth(Letter, frozen=True, kw_only=True, tag="rebirth"):
    """Please send your birth again: the hub does not know you in this epoch."""

    reason: str


# From the hub to all ----------------------------------------------------------------------


class HubState(Letter, frozen=True, kw_only=True, tag="hub-state"):
    """Whether the hub is there, retained; offline is the hub's last will."""

    online: bool


class Release(Letter, frozen=True, kw_only=True, tag="release"):
    """A model worth inferring with, retained: its ONNX file as content.

    `serial` grows with every release of a hub: the largest is the newest, of whatever run.
    """

    run: str
    round: int
    content: Content
    labels: tuple[str, ...] = ()
    serial: int = 0


# From a peer to its neighbours ------------------------------------------------------------


class PeerModel(Letter, frozen=True, kw_only=True, tag="peer-model"):
    """The newest model of a peer, retained: trained in this round, and not mixed yet.

    `inline` is as in UpdateOpen. `earlier`, of `earlier_round`, can be asked for as well.
    """

    run: str
    round: int
    content: Content
    inline: bytes | None = None
    earlier_round: int = 0
    earlier: Content | None = None


class PeerLeft(Letter, frozen=True, kw_only=True, tag="peer-left"):
    """This peer goes on without its neighbours; it takes the place of its last model."""

    run: str


class PeerAsk(Letter, frozen=True, kw_only=True, tag="peer-ask"):
    """A peer pulls: `peer`, please send all your neighbours these chunks of your model."""

    peer: str
    content: Content
    wanted: tuple[int, ...]


class PeerChunk(Letter, frozen=True, kw_only=True, tag="peer-chunk"):
    """One chunk of a peer's model, for all its neighbours at once."""

    digest: str
    index: int
    crc32: int
    data: bytes


FromDevice: TypeAlias = (
    Presence | Birth | Heartbeat | TaskEvent | BlobRequest | UpdateOpen | UpdateChunk
)
FromHub: TypeAlias = Welcome | Assignment | Cancel | UpdateAck | BlobChunk | BlobGone | Rebirth
ToAll: TypeAlias = HubState | Release
FromPeer: TypeAlias = PeerModel | PeerLeft | PeerAsk | PeerChunk
AnyLetter: TypeAlias = FromDevice | FromHub | ToAll | FromPeer | OfTwins


class Envelope(msgspec.Struct, frozen=True, kw_only=True):
    """A letter with its sender and the sender's epoch.

    `sender` is a device's id, or `hub`. `epoch` grows with every connection a device makes
    and with every start of the hub: what an older epoch said of its presence is void.
    """

    version: int = MAJOR
    sender: str
    epoch: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
    body: AnyLetter


class _Version(msgspec.Struct):
    version: int = 0


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Envelope)
_version = msgspec.msgpack.Decoder(_Version)

UNREADABLE = (msgspec.MsgspecError, ValueError, RecursionError)
"""What decoding may raise of hostile bytes: broken text and deep nesting are not DecodeErrors."""


def seal(sender: str, epoch: int, letter: AnyLetter) -> bytes:
    """The bytes of a letter in its envelope."""
    return _encoder.encode(Envelope(sender=sender, epoch=epoch, body=letter))


def unseal(payload: bytes) -> Envelope:
    """The envelope in these bytes.

    Raises:
        ProtocolError: too large, not MessagePack, another major version, an unknown letter,
            or a field of the wrong type.
    """
    if len(payload) > MAX_LETTER_BYTES:
        raise ProtocolError(
            f"letter of {len(payload)} bytes; at most {MAX_LETTER_BYTES} are read: "
            "send larger content as chunks"
        )
    try:
        envelope = _decoder.decode(payload)
    except UNREADABLE as error:
        raise ProtocolError(_why_unreadable(payload, error)) from error
    if envelope.version != MAJOR:
        raise ProtocolError(_other_version(envelope.version))
    return envelope


def _other_version(version: int) -> str:
    return f"letter has protocol version {version}; this side speaks {MAJOR}: upgrade the older"


def _why_unreadable(payload: bytes, error: Exception) -> str:
    try:
        version = _version.decode(payload).version
    except UNREADABLE:
        return f"letter is not readable MessagePack ({error}): refuse it and look at its sender"
    if version != MAJOR:
        return _other_version(version)
    return f"letter is malformed ({error}): sender and receiver disagree about the protocol"
