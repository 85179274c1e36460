"""Asks the hub's models over the broker, on a link of its own beside the agent's."""

import random
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from edge_agent.cascade import Advice, NoAdvice, Windows
from edge_agent.cascade_config import CascadeConfig
from edge_agent.config import AgentConfig
from federation.errors import ProtocolError
from federation.protocol.effects import Link
from federation.protocol.inference import (
    Datatype,
    InferAnswer,
    InferRequest,
    WireTensor,
    open_answer,
    seal_request,
)
from federation.protocol.link import Arrived, MailboxConfig
from federation.protocol.mqtt import Mailbox
from federation.protocol.topics import answer_filter, asking_route

_NUMPY = {"FP32": "<f4", "FP16": "<f2"}


class HubAsker:
    """Asks one model of the hub; a context that holds the link. Calls may come from any thread.

    While the link is down a call ends at once; the link is sought in the background. What comes
    after its deadline is dropped.
    """

    def __init__(
        self,
        config: AgentConfig,
        cascade: CascadeConfig,
        *,
        password: str,
        clock: Callable[[], float],
        rng: random.Random,
    ) -> None:
        self._config, self._cascade = config, cascade
        self._clock, self._rng = clock, rng
        self._epoch = int(clock() * 1000)
        self._is_up = threading.Event()
        self._news = threading.Condition()
        self._waiting: dict[str, tuple[InferAnswer, int] | None] = {}
        self._mailbox = Mailbox(
            MailboxConfig(
                url=config.broker,
                client_id=f"{config.namespace}-{config.device}-asks",
                filters=(answer_filter(config.namespace, config.device),),
                keepalive_s=config.keepalive_s,
                user=config.user,
                password=password,
                ca_file=config.ca_file,
                session_expiry_s=0,
                backoff_s=(0.2, 30.0),
            ),
            deliver=self._deliver,
            next_epoch=self._next_epoch,
            last_will=lambda _: (asking_route(config.namespace, config.device), b""),
            rng=rng,
        )

    def __enter__(self) -> Self:
        self._mailbox.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._mailbox.close()

    def wait_until_up(self, timeout_s: float) -> bool:
        """Whether the broker is reached within this time."""
        return self._is_up.wait(timeout_s)

    def __call__(self, windows: Windows, deadline_s: float) -> Advice | NoAdvice:
        """What the model says of windows (N, ...), or why there is no answer by the deadline."""
        if not self._is_up.is_set():
            return NoAdvice("the link to the broker is down")
        request = InferRequest(
            request=f"{self._rng.getrandbits(64):016x}",
            model=self._cascade.model,
            deadline_s=deadline_s,
            windows=_on_the_wire(windows, self._cascade.datatype),
        )
        way, payload = seal_request(
            self._config.namespace, self._config.device, self._epoch, request
        )
        size_bytes = len(way.topic) + len(payload)
        with self._news:
            self._waiting[request.request] = None
        try:
            if not self._mailbox.publish(way, payload):
                return NoAdvice("the link to the broker is down")
            arrived = self._await(request.request, deadline_s)
        finally:
            with self._news:
                del self._waiting[request.request]
        if arrived is None:
            return NoAdvice("no answer by the deadline", size_bytes)
        return _advice(*arrived, windows, size_bytes)

    def _await(self, number: str, deadline_s: float) -> tuple[InferAnswer, int] | None:
        with self._news:
            self._news.wait_for(lambda: self._waiting[number] is not None, deadline_s)
            return self._waiting[number]

    def _deliver(self, event: Arrived | Link) -> None:
        if isinstance(event, Link):
            (self._is_up.set if event.is_up else self._is_up.clear)()
            return
        try:
            answer = open_answer(
                self._config.namespace, self._config.device, event.topic, event.payload
            )
        except ProtocolError:
            return  # what cannot be read answers nothing; the deadline will say so
        with self._news:
            if answer.request in self._waiting:
                self._waiting[answer.request] = answer, len(event.topic) + len(event.payload)
                self._news.notify_all()

    def _next_epoch(self) -> int:
        self._epoch += 1
        return self._epoch


def _on_the_wire(windows: Windows, datatype: Datatype) -> WireTensor:
    """The windows in 16 bits where that is wished and they lie within its range."""
    with np.errstate(over="ignore"):
        packed: NDArray[np.floating] = windows.astype(_NUMPY[datatype])
    if not np.isfinite(packed).all():
        datatype, packed = "FP32", windows.astype("<f4")
    shape = tuple(int(size) for size in packed.shape)
    return WireTensor(datatype=datatype, shape=shape, data=packed.tobytes())


def _advice(
    answer: InferAnswer, down_bytes: int, windows: Windows, up_bytes: int
) -> Advice | NoAdvice:
    """An answer as the cascade takes it; one that does not fit the question is none."""
    if answer.status != "ok" or answer.logits is None:
        reason = f"{answer.status}: {answer.reason}"
        return NoAdvice(reason, up_bytes, answer.retry_after_s)
    told, shape = answer.logits, answer.logits.shape
    logits = np.frombuffer(told.data, _NUMPY[told.datatype]).reshape(shape).astype(np.float32)
    fits = logits.ndim == 2 and len(logits) == len(windows) and logits.shape[1] > 0
    if not fits or (answer.labels and len(answer.labels) != shape[1]):
        reason = f"logits of shape {list(shape)} for {len(windows)} windows"
        return NoAdvice(reason, up_bytes)
    if not np.isfinite(logits).all():
        return NoAdvice("logits that are not finite", up_bytes)
    return Advice(logits, answer.labels, answer.version, up_bytes, down_bytes)
