"""What devices ask the hub's models, and what they are answered.

The letters travel as all others do, in an envelope with version, sender and epoch, but on a
branch of their own: whoever serves models need not be the process that coordinates rounds. An
answer goes to the branch of the device that asked, under the number it gave its request; no letter
can ask for an answer to go elsewhere, and no property of MQTT 5 is needed.
"""

import math
from typing import Annotated, Literal, TypeAlias

import msgspec

from federation.errors import ProtocolError
from federation.protocol.messages import MAJOR, MAX_LETTER_BYTES, UNREADABLE, Letter
from federation.protocol.topics import (
    Route,
    answer_route,
    ask_route,
    check_name,
    parse,
)

SERVER = "hub"
"""Who answers: to a device, the hub speaks with one voice."""

MAX_DEADLINE_S = 3600.0

ANSWER_EXPIRY_S = 60

Status: TypeAlias = Literal[
    "ok", "busy", "over-share", "loading", "draining", "expired", "invalid", "too-large",
    "unknown", "failed",
]  # fmt: skip
"""How a request ended. After `busy`, `over-share`, `loading` and `draining` it may come again."""

Datatype: TypeAlias = Literal["FP32", "FP16"]

ITEM_BYTES: dict[Datatype, int] = {"FP32": 4, "FP16": 2}


class WireTensor(msgspec.Struct, frozen=True, kw_only=True):
    """Numbers in row-major order, little-endian. FP16 halves what travels."""

    datatype: Datatype = "FP32"
    shape: tuple[Annotated[int, msgspec.Meta(ge=0, le=2**31)], ...]
    data: bytes

    def __post_init__(self) -> None:
        if len(self.data) != math.prod(self.shape) * ITEM_BYTES[self.datatype]:
            raise ValueError(
                f"tensor of shape {list(self.shape)} and type {self.datatype} "
                f"has {len(self.data)} bytes"
            )


class InferRequest(Letter, frozen=True, kw_only=True, tag="infer-request"):
    """Please answer within `deadline_s` seconds: about `windows`, or go on after `prompt`.

    `request` is the device's own number of the request: the same again is the same request, and
    gets the same answer without being computed again. `windows` is [windows, steps, channels].
    `prompt` is text, or a language model's tokens. With `logprobs` each token's log-probability is
    told; with `echo` the prompt's too.
    """

    request: str
    model: str
    deadline_s: Annotated[float, msgspec.Meta(gt=0, le=MAX_DEADLINE_S)]
    windows: WireTensor | None = None
    prompt: str | tuple[int, ...] | None = None
    max_tokens: Annotated[int, msgspec.Meta(ge=0)] = 0
    temperature: Annotated[float, msgspec.Meta(ge=0, le=10)] = 0.0
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] = 0
    logprobs: bool = False
    echo: bool = False


class InferAnswer(Letter, frozen=True, kw_only=True, tag="infer-answer"):
    """What came of a request; only with status `ok` there is more than a reason.

    `logits` is [windows, classes]. `tokens` and `logprobs` are of the same length; the first
    token of an echoed prompt has no log-probability.
    """

    request: str
    model: str
    status: Status
    version: int = 0
    reason: str = ""
    retry_after_s: float = 0.0
    logits: WireTensor | None = None
    labels: tuple[str, ...] = ()
    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float | None, ...] = ()


InferenceLetter: TypeAlias = InferRequest | InferAnswer


class InferenceEnvelope(msgspec.Struct, frozen=True, kw_only=True):
    """As `messages.Envelope`, for the letters of this module."""

    version: int = MAJOR
    sender: str
    epoch: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
    body: InferenceLetter


class _Numbered(msgspec.Struct, frozen=True):
    request: str = ""


class _Bare(msgspec.Struct, frozen=True):
    body: _Numbered = _Numbered()


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(InferenceEnvelope)
_number = msgspec.msgpack.Decoder(_Bare)


def seal_request(
    namespace: str, device: str, epoch: int, request: InferRequest
) -> tuple[Route, bytes]:
    """A request's route and bytes; brokers that know of expiry drop it after its deadline."""
    check_name("request", request.request)
    way = ask_route(namespace, device, request.model, math.ceil(request.deadline_s))
    return way, _seal(device, epoch, request)


def seal_answer(
    namespace: str, device: str, epoch: int, answer: InferAnswer
) -> tuple[Route, bytes]:
    """An answer's route and bytes."""
    way = answer_route(namespace, device, answer.request, ANSWER_EXPIRY_S)
    return way, _seal(SERVER, epoch, answer)


def open_request(namespace: str, topic: str, payload: bytes) -> tuple[str, InferRequest]:
    """Who asks, and what.

    Raises:
        ProtocolError: unreadable, or on a branch that is not the sender's or of another model.
    """
    device = parse(namespace, topic).device
    envelope = _unseal(payload)
    request = envelope.body
    if envelope.sender != device or not isinstance(request, InferRequest):
        raise ProtocolError(
            f"letter of {envelope.sender!r} came on {topic!r}; a request of {device!r} was "
            "expected there: refused"
        )
    way, _ = seal_request(namespace, device, envelope.epoch, request)
    if way.topic != topic:
        raise ProtocolError(f"request came on {topic!r}; it belongs on {way.topic!r}: refused")
    return device, request


def open_answer(namespace: str, device: str, topic: str, payload: bytes) -> InferAnswer:
    """What this device was answered.

    Raises:
        ProtocolError: unreadable, not from the hub, or on another topic than its request's.
    """
    envelope = _unseal(payload)
    answer = envelope.body
    if envelope.sender != SERVER or not isinstance(answer, InferAnswer):
        raise ProtocolError(
            f"letter of {envelope.sender!r} came on {topic!r}; an answer of the hub was expected "
            "there: refused"
        )
    if answer_route(namespace, device, answer.request, 0).topic != topic:
        raise ProtocolError(f"answer to {answer.request!r} came on {topic!r}: refused")
    return answer


def number_of(payload: bytes) -> str:
    """The number of a request that cannot be read whole, so that it can be refused; else empty."""
    try:
        return _number.decode(payload[:MAX_LETTER_BYTES]).body.request
    except UNREADABLE:
        return ""


def _seal(sender: str, epoch: int, letter: InferenceLetter) -> bytes:
    return _encoder.encode(InferenceEnvelope(sender=sender, epoch=epoch, body=letter))


def _unseal(payload: bytes) -> InferenceEnvelope:
    if len(payload) > MAX_LETTER_BYTES:
        raise ProtocolError(
            f"letter of {len(payload)} bytes; at most {MAX_LETTER_BYTES} are read: ask over HTTP"
        )
    try:
        envelope = _decoder.decode(payload)
    except UNREADABLE as error:
        raise ProtocolError(
            f"letter is malformed ({error}): sender and receiver disagree about the protocol"
        ) from error
    if envelope.version != MAJOR:
        raise ProtocolError(
            f"letter has protocol version {envelope.version}; this side speaks {MAJOR}: "
            "upgrade the older"
        )
    return envelope
