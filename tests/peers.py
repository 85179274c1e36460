"""Peers for tests: real training on a few digits each."""

from collections.abc import Mapping, Sequence

from edge_agent.agent import AgentSettings
from edge_agent.peers import PeerPlan, PeerTerms
from federation.learning.data import LocalData
from federation.protocol import messages as m
from simulations.bus import LinkQuality
from simulations.device_model import DeviceModel, Member

SETTINGS = AgentSettings(heartbeat_s=20.0, keepalive_s=4.0, timeout_s=2.0)

LOCAL = m.LocalPlan(
    model=m.ModelSpec(name="mlp", sizes={"hidden": 300}),
    max_steps=3,
    batch_size=16,
    learning_rate=0.1,
    momentum=0.9,
    seed=7,
)
"""With 300 hidden units a model has two chunks."""


def peer_plan(
    neighbours: Sequence[str], *, rounds: int = 3, plan: m.LocalPlan = LOCAL, **terms: object
) -> PeerPlan:
    rules: dict[str, object] = {"patience_s": 1e4, "timeout_s": 2.0} | terms
    return PeerPlan(
        run="peers",
        plan=plan,
        rounds=rounds,
        terms=PeerTerms(neighbours=tuple(neighbours), **rules),  # type: ignore[arg-type]
    )


def full_mesh(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    return {name: tuple(other for other in names if other != name) for name in names}


def peer_members(
    shards: Mapping[str, LocalData],
    *,
    quality: LinkQuality | None = None,
    neighbours: Mapping[str, Sequence[str]] | None = None,
    seconds_per_step: float = 1.0,
    joins_at_s: Mapping[str, float] | None = None,
    **plan: object,
) -> list[Member]:
    """A peer for each shard, in a full mesh unless its neighbours are given."""
    neighbours = neighbours or full_mesh(sorted(shards))
    return [
        Member(
            name,
            data,
            DeviceModel(
                seconds_per_step=seconds_per_step,
                joins_at_s=(joins_at_s or {}).get(name, 0.0),
                quality=quality or LinkQuality(delay_s=(0.01, 0.2)),
                settings=SETTINGS,
                peering=peer_plan(neighbours[name], **plan),  # type: ignore[arg-type]
            ),
        )
        for name, data in shards.items()
    ]
