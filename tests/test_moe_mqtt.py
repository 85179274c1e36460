"""Models over MQTT: a real broker, a real server, and a device that has nothing else."""

import itertools
import math
import queue
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from cloud.broker import Broker
from federation.protocol.clock import steady_clock
from federation.protocol.effects import Link
from federation.protocol.inference import (
    InferAnswer,
    InferRequest,
    WireTensor,
    open_answer,
    seal_request,
)
from federation.protocol.link import Arrived, MailboxConfig
from federation.protocol.messages import Presence, seal
from federation.protocol.mqtt import Mailbox
from federation.protocol.topics import Route, ask_route, device_filters, is_answer, route
from moe_serving.config import HttpConfig, ModelConfig, MoeConfig, MqttConfig
from moe_serving.requests import Ending, Ticket
from moe_serving.serving.server import MoeServer
from tests.moe_models import ABOUT, LABELS, offline_logprobs, publish_tiny

TEXT = "A device with a thin link asks for a word."
WINDOWS = np.random.default_rng(3).standard_normal((2, 32, 3)).astype("<f4")


@dataclass
class Device:
    """One device of the fleet: its mailbox, and what it hears."""

    name: str
    broker: Broker
    heard: queue.SimpleQueue[Any] = field(default_factory=queue.SimpleQueue)

    def __post_init__(self) -> None:
        epochs = itertools.count(1)
        gone = Presence(state="lost")
        self.mailbox = Mailbox(
            MailboxConfig(
                url=self.broker.url,
                client_id=self.name,
                filters=tuple(device_filters("fleet", self.name)),
                session_expiry_s=0,
            ),
            deliver=self.heard.put,
            next_epoch=lambda: next(epochs),
            last_will=lambda epoch: (route("fleet", self.name, gone), seal(self.name, epoch, gone)),
            rng=random.Random(0),
        )
        self.mailbox.open()
        while not (isinstance(event := self.heard.get(timeout=20), Link) and event.is_up):
            pass

    def say(self, way: Route, payload: bytes) -> None:
        """Publish a letter."""
        assert self.mailbox.publish(way, payload)

    def ask(self, request: InferRequest) -> None:
        """Publish a request."""
        self.say(*seal_request("fleet", self.name, 1, request))

    def answer(self, timeout_s: float = 20.0) -> InferAnswer:
        """The next answer it hears."""
        while True:
            event = self.heard.get(timeout=timeout_s)
            if isinstance(event, Arrived) and is_answer("fleet", self.name, event.topic):
                return open_answer("fleet", self.name, event.topic, event.payload)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """One version of each of the three."""
    for name in ABOUT:
        publish_tiny(tmp_path / "repository", name)
    return tmp_path / "repository"


@pytest.fixture
def server(repository: Path, broker: Broker) -> Iterator[MoeServer]:
    """A server of all three at the broker."""
    config = MoeConfig(
        repository=repository,
        http=HttpConfig(port=0),
        mqtt=MqttConfig(broker=broker.url),
        models={name: ModelConfig(target_wait_s=3600.0) for name in ABOUT},
    )
    served = MoeServer(config, clock=steady_clock(), rng=random.Random(1))
    served.start()
    assert served.gateway is not None
    assert served.gateway.wait_until_up(20)
    yield served
    served.close()


@pytest.fixture
def device(broker: Broker) -> Iterator[Device]:
    """A device at the broker."""
    made = Device("watch-7", broker)
    yield made
    made.mailbox.close()


def scoring(number: str) -> InferRequest:
    """A request for what the language model thinks of the text."""
    return InferRequest(
        request=number, model="poet", deadline_s=30, prompt=TEXT, echo=True, logprobs=True
    )


def test_perplexity_over_mqtt_is_that_of_the_model(
    server: MoeServer, device: Device, repository: Path
) -> None:
    """From the log-probabilities of an echoed prompt: equal to the offline figure to 1e-4."""
    tokens = [byte + 3 for byte in TEXT.encode()]
    offline = -np.mean(offline_logprobs(repository / "poet" / "1", tokens))

    device.ask(scoring("r1"))
    answer = device.answer()

    assert (answer.status, answer.request, answer.version) == ("ok", "r1", 1)
    assert (answer.text, answer.tokens) == (TEXT, tuple(tokens))
    served = -np.mean([each for each in answer.logprobs if each is not None])
    assert math.exp(served) == pytest.approx(math.exp(offline), abs=1e-4)
    assert server.host.find("poet").version == 1


@pytest.mark.usefixtures("server")
def test_windows_go_up_and_logits_come_down(device: Device) -> None:
    """A classifier's answer has its logits and labels; half the bytes give nearly the same."""
    whole = WireTensor(shape=(2, 32, 3), data=WINDOWS.tobytes())
    half = WireTensor(shape=(2, 32, 3), datatype="FP16", data=WINDOWS.astype("<f2").tobytes())
    answers = []
    for number, windows in (("a", whole), ("b", half)):
        request = InferRequest(request=number, model="watch", deadline_s=30, windows=windows)
        device.ask(request)
        answers.append(device.answer())

    logits = [np.frombuffer(a.logits.data, "<f4") for a in answers if a.logits is not None]
    assert [a.status for a in answers] == ["ok", "ok"]
    assert answers[0].labels == LABELS
    assert len(logits) == 2
    np.testing.assert_allclose(logits[0], logits[1], atol=0.02)


def test_a_request_that_comes_twice_is_computed_once(server: MoeServer, device: Device) -> None:
    """A copy gets the same answer, and the model does not run for it."""
    settled: list[Ticket] = []
    engine = server.host.find("poet").engine
    seen = engine._observer.on_settled

    def count(ticket: Ticket, ending: Ending, now: float) -> None:
        settled.append(ticket)
        seen(ticket, ending, now)

    engine._observer.on_settled = count  # type: ignore[method-assign]
    device.ask(scoring("r1"))
    device.ask(scoring("r1"))
    answers = [device.answer()]
    device.ask(scoring("r1"))
    device.ask(scoring("r2"))
    while answers[-1].request != "r2":
        answers.append(device.answer())

    assert len(answers) >= 3
    assert all(answer == answers[0] for answer in answers[:-1])
    assert len(settled) == 2


BAD = {
    "both": (InferRequest(request="x", model="poet", deadline_s=9), "invalid", "either"),
    "long": (
        InferRequest(request="x", model="poet", deadline_s=9, prompt="a" * 300),
        "invalid", "prompt",
    ),
    "kind": (
        InferRequest(request="x", model="watch", deadline_s=9, prompt="a"), "invalid", "windows",
    ),
    "endless": (
        InferRequest(
            request="x", model="watch", deadline_s=9,
            windows=WireTensor(shape=(0, 2**31, 2**31, 2**31), data=b""),
        ),
        "invalid", "shape",
    ),
    "unknown": (
        InferRequest(request="x", model="sage", deadline_s=9, prompt="a"), "unknown", "no model",
    ),
    "late": (
        InferRequest(request="x", model="poet", deadline_s=1e-6, prompt="a"), "expired", "deadline",
    ),
}  # fmt: skip


@pytest.mark.usefixtures("server")
def test_every_refusal_has_its_status(device: Device) -> None:
    """What cannot be answered is told with its reason, unreadable requests too where they have a
    number; what has none is passed over, and the next is served.
    """
    found = {}
    for what, (request, _, _) in BAD.items():
        numbered = msgspec.structs.replace(request, request=what)
        device.ask(numbered)
        found[what] = device.answer()
    way = ask_route("fleet", device.name, "poet", 0)
    broken = {"version": 1, "sender": device.name, "epoch": 1, "body": {"request": "broken"}}
    device.say(way, b"\xc1 no letter")
    device.say(way, msgspec.msgpack.encode(broken))
    device.say(way, seal_request("fleet", "somebody-else", 1, scoring("theirs"))[1])
    device.ask(scoring("last"))
    after = [device.answer(), device.answer(), device.answer()]

    for what, (_, status, word) in BAD.items():
        assert found[what].status == status
        assert word in found[what].reason
    assert [(a.request, a.status) for a in after] == [
        ("broken", "invalid"),
        ("theirs", "invalid"),
        ("last", "ok"),
    ]


def test_a_server_that_stops_answers_what_it_accepted(server: MoeServer, device: Device) -> None:
    """Requests that were on their way when it was told to stop each get one answer."""
    for n in range(8):
        request = InferRequest(
            request=f"r{n}", model="poet", deadline_s=30, prompt=TEXT, max_tokens=40
        )
        device.ask(request)
    first = device.answer()
    server.close()
    rest = [device.answer() for _ in range(7)]

    statuses = {a.request: a.status for a in [first, *rest]}
    assert statuses.keys() == {f"r{n}" for n in range(8)}
    assert set(statuses.values()) <= {"ok", "draining"}
