"""Fixtures: a real broker of each kind, on loopback, in a folder of the test."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cloud.broker import Broker, find_mosquitto, find_nats, start_broker

FETCHED = Path(__file__).parents[1] / ".cache" / "mosquitto"
FINDERS = {"mosquitto": find_mosquitto, "nats": find_nats}

StartBroker = Callable[..., Broker]


@pytest.fixture(scope="session", autouse=True)
def fetched_mosquitto() -> None:
    """Child processes, too, find the mosquitto that `scripts/fetch-mosquitto` brought."""
    if FETCHED.is_dir():
        os.environ.setdefault("HEADWATER_MOSQUITTO", str(FETCHED))


@pytest.fixture(
    params=[pytest.param(kind, marks=pytest.mark.broker) for kind in ("mosquitto", "nats")]
)
def broker_kind(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    if not FINDERS[kind]():
        pytest.skip(f"no {kind} on this machine: scripts/fetch-mosquitto .cache/mosquitto")
    return kind


@pytest.fixture
def launch_broker(broker_kind: str, tmp_path: Path) -> Iterator[StartBroker]:
    """Starts brokers of this kind in the test's folder, and stops them in the end."""
    started: list[Broker] = []

    def launch(**options: Any) -> Broker:
        started.append(start_broker(broker_kind, tmp_path / "broker", **options))  # type: ignore[arg-type]
        return started[-1]

    yield launch
    for broker in started:
        broker.stop()


@pytest.fixture
def broker(launch_broker: StartBroker) -> Broker:
    """A broker that lets everyone in."""
    return launch_broker()
