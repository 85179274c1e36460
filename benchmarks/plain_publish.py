"""The peer of a transfer: one MQTT publish of the whole payload, by paho with its own loop."""

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from paho.mqtt.client import Client, MQTTMessage  # noqa: TID251 -- the peer itself
from paho.mqtt.enums import CallbackAPIVersion  # noqa: TID251 -- the peer itself

from benchmarks.claims import BrokerKind
from benchmarks.fleet import check_alive, running
from benchmarks.processes import wait_until
from cloud.broker import HOST, find_mosquitto, find_nats
from federation.errors import HeadwaterError
from simulations.processes import Process, free_port

TOPIC = "plain/update"
LARGEST_BYTES = 64 * 2**20


@contextmanager
def generous_broker(kind: BrokerKind, folder: Path) -> Iterator[int]:
    """The port of a broker that takes payloads of megabytes, as our own does not."""
    folder.mkdir(parents=True)
    port, config = free_port(), folder / "broker.conf"
    program = find_mosquitto() if kind != "nats" else ""
    if program:
        owner = ["user root"] if os.geteuid() == 0 else []
        config.write_text("\n".join([f"listener {port} {HOST}", "allow_anonymous true", *owner]))
    elif program := find_nats() if kind != "mosquitto" else "":
        settings = {
            "server_name": "plain",
            "host": HOST,
            "port": -1,
            "max_payload": LARGEST_BYTES,
            "jetstream": {"store_dir": str(folder / "store")},
            "mqtt": {"host": HOST, "port": port},
        }
        config.write_text(json.dumps(settings))
    else:
        raise HeadwaterError("no broker is installed for the plain publish; see --broker")
    broker = Process([program, "-c", str(config)], folder / "broker.log")
    with running([broker]):
        wait_until(lambda: _answers(broker, port), "start of a broker", patience_s=30.0)
        yield port


def publish_plainly(
    payload: bytes, *, near_port: int, broker_port: int, keepalive_s: int, patience_s: float
) -> float | None:
    """Seconds from the publish (QoS 1) until a subscriber has it all; None: not in time.

    The publisher connects to `near_port`, the subscriber beside the broker to `broker_port`. The
    publisher keeps its session, and comes back a second after each loss, paho's quickest.
    """
    has_arrived = threading.Event()

    def on_message(_client: Client, _data: object, message: MQTTMessage) -> None:
        if message.payload == payload:
            has_arrived.set()

    subscriber, is_subscribed = _client("subscriber"), threading.Event()
    subscriber.on_message = on_message
    subscriber.on_subscribe = lambda *_: is_subscribed.set()
    subscriber.on_connect = lambda client, *_: client.subscribe(TOPIC, 1)
    publisher, is_connected = _client("publisher"), threading.Event()
    publisher.on_connect = lambda *_: is_connected.set()
    with _looping(subscriber, broker_port, 60), _looping(publisher, near_port, keepalive_s):
        if not (is_subscribed.wait(30.0) and is_connected.wait(30.0)):
            raise HeadwaterError("paho did not connect within 30 s; see --broker")
        began = time.monotonic()
        publisher.publish(TOPIC, payload, qos=1)
        return time.monotonic() - began if has_arrived.wait(patience_s) else None


def _client(name: str) -> Client:
    client = Client(CallbackAPIVersion.VERSION2, client_id=name, clean_session=False)
    client.reconnect_delay_set(1, 1)
    return client


@contextmanager
def _looping(client: Client, port: int, keepalive_s: int) -> Iterator[None]:
    client.connect(HOST, port, keepalive_s)
    client.loop_start()
    try:
        yield
    finally:
        client.disconnect()
        client.loop_stop()


def _answers(broker: Process, port: int) -> bool:
    check_alive([broker])
    probe, is_connected = _client("probe"), threading.Event()
    probe.on_connect = lambda *_: is_connected.set()
    try:
        with _looping(probe, port, 60):
            return is_connected.wait(2.0)
    except OSError:
        return False
