import itertools
import queue
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from cloud.broker import Broker
from federation.errors import ConfigError
from federation.protocol.effects import Link
from federation.protocol.link import Arrived, MailboxConfig, draw_backoff, parse_url
from federation.protocol.messages import MAX_LETTER_BYTES
from federation.protocol.mqtt import Mailbox
from federation.protocol.topics import Route
from simulations.link import LinkProxy
from tests.brokers import StartBroker

STATE = "fl/1/gym/d/{}/up/state"
HUB = Route("fl/1/gym/d/wrist-1/up/birth")
TASK = Route("fl/1/gym/d/wrist-1/dn/task", expiry_s=300)


FIRST_EPOCH = {"mosquitto": 1, "nats": 2}
"""NATS refuses MQTT 5 first, which costs one epoch."""


class Person:
    """Somebody with a mailbox, an own epoch counter, and ears."""

    def __init__(self, name: str, url: str, epochs: Iterator[int], **options: Any) -> None:
        self.name = name
        self.heard: queue.Queue[Arrived | Link] = queue.Queue()
        config = MailboxConfig(
            url=url, client_id=name, backoff_s=(0.05, 1.0), close_s=2.0, keepalive_s=10
        )
        self.mailbox = Mailbox(
            replace(config, **options),
            deliver=self.heard.put,
            next_epoch=epochs.__next__,
            last_will=lambda epoch: (
                Route(STATE.format(name), retain=True),
                f"lost {epoch}".encode(),
            ),
            rng=random.Random(7),
        )
        self.mailbox.open()

    def link(self, timeout_s: float = 10.0) -> Link:
        """The next change of the link."""
        event = self.heard.get(timeout=timeout_s)
        assert isinstance(event, Link), event
        return event

    def letter(self, timeout_s: float = 10.0) -> Arrived:
        """The next letter."""
        event = self.heard.get(timeout=timeout_s)
        assert isinstance(event, Arrived), event
        return event

    def letters(self, count: int) -> list[bytes]:
        return [self.letter().payload for _ in range(count)]


Meet = Callable[..., Person]


@pytest.fixture
def meet() -> Iterator[Meet]:
    """Opens mailboxes that are up, and closes them all in the end."""
    people: list[Person] = []
    epochs: dict[str, Iterator[int]] = {}

    def open_mailbox(name: str, url: str, *, is_up: bool = True, **options: Any) -> Person:
        counter = epochs.setdefault(name, itertools.count(1))
        people.append(Person(name, url, counter, **options))
        if is_up:
            assert people[-1].link().is_up
        return people[-1]

    yield open_mailbox
    for person in people:
        person.mailbox.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mailbox")]


def test_letters_arrive_as_they_were_sent(broker: Broker, meet: Meet) -> None:
    """Letters reach both sides whole and in order, up to the largest that may be sent."""
    hub = meet("hub", broker.url, filters=("fl/1/gym/d/+/up/#",))
    device = meet("wrist-1", broker.url, filters=("fl/1/gym/d/wrist-1/dn/#",))
    sent = [b"", b"\x00\xff", *(bytes([n]) * 65536 for n in range(30)), bytes(MAX_LETTER_BYTES)]

    for payload in sent:
        assert device.mailbox.publish(HUB, payload)
        assert hub.mailbox.publish(TASK, payload)

    assert hub.letters(len(sent)) == sent
    assert device.letters(len(sent)) == sent


def test_oversize_is_refused_and_poisons_nothing(broker: Broker, meet: Meet) -> None:
    """A letter larger than the broker takes is refused at once, and the link stays up."""
    hub = meet("hub", broker.url, filters=("fl/1/gym/#",))
    device = meet("wrist-1", broker.url)

    assert not device.mailbox.publish(HUB, bytes(MAX_LETTER_BYTES + 1))
    assert device.mailbox.publish(HUB, b"next")

    assert hub.letter().payload == b"next"
    assert device.heard.empty()


def test_full_outbox_refuses(broker: Broker, meet: Meet) -> None:
    """More than may wait for its turn is refused, not kept."""
    device = meet("wrist-1", broker.url, outbox_bytes=1000)

    assert not device.mailbox.publish(HUB, bytes(1001))
    assert device.mailbox.publish(HUB, bytes(1000))


def test_down_link_refuses(meet: Meet) -> None:
    """Nothing is taken while the link is down, and the reason names address and remedy."""
    device = meet("wrist-1", "mqtt://127.0.0.1:9", is_up=False)

    link = device.link()

    assert not link.is_up
    assert "no broker answers at mqtt://127.0.0.1:9" in link.reason
    assert "start it" in link.reason
    assert not device.mailbox.publish(HUB, b"")


def test_broker_may_come_later(launch_broker: StartBroker, meet: Meet) -> None:
    """A mailbox opened before its broker comes up with it, and spends no epoch on waiting."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    device = meet("wrist-1", f"mqtt://127.0.0.1:{port}", is_up=False)
    assert not device.link().is_up

    broker = launch_broker(port=port)

    link = device.link()
    assert link.is_up
    assert link.epoch == FIRST_EPOCH[broker.kind]


def test_will_carries_the_epoch_of_the_dead_connection(broker: Broker, meet: Meet) -> None:
    """Each connection that dies leaves a retained will with its own epoch."""
    watcher = meet("hub", broker.url, filters=(STATE.format("wrist-1"),))
    with LinkProxy(broker.port) as proxy:
        device = meet("wrist-1", f"mqtt://127.0.0.1:{proxy.port}", is_up=False)
        first = device.link()
        proxy.cut()
        assert watcher.letter().payload == f"lost {first.epoch}".encode()
        assert not device.link().is_up

        second = device.link()
        proxy.cut()

        assert second.epoch > first.epoch
        assert watcher.letter().payload == f"lost {second.epoch}".encode()
        assert meet("late", broker.url, filters=(STATE.format("wrist-1"),)).letter().payload == (
            f"lost {second.epoch}".encode()
        )


def test_goodbye_leaves_no_will(broker: Broker, meet: Meet) -> None:
    """After a clean close the goodbye is the last word, and the will is not published."""
    watcher = meet("hub", broker.url, filters=("fl/1/gym/#",))
    device = meet("wrist-1", broker.url)
    device.mailbox.publish(HUB, b"waiting")

    device.mailbox.close((Route(STATE.format("wrist-1"), retain=True), b"bye"))

    assert watcher.letters(2) == [b"waiting", b"bye"]
    meet("other", broker.url).mailbox.publish(HUB, b"afterwards")
    assert watcher.letter().payload == b"afterwards"


def test_unheard_goodbye_leaves_the_will(broker: Broker, meet: Meet) -> None:
    """A goodbye that the broker never acknowledged is no goodbye: the will speaks."""
    watcher = meet("hub", broker.url, filters=(STATE.format("wrist-1"),))
    with LinkProxy(broker.port) as proxy:
        url = f"mqtt://127.0.0.1:{proxy.port}"
        device = meet("wrist-1", url, is_up=False, close_s=0.3)
        epoch = device.link().epoch
        proxy.blackhole(True)

        device.mailbox.close((Route(STATE.format("wrist-1")), b"bye"))
        proxy.cut()

        assert watcher.letter().payload == f"lost {epoch}".encode()


def test_session_keeps_what_came_meanwhile(broker: Broker, meet: Meet) -> None:
    """What is sent to a device that is away awaits its return, in order."""
    options = {"filters": ("fl/1/gym/d/wrist-1/dn/#",)}
    meet("wrist-1", broker.url, **options).mailbox.close()
    hub = meet("hub", broker.url)
    sent = [f"letter {n}".encode() for n in range(20)]
    for payload in sent:
        assert hub.mailbox.publish(TASK, payload)
    hub.mailbox.close()

    device = meet("wrist-1", broker.url, **options)

    assert device.letters(20) == sent


def test_unacknowledged_letters_come_back(broker: Broker, meet: Meet) -> None:
    """With manual acknowledgement, a hub that died gets again what it had not dealt with."""
    sent = [f"update {n}".encode() for n in range(12)]
    device = meet("wrist-1", broker.url, filters=("fl/1/gym/d/wrist-1/dn/#",))
    with LinkProxy(broker.port) as proxy:
        url = f"mqtt://127.0.0.1:{proxy.port}"
        hub = meet("hub", url, filters=("fl/1/gym/d/+/up/birth",), manual_ack=True)
        for payload in sent:
            assert device.mailbox.publish(HUB, payload)
        arrived = [hub.letter() for _ in sent]
        for letter in arrived[:4]:
            hub.mailbox.acknowledge(letter)
        hub.mailbox.publish(TASK, b"sent after the acknowledgements")
        device.letter()

        proxy.cut()

        assert not hub.link().is_up
        assert hub.link().is_up
        hub.mailbox.acknowledge(arrived[5])  # of the old connection: must do no harm
        assert sorted(hub.letters(8)) == sorted(sent[4:])


def test_version_falls_back_and_is_remembered(broker: Broker, meet: Meet) -> None:
    """A broker without MQTT 5 is spoken to in 3.1.1, and asked for 5 only once."""
    with LinkProxy(broker.port) as proxy:
        device = meet("wrist-1", f"mqtt://127.0.0.1:{proxy.port}", is_up=False)
        first = device.link()
        proxy.cut()
        assert not device.link().is_up

        second = device.link()

        assert (first.is_up, second.is_up) == (True, True)
        assert first.epoch == FIRST_EPOCH[broker.kind]
        assert second.epoch == first.epoch + 1
        assert (first.max_payload > MAX_LETTER_BYTES) == (broker.kind == "mosquitto")


def test_each_loss_is_told_once(broker: Broker, meet: Meet) -> None:
    """However a connection ends, its loss is one event, followed by the next rise."""
    with LinkProxy(broker.port) as proxy:
        device = meet("wrist-1", f"mqtt://127.0.0.1:{proxy.port}", is_up=False)
        told = [device.link().is_up]
        for _ in range(5):
            proxy.cut()
            told += [device.link().is_up, device.link().is_up]

        assert told == [True] + [False, True] * 5
        assert device.heard.empty()


def test_stopped_broker_is_told_once_per_reason(launch_broker: StartBroker, meet: Meet) -> None:
    """While a broker is away its absence is told once, not at every attempt."""
    broker = launch_broker()
    device = meet("wrist-1", broker.url)

    broker.stop()
    reasons = [device.link().reason, device.link().reason]
    launch_broker(port=broker.port)

    assert device.link().is_up
    assert "no broker answers" in reasons[1]
    assert reasons[0] != reasons[1]


def test_wrong_password_is_named_and_tried_again_slowly(
    launch_broker: StartBroker, meet: Meet
) -> None:
    """A refused password gives fact, expectation and remedy; once it is right, the link rises."""
    broker = launch_broker(users={"wrist-1": "right"}, namespace="gym")
    began = time.monotonic()
    device = meet("wrist-1", broker.url, is_up=False, user="wrist-1", password="wrong")
    link = device.link()
    broker.stop()
    launch_broker(port=broker.port, users={"wrist-1": "wrong"}, namespace="gym")

    while not (risen := device.link()).is_up:
        pass

    assert not link.is_up
    assert "refuses 'wrist-1'" in link.reason
    assert "correct" in link.reason
    assert risen.epoch > link.epoch
    assert time.monotonic() - began >= 1.0


def test_taken_over_session_gives_way(meet: Meet) -> None:
    """Told that another client took its session, a mailbox says so and does not hurry back.

    The broker is a script here: mosquitto says so only since 2.0.15, and NATS cannot.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        device = meet("wrist-1", f"mqtt://127.0.0.1:{port}", is_up=False, backoff_s=(0.01, 30.0))
        near, _ = server.accept()
        with near:
            near.recv(1000)
            near.sendall(b"\x20\x03\x00\x00\x00" + b"\xe0\x02\x8e\x00")

        told = [device.link(), device.link()]

        assert [link.is_up for link in told] == [True, False]
        assert "another client connected as 'wrist-1'" in told[1].reason
        server.settimeout(0.5)
        with pytest.raises(TimeoutError):
            server.accept()


def test_receiver_errors_do_not_cost_the_link(
    broker: Broker, meet: Meet, caplog: pytest.LogCaptureFixture
) -> None:
    """An exception in whoever receives is logged, and the next letter is delivered."""
    device = meet("wrist-1", broker.url, filters=("fl/1/gym/d/wrist-1/dn/#",))
    hub = meet("hub", broker.url)
    heard = device.heard.put
    device.mailbox._deliver = lambda event: heard(event) if event.payload != b"bad" else 1 / 0  # type: ignore[union-attr,assignment]

    hub.mailbox.publish(TASK, b"bad")
    hub.mailbox.publish(TASK, b"good")

    assert device.letter().payload == b"good"
    assert "ZeroDivisionError" in caplog.text


def test_silent_broker_is_noticed(broker: Broker, meet: Meet) -> None:
    """A link that swallows everything is down after at most two keepalives and a bit."""
    with LinkProxy(broker.port) as proxy:
        device = meet("wrist-1", f"mqtt://127.0.0.1:{proxy.port}", is_up=False, keepalive_s=1)
        assert device.link().is_up
        proxy.blackhole(True)

        link = device.link(timeout_s=5.0)

        assert not link.is_up
        assert "silent" in link.reason


def test_slow_link_does_not_look_dead(broker: Broker, meet: Meet) -> None:
    """Letters that keep a slow link busy for many keepalives do not cost the connection."""
    route = Route(HUB.topic, qos=0)  # nothing comes back for these but the answers to pings
    with LinkProxy(broker.port, rate_bps=1.5e6) as proxy:
        hub = meet("hub", broker.url, filters=("fl/1/gym/d/+/up/birth",))
        device = meet("wrist-1", f"mqtt://127.0.0.1:{proxy.port}", keepalive_s=2)

        for n in range(16):
            assert device.mailbox.publish(route, bytes([n]) * 65536)

        assert [payload[0] for payload in hub.letters(16)] == list(range(16))
        assert device.heard.empty()


def test_backoff_doubles_under_full_jitter() -> None:
    """Back-off is spread over [0, bound], and the bound doubles up to its longest."""
    rng = random.Random(1)

    for attempt, bound in [(0, 0.5), (1, 1.0), (3, 4.0), (7, 60.0), (5000, 60.0)]:
        drawn = [draw_backoff(attempt, (0.5, 60.0), rng) for _ in range(2000)]
        assert 0.0 <= min(drawn) < 0.02 * bound
        assert 0.98 * bound < max(drawn) <= bound
        assert sum(drawn) / 2000 == pytest.approx(bound / 2, rel=0.1)


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("mqtt://hub.local", ("hub.local", 1883, False)),
        ("mqtts://10.0.0.1", ("10.0.0.1", 8883, True)),
        ("mqtt://[::1]:99/", ("::1", 99, False)),
    ],
)
def test_urls_are_understood(url: str, parts: tuple[str, int, bool]) -> None:
    """An address gives host, port and whether TLS is spoken."""
    assert parse_url(url) == parts


@pytest.mark.parametrize(
    "url",
    ["", "hub.local", "http://hub", "mqtt://", "mqtt://h:port", "mqtt://h/x", "mqtt://h:70000"],
)
def test_bad_urls_are_refused(url: str) -> None:
    """An address that is none is refused before anything starts, saying how to write it."""
    with pytest.raises(ConfigError, match="write mqtt://host:port"):
        MailboxConfig(url=url, client_id="x").check()


def test_absent_ca_file_is_refused() -> None:
    """A TLS file that is not there is refused by name."""
    with pytest.raises(ConfigError, match=r"ca_file '/no/ca\.pem' is not there"):
        MailboxConfig(url="mqtts://h", client_id="x", ca_file="/no/ca.pem").check()
