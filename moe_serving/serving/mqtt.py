"""Requests over the broker, for devices that have no other link.

The broker may deliver a request twice, and a device may send it again: it is known by its number,
computed once, and a late copy gets the answer that was given. Nothing is retained. Letters go to
the broker from this module's own thread, so a slow broker never holds up a model.
"""

import logging
import queue
import random
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from federation.errors import ProtocolError
from federation.protocol.effects import Link
from federation.protocol.inference import (
    ANSWER_EXPIRY_S,
    SERVER,
    InferAnswer,
    InferRequest,
    WireTensor,
    number_of,
    open_request,
    seal_answer,
)
from federation.protocol.link import Arrived, MailboxConfig
from federation.protocol.messages import MAX_LETTER_BYTES, HubState, seal
from federation.protocol.mqtt import Mailbox
from federation.protocol.topics import (
    NAME,
    Route,
    answer_route,
    ask_filter,
    parse,
    serving_route,
)
from moe_serving.config import MqttConfig
from moe_serving.hosting import Host, Hosted
from moe_serving.requests import (
    Classified,
    Classify,
    Ending,
    Generate,
    Generated,
    RefusedError,
    Work,
)
from moe_serving.serving.metrics import Metrics
from moe_serving.tokens import decode

REMEMBERED, REMEMBERED_BYTES = 4096, 64 * 1024 * 1024
"""How many answers are kept for a late copy of their request, and of what size together."""

INBOX = 4096
"""Letters that may wait here; what comes beyond is dropped, as a lost letter would be."""

_LASTING = {"ok", "invalid", "too-large", "unknown"}
"""What would be answered again; after any other status the same request may be tried again."""

_Key: TypeAlias = tuple[str, str]

_log = logging.getLogger("headwater.moe.mqtt")


@dataclass(frozen=True, slots=True)
class _Ended:
    """A request that was accepted has ended."""

    device: str
    request: InferRequest
    hosted: Hosted
    ending: Ending


_Event: TypeAlias = Arrived | Link | _Ended | None


class MqttGateway:
    """Answers what devices ask over one broker, from `open` to `close`."""

    def __init__(
        self,
        config: MqttConfig,
        host: Host,
        metrics: Metrics,
        *,
        password: str,
        clock: Callable[[], float],
        rng: random.Random,
    ) -> None:
        self._config = config
        self._host = host
        self._metrics = metrics
        self._epoch = int(clock() * 1000)
        self._inbox: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._memory = _Memory()
        self._is_up = threading.Event()
        self._mailbox = Mailbox(
            MailboxConfig(
                url=config.broker,
                client_id="-".join(filter(None, (config.namespace, "models", config.worker))),
                filters=(ask_filter(config.namespace, is_shared=bool(config.worker)),),
                keepalive_s=config.keepalive_s,
                user=config.user,
                password=password,
                ca_file=config.ca_file,
                session_expiry_s=0,
                backoff_s=(0.2, 5.0),
            ),
            deliver=self._deliver,
            next_epoch=self._next_epoch,
            last_will=lambda epoch: (
                serving_route(config.namespace),
                seal(SERVER, epoch, HubState(online=False)),
            ),
            rng=rng,
        )
        self._thread = threading.Thread(target=self._run, name="mqtt gateway", daemon=True)

    def open(self) -> None:
        """Begin, in the background; an unreachable broker is tried again and again."""
        self._thread.start()
        self._mailbox.open()

    def wait_until_up(self, timeout_s: float) -> bool:
        """Whether the broker is reached within this time."""
        return self._is_up.wait(timeout_s)

    def close(self) -> None:
        """Say what there still is to say, and end."""
        self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join()
        self._mailbox.close()

    def _next_epoch(self) -> int:
        self._epoch += 1
        return self._epoch

    def _deliver(self, event: Arrived | Link) -> None:
        if isinstance(event, Link) or self._inbox.qsize() < INBOX:
            self._inbox.put(event)

    def _run(self) -> None:
        while (event := self._inbox.get()) is not None:
            try:
                self._react(event)
            except Exception:  # the outermost loop: one letter must not end the gateway
                _log.exception("letter failed")

    def _react(self, event: Arrived | Link | _Ended) -> None:
        match event:
            case Link():
                level = logging.INFO if event.is_up else logging.WARNING
                _log.log(level, "link up=%s %s", event.is_up, event.reason)
                (self._is_up.set if event.is_up else self._is_up.clear)()
            case Arrived():
                self._on_arrived(event)
            case _Ended():
                answer = _answer(event.request, event.hosted, event.ending)
                self._say(event.device, answer)

    def _on_arrived(self, arrived: Arrived) -> None:
        try:
            device, request = open_request(self._config.namespace, arrived.topic, arrived.payload)
        except ProtocolError as error:
            self._refuse_unreadable(arrived, str(error))
            return
        said = self._memory.recall((device, request.request))
        if said is not None:
            if said:
                self._publish(device, request.request, said)
            return
        self._memory.keep((device, request.request), b"")
        try:
            self._submit(device, request)
        except Exception as error:
            # Nobody will settle it: a copy of it must not wait for an answer that never comes.
            if not isinstance(error, RefusedError):
                _log.exception("request failed device=%s request=%s", device, request.request)
                error = RefusedError("failed", "the server failed: see its log")
            reason = f"{error.pointer}: {error}" if error.pointer else str(error)
            ending = Ending(error.outcome, reason=reason, retry_after_s=error.retry_after_s)
            self._say(device, _refusal(request, ending))

    def _submit(self, device: str, request: InferRequest) -> None:
        try:
            hosted = self._host.find(request.model)
        except RefusedError as error:
            self._metrics.on_ended("", 0, error.outcome)
            raise
        work = _work(hosted, request)

        def hear(event: Generated | Ending) -> None:
            if isinstance(event, Ending):
                self._inbox.put(_Ended(device, request, hosted, event))

        try:
            self._host.submit(hosted, f"device {device}", work, hear, deadline_s=request.deadline_s)
        except RefusedError as error:
            self._metrics.on_ended(hosted.name, hosted.version, error.outcome)
            raise

    def _refuse_unreadable(self, arrived: Arrived, why: str) -> None:
        """Tell the sender, if it can be seen who it is and which request it means."""
        _log.info("request refused topic=%s reason=%s", arrived.topic[:200], why)
        number = number_of(arrived.payload)
        try:
            device = parse(self._config.namespace, arrived.topic).device
        except ProtocolError:
            return
        if NAME.fullmatch(number) and not self._memory.knows((device, number)):
            model = arrived.topic.rpartition("/")[2]
            answer = InferAnswer(request=number, model=model, status="invalid", reason=why[:500])
            self._say(device, answer)

    def _say(self, device: str, answer: InferAnswer) -> None:
        key = (device, answer.request)
        _, payload = self._sealed(device, answer)
        if len(payload) > MAX_LETTER_BYTES:
            reason = "the answer is larger than a letter: ask for less, or over HTTP"
            answer = InferAnswer(
                request=answer.request, model=answer.model, status="too-large", reason=reason
            )
            _, payload = self._sealed(device, answer)
        if answer.status in _LASTING:
            self._memory.keep(key, payload)
        else:
            self._memory.forget(key)
        self._publish(device, answer.request, payload)

    def _sealed(self, device: str, answer: InferAnswer) -> tuple[Route, bytes]:
        return seal_answer(self._config.namespace, device, self._epoch, answer)

    def _publish(self, device: str, number: str, payload: bytes) -> None:
        way = answer_route(self._config.namespace, device, number, ANSWER_EXPIRY_S)
        if not self._mailbox.publish(way, payload):
            _log.warning("answer not sent device=%s request=%s", device, number)


class _Memory:
    """Requests that are known: those being computed, and the answers of those that were."""

    def __init__(self) -> None:
        self._answers: OrderedDict[_Key, bytes] = OrderedDict()
        self._size_bytes = 0

    def recall(self, key: _Key) -> bytes | None:
        """The answer that was given; empty while it is being computed, None if it is not known."""
        return self._answers.get(key)

    def knows(self, key: _Key) -> bool:
        """Whether a request of this number came before."""
        return key in self._answers

    def keep(self, key: _Key, answer: bytes) -> None:
        """Remember an answer (empty: it is being computed), and forget the oldest for it."""
        self.forget(key)
        self._answers[key] = answer
        self._size_bytes += len(answer)
        while len(self._answers) > REMEMBERED or self._size_bytes > REMEMBERED_BYTES:
            _, oldest = self._answers.popitem(last=False)
            self._size_bytes -= len(oldest)

    def forget(self, key: _Key) -> None:
        """The same request is a new one from now on."""
        self._size_bytes -= len(self._answers.pop(key, b""))


def _work(hosted: Hosted, request: InferRequest) -> Work:
    """What is asked, as the engine takes it.

    Raises:
        RefusedError: `invalid`: it holds neither windows nor a prompt, or both.
    """
    if (request.windows is None) == (request.prompt is None):
        raise RefusedError("invalid", "a request holds either windows or a prompt")
    if request.windows is not None:
        sent = request.windows
        kind = np.dtype("<f4" if sent.datatype == "FP32" else "<f2")
        if len(sent.shape) != 3 or not all(sent.shape):
            reason = f"shape {list(sent.shape)[:8]}; expected [windows, steps, channels], none 0"
            raise RefusedError("invalid", reason, pointer="windows")
        return Classify(np.frombuffer(sent.data, kind).reshape(sent.shape).astype(np.float32))
    prompt = request.prompt or ()
    try:
        tokens = hosted.loaded.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    except ValueError as error:
        raise RefusedError("invalid", str(error), pointer="prompt") from error
    return Generate(
        tokens=tuple(tokens),
        max_tokens=request.max_tokens,
        temperature=request.temperature,
        seed=request.seed,
        top_logprobs=0 if request.logprobs else -1,
        echo=request.echo,
    )


def _answer(request: InferRequest, hosted: Hosted, ending: Ending) -> InferAnswer:
    """What the device is told of an ending."""
    match ending.result:
        case Classified(logits_BK):
            data = np.ascontiguousarray(logits_BK, dtype="<f4").tobytes()
            return InferAnswer(
                request=request.request,
                model=request.model,
                status="ok",
                version=hosted.version,
                logits=WireTensor(shape=tuple(logits_BK.shape), data=data),
                labels=hosted.loaded.published.about.labels,
            )
        case Generated(scored):
            tokens = tuple(each.token for each in scored)
            return InferAnswer(
                request=request.request,
                model=request.model,
                status="ok",
                version=hosted.version,
                text=decode(hosted.loaded.tokenizer, tokens),
                tokens=tokens,
                logprobs=tuple(each.logprob for each in scored) if request.logprobs else (),
            )
        case None:
            return _refusal(request, ending)


def _refusal(request: InferRequest, ending: Ending) -> InferAnswer:
    return InferAnswer(
        request=request.request,
        model=request.model,
        status="failed" if ending.outcome == "cancelled" else ending.outcome,
        reason=ending.reason,
        retry_after_s=ending.retry_after_s,
    )
