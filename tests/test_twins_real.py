"""Twins of a real fleet: from what agents say over a broker to what the hub's HTTP API answers."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from cloud.config import BrokerConfig, HttpConfig, HubConfig
from edge_agent.config import AgentConfig, DataConfig, EnergyConfig
from simulations.demo.script import write_data
from simulations.processes import Process, agent_process, free_port, hub_process, open_record
from tests.real import digits_plan, digits_shards, wait_until


@dataclass
class Fleet:
    """A hub with its API, two agents, and a client."""

    config: HubConfig
    hub: Process
    agents: dict[str, Process]
    client: httpx.Client

    def account(self) -> str:
        return "\n".join(each.last_words() for each in (self.hub, *self.agents.values()))

    def reported(self, name: str) -> dict[str, Any]:
        try:
            answer = self.client.get(f"/twins/{name}")
        except httpx.TransportError:
            return {}  # The hub is just starting.
        return answer.json()["reported"]["state"] if answer.status_code == 200 else {}

    def settings(self, name: str) -> dict[str, Any]:
        return self.reported(name).get("settings", {})

    def is_there(self, name: str) -> bool:
        return self.reported(name).get("connection", {}).get("state") == "ready"

    def judged(self, name: str) -> list[dict[str, Any]]:
        rows = self.client.get(f"/twins/{name}/forecasts").json()["forecasts"]
        return [row for row in rows if row["outcome"] == "received" and row["predicted"]]

    def run(self, name: str) -> dict[str, str]:
        """A run of two rounds of one device each; who was not asked in the first, and why."""
        plan = msgspec.structs.replace(digits_plan(1, 2), name=name)
        store = open_record(self.config)
        try:
            store.request_run(plan)
            wait_until(lambda: store.run_status(name).status == "finished", 90, self.account)
            return store.excluded(name, 1)
        finally:
            store.close()


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    port, http = free_port(), HttpConfig(port=free_port())
    broker = BrokerConfig(port=port, keepalive_s=10)
    config = HubConfig(folder=tmp_path / "hub", broker=broker, http=http)
    agents = {}
    for name, data in digits_shards(2).items():
        write_data(tmp_path / name / "data", data)
        agent = AgentConfig(
            device=name,
            broker=f"mqtt://127.0.0.1:{port}",
            folder=tmp_path / name / "journal",
            keepalive_s=10,
            infers=False,
            data=DataConfig(folder=tmp_path / name / "data"),
            energy=EnergyConfig(training_w=3.0),
        )
        agents[name] = agent_process(agent, tmp_path / name, verbose=True)
    hub = hub_process(config, tmp_path, verbose=True)
    url = f"http://127.0.0.1:{http.port}/api/v1"
    with httpx.Client(base_url=url, timeout=30.0) as client:
        yield Fleet(config, hub, agents, client)
    for process in (*agents.values(), hub):
        process.stop()


@pytest.mark.broker
@pytest.mark.slow
def test_a_wish_goes_round(fleet: Fleet, tmp_path: Path) -> None:
    """A wish written over HTTP is obeyed by its device, and outlives a new start of both.

    Rounds meanwhile teach the twins: the later parts are foretold, and judged.
    """
    fleet.hub.start()
    wait_until(lambda: "hub is serving" in fleet.hub.last_words(), 90, fleet.account)
    for each in fleet.agents.values():
        each.start()
    wait_until(lambda: all(fleet.settings(name) for name in fleet.agents), 90, fleet.account)

    wish = {"enabled": False, "colour": "red"}
    fleet.client.patch("/twins/d01/desired", json=wish, headers={"If-Match": '"d0"'})
    wait_until(lambda: fleet.settings("d01").get("enabled") is False, 60, fleet.account)
    asked_not = [fleet.run(name)["d01"] for name in ("first", "second")]
    wait_until(lambda: len(fleet.judged("d00")) >= 3, 30, fleet.account)
    for each in (fleet.hub, fleet.agents["d01"]):
        each.stop()
        each.start()
    wait_until(lambda: fleet.is_there("d01"), 90, fleet.account)

    applied = fleet.reported("d01")["applied"]["results"]
    assert applied == {"enabled": "applied", "colour": "unsupported"}
    assert fleet.settings("d01")["enabled"] is False
    assert all("enabled is desired to be false" in reason for reason in asked_not)
    assert fleet.judged("d00")[-1]["predicted"]["energy_j"] > 0
    assert fleet.judged("d01") == []
    assert _listed(tmp_path / "hub.toml") == ["DEVICE", "d00", "d01"]


def _listed(hub: Path) -> list[str]:
    """The first word of each line that `headwater-hub twins` prints."""
    command = [sys.executable, "-m", "cloud", "twins", "--hub", str(hub)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return [line.split()[0] for line in shown.splitlines()]
