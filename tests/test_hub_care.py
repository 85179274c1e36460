"""The hub looks after its broker, and after the models that nobody has released yet."""

import random
import signal
import threading
from pathlib import Path

import msgspec
import psutil
import pytest

from cloud.config import BrokerConfig, HubConfig, ReleasePlan
from cloud.record.registry import Registry
from cloud.serving import serving
from edge_agent.inference import Predictor
from edge_agent.journal import find_release
from federation.protocol.clock import steady_clock
from simulations.processes import free_port
from tests import real

PLAN = msgspec.structs.replace(real.digits_plan(2, rounds=2), release=ReleasePlan(every=10))


def test_a_broker_that_dies_is_started_again(broker_kind: str, tmp_path: Path) -> None:
    """The hub starts its broker again on the same port, and its own link comes back."""
    broker = BrokerConfig(kind=broker_kind, port=free_port())  # type: ignore[arg-type]
    config = HubConfig(folder=tmp_path / "hub", broker=broker)
    with serving(config, clock=steady_clock(), rng=random.Random(0)) as (runner, _):
        thread = threading.Thread(target=runner.run)
        thread.start()
        try:
            first = _brokers()
            assert len(first) == 1
            first[0].send_signal(signal.SIGKILL)

            real.wait_until(
                lambda: bool(_brokers()) and _brokers() != first, 20, lambda: "no new broker"
            )
        finally:
            runner.stop()
            thread.join(20)
    assert not thread.is_alive()
    assert _brokers() == []


@pytest.mark.slow
def test_the_last_model_reaches_devices_though_the_hub_dies_at_the_end(tmp_path: Path) -> None:
    """Killed right after the run has ended, the hub releases when it is back; no data needed."""
    shards = real.digits_shards(2)
    with real.real_fleet(tmp_path, "auto", PLAN, shards, infers=True) as fleet:
        fleet.begin()
        fleet.finish()
        fleet.hub.kill()
        fleet.hub.start()

        folders = [tmp_path / name / "journal" for name in shards]
        real.wait_until(lambda: all(map(find_release, folders)), 60, fleet.account)
        last = Registry(fleet.hub_config.folder).manifest(PLAN.name)[-1]
        for folder, data in zip(folders, shards.values(), strict=True):
            found = find_release(folder)
            assert found is not None
            assert last.round == 2
            _, onnx = found
            assert Registry(fleet.hub_config.folder).read(last.onnx) == onnx.read_bytes()
            assert Predictor(onnx).predict(data.x[:5]).shape == (5, 10)


def _brokers() -> list[psutil.Process]:
    names = ("mosquitto", "nats-server")
    return [
        child
        for child in psutil.Process().children(recursive=True)
        if child.status() != psutil.STATUS_ZOMBIE and child.name().startswith(names)
    ]
