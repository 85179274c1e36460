"""Real peers over a real broker give the bits of the simulated ones, without any hub."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest

from cloud.broker import Broker
from cloud.config import BrokerConfig, HubConfig
from edge_agent.config import AgentConfig, DataConfig, TrainingConfig
from edge_agent.durable import peek_sealed
from edge_agent.peering_config import PeerModelChoice, PeersConfig, PeerTraining
from edge_agent.peering_facts import PeerKept
from federation.learning.data import LocalData
from simulations.bus import LinkQuality
from simulations.device_model import DeviceModel, Member
from simulations.peers import PeerWorld
from simulations.processes import Process, agent_process, hub_process
from tests.peers import full_mesh
from tests.real import (
    RealFleet,
    digits_plan,
    digits_shards,
    make_crash,
    restart_after_crash,
    wait_until,
)


def peers_table(neighbours: Sequence[str], rounds: int) -> PeersConfig:
    """With 300 hidden units a model does not fit a letter: chunks travel, too."""
    return PeersConfig(
        mode="always",
        neighbours=tuple(neighbours),
        run="digits",
        rounds=rounds,
        seed=5,
        patience_s=100.0,
        model=PeerModelChoice(name="mlp", sizes={"hidden": 300}),
        training=PeerTraining(max_steps=20, batch_size=16, learning_rate=0.1, momentum=0.9),
    )


def simulated(shards: Mapping[str, LocalData], rounds: int) -> dict[str, PeerKept]:
    """How far each peer is in the end, in the world."""
    mesh = full_mesh(sorted(shards))
    members = []
    for name, data in shards.items():
        peering = peers_table(mesh[name], rounds).as_peering(name)
        quality = LinkQuality(delay_s=(0.0, 0.5))
        members.append(Member(name, data, DeviceModel(peering=peering, quality=quality)))
    world = PeerWorld(members)
    assert world.run()
    return {name: world.kept(name) for name in shards}


class RealPeers:
    """The processes of the peers, none of them started yet."""

    def __init__(
        self,
        folder: Path,
        broker: Broker,
        shards: Mapping[str, LocalData],
        rounds: int,
        tables: Mapping[str, PeersConfig] | None = None,
    ) -> None:
        self._folder, self._rounds = folder, rounds
        self.processes: dict[str, Process] = {}
        mesh = full_mesh(sorted(shards))
        tables = tables or {name: peers_table(mesh[name], rounds) for name in shards}
        for name, data in shards.items():
            home = folder / name
            (home / "data").mkdir(parents=True)
            np.savez(home / "data" / "data.npz", x=data.x, y=data.y)
            config = AgentConfig(
                device=name,
                broker=broker.url,
                folder=home / "journal",
                keepalive_s=10,
                infers=False,
                data=DataConfig(folder=home / "data"),
                training=TrainingConfig(checkpoint_s=0.05),
                peers=tables[name],
            )
            self.processes[name] = agent_process(config, home, verbose=True)

    def kept(self, name: str) -> PeerKept | None:
        """How far this peer is, as its journal has it."""
        payload = peek_sealed(self._folder / name / "journal" / "peer")
        return msgspec.msgpack.decode(payload, type=PeerKept) if payload else None

    def finish(self, patience_s: float) -> dict[str, PeerKept]:
        """Wait for everybody's last mixing."""
        wait_until(lambda: all(map(self._is_finished, self.processes)), patience_s, self.account)
        return {name: kept for name in self.processes if (kept := self.kept(name)) is not None}

    def account(self) -> str:
        return "\n".join(f"--- {n}\n{p.last_words()}" for n, p in self.processes.items())

    def _is_finished(self, name: str) -> bool:
        kept = self.kept(name)
        return kept is not None and kept.is_mixed and kept.round == self._rounds


@contextmanager
def real_peers(
    folder: Path, broker: Broker, shards: Mapping[str, LocalData], rounds: int
) -> Iterator[RealPeers]:
    peers = RealPeers(folder, broker, shards, rounds)
    try:
        yield peers
    finally:
        for process in peers.processes.values():
            process.stop()


def test_three_real_peers_equal_the_simulated_ones(broker: Broker, tmp_path: Path) -> None:
    """One killed in training and resumed, models and trust are equal to the last bit."""
    shards = digits_shards(3)
    with real_peers(tmp_path, broker, shards, rounds=2) as peers:
        mark = tmp_path / "killed"
        make_crash(peers.processes["d01"], "mid-training", mark)
        for process in peers.processes.values():
            process.start()
        restart_after_crash(peers.processes["d01"], mark, peers.account)

        real = peers.finish(90.0)

    assert real == simulated(shards, rounds=2)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twelve_real_peers_equal_the_simulated_ones(broker: Broker, tmp_path: Path) -> None:
    """A full mesh of twelve, ten rounds of digits over the broker: the same bits."""
    shards = digits_shards(12)
    with real_peers(tmp_path, broker, shards, rounds=10) as peers:
        for process in peers.processes.values():
            process.start()

        real = peers.finish(800.0)

    assert real == simulated(shards, rounds=10)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_real_agents_go_on_as_peers_while_their_hub_is_killed(
    broker: Broker, tmp_path: Path
) -> None:
    """The hub dies by SIGKILL: agents mix among themselves, come back to it, and the run ends."""
    shards = digits_shards(3)
    plan = digits_plan(3, 8, hidden=300)
    mesh = full_mesh(sorted(shards))
    hub_config = HubConfig(folder=tmp_path / "hub", broker=BrokerConfig(url=broker.url))
    hub = hub_process(hub_config, tmp_path, verbose=True)
    agents = RealPeers(
        tmp_path,
        broker,
        shards,
        rounds=0,
        tables={
            name: PeersConfig(mode="fallback", neighbours=mesh[name], after_s=1.0, patience_s=60.0)
            for name in shards
        },
    )
    fleet = RealFleet(plan, hub_config, hub, agents.processes, {})
    try:
        fleet.begin()
        store = fleet.store
        assert store is not None
        wait_until(
            lambda: any(each.status == "closed" for each in store.rounds("digits")),
            90,
            fleet.account,
        )
        hub.kill()
        wait_until(lambda: all(_mixes(agents.kept(name)) for name in shards), 90, fleet.account)
        hub.start()
        fleet.finish()
    finally:
        for process in (*agents.processes.values(), hub):
            process.stop()
        if fleet.store is not None:
            fleet.store.close()

    # What was learned went back with the first training for the hub.
    assert all(agents.kept(name) is None for name in shards)


def _mixes(kept: PeerKept | None) -> bool:
    """Whether a peer has mixed the models of all three."""
    return kept is not None and kept.is_mixed and len(kept.row) == 3
