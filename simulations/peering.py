"""A scenario of peers without a hub, and what comes of it."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean

import msgspec

from cloud.config import ModelChoice, RunPlan
from cloud.coordination.rounds import RoundPolicy
from edge_agent.peering_config import PeerTraining
from edge_agent.peering_facts import PeerKept
from edge_agent.peers import PeerPlan, PeerTerms
from federation.config import read_config
from federation.errors import ConfigError
from federation.learning.data import LocalData
from federation.learning.evaluation import evaluate
from federation.learning.mixers import mixer_named
from federation.learning.models import sizes_of
from federation.learning.topology import Topology, neighbours_in
from federation.protocol.codec import decode
from federation.protocol.messages import LocalPlan, ModelSpec, Params
from simulations.attacks import labels_shifted
from simulations.device_model import Member
from simulations.fleet import FleetData, fleet_data
from simulations.peers import PeerWorld
from simulations.populating import population_of
from simulations.scenario import Scenario
from simulations.tables import DevicePlan, FleetPlan, LinkPlan, Record, require

SHIPPED = Path(__file__).parent / "scenarios" / "peers"
"""The folder of the scenarios of peers that come with the package."""


class PeerRun(Record, frozen=True, kw_only=True):
    """What is learned, and for how many rounds."""

    name: str
    rounds: int
    model: ModelChoice
    training: PeerTraining = PeerTraining()
    seed: int = 0


class PeerTable(Record, frozen=True, kw_only=True):
    """Who hears whom, and how peers mix: see `edge_agent.peers.PeerTerms`."""

    topology: Topology = Topology()
    rule: str = "trust"
    params: Params = msgspec.field(default_factory=dict)
    hold_out: float = 0.25
    rotate_every: int = 0
    patience_s: float = 60.0

    def __post_init__(self) -> None:
        mixer_named(self.rule).settings(self.params)
        require(0.0 < self.hold_out < 1.0, "peers.hold_out", self.hold_out, "between 0 and 1")
        require(
            self.rotate_every >= 0, "peers.rotate_every", self.rotate_every, "0 (never) or more"
        )
        require(self.patience_s > 0.0, "peers.patience_s", self.patience_s, "above 0")


class Liars(Record, frozen=True, kw_only=True):
    """Peers that offer something else than they learned: see `simulations.peers.LIES`."""

    devices: tuple[str, ...]
    lie: str


class Shift(Record, frozen=True, kw_only=True):
    """Peers whose labels all are (y + `by`) modulo the number of classes: another concept."""

    devices: tuple[str, ...] = ()
    by: int = 5


class PeerScenario(Record, frozen=True, kw_only=True):
    """All of a simulation of peers. `seed` decides links, pace and lies."""

    run: PeerRun
    peers: PeerTable
    fleet: FleetPlan
    link: LinkPlan = LinkPlan()
    device: DevicePlan = DevicePlan()
    liars: tuple[Liars, ...] = ()
    shift: Shift = Shift()
    seed: int = 0


class PeerRound(Record, frozen=True, kw_only=True):
    """What the honest peers were after a round.

    Accuracies are on held-out data under each peer's own labels. `foreign_mass` is the mean
    share their rows give to all liars and peers of another concept together.
    """

    round: int
    accuracy: float
    worst: float
    foreign_mass: float


class PeerResult(Record, frozen=True, kw_only=True):
    """What came of a simulation of peers. `matrix` has each honest peer's last row."""

    name: str
    rule: str
    is_finished: bool
    virtual_s: float
    rounds: tuple[PeerRound, ...]
    matrix: dict[str, dict[str, float]]
    refused: dict[str, dict[str, str]]
    wire_up_bytes: int
    wire_down_bytes: int


def read_peer_scenario(given: str) -> PeerScenario:
    """The scenario in a TOML file, given by its path or by the name of a shipped one.

    Raises:
        ConfigError: neither, an unknown key, or a value of the wrong type or range.
    """
    shipped = {path.stem: path for path in sorted(SHIPPED.glob("*.toml"))}
    path = Path(given)
    if not path.is_file() and given not in shipped:
        raise ConfigError(
            f"there is no scenario of peers {given!r}; give the path of a TOML file, or one of "
            f"the shipped: {', '.join(shipped)}"
        )
    return read_config(path if path.is_file() else shipped[given], PeerScenario)


def simulate_peers(
    scenario: PeerScenario,
    *,
    cache: Path,
    on_round: Callable[[PeerRound], None] = lambda _: None,
) -> PeerResult:
    """Run a scenario of peers to its end.

    Raises:
        ConfigError: a scenario that cannot be.
        DataError: a data set that is not there.
        TrainingError: a peer cannot train or mix.
    """
    whole = _as_scenario(scenario)
    data = fleet_data(whole, cache=cache)
    lies = {name: liars.lie for liars in scenario.liars for name in liars.devices}
    _check_names(scenario, data, lies)
    ledger = _Ledger(scenario, data, lies, on_round)
    world = PeerWorld(
        _members(scenario, whole, data),
        attackers=lies,
        seed=scenario.seed,
        observe=ledger.observe,
    )
    is_finished = world.run(whole.limit_s, awaited=ledger.honest)
    traffic = [world.bus.traffic(name) for name in world.devices]
    return PeerResult(
        name=scenario.run.name,
        rule=scenario.peers.rule,
        is_finished=is_finished,
        virtual_s=world.clock.now,
        rounds=tuple(ledger.rounds),
        matrix={name: world.kept(name).row for name in ledger.honest},
        refused={name: world.kept(name).refused for name in ledger.honest},
        wire_up_bytes=sum(up for up, _ in traffic),
        wire_down_bytes=sum(down for _, down in traffic),
    )


class _Ledger:
    """Measures each round of the honest peers when the last of them has mixed."""

    def __init__(
        self,
        scenario: PeerScenario,
        data: FleetData,
        lies: Mapping[str, str],
        on_round: Callable[[PeerRound], None],
    ) -> None:
        self.honest = [name for name in data.devices if name not in lies]
        self.rounds: list[PeerRound] = []
        self._on_round = on_round
        self._spec = scenario.run.model
        shifted = set(scenario.shift.devices)
        self._foreign = {
            name: {*lies, *((data.devices.keys() - shifted) if name in shifted else shifted)}
            for name in self.honest
        }
        self._held_out = {
            name: _shifted(scenario, name, data.held_out, shifted) for name in self.honest
        }
        self._mixed: dict[int, dict[str, tuple[float, float]]] = {}

    def observe(self, name: str, kept: PeerKept) -> None:
        if name not in self._foreign or not kept.is_mixed or not kept.round:
            return
        tally = evaluate(self._spec, decode(kept.model), self._held_out[name])
        foreign = sum(kept.row.get(other, 0.0) for other in self._foreign[name])
        done = self._mixed.setdefault(kept.round, {})
        done[name] = (tally.accuracy, foreign)
        if len(done) == len(self.honest):
            self._close(kept.round, self._mixed.pop(kept.round))

    def _close(self, number: int, done: Mapping[str, tuple[float, float]]) -> None:
        accuracies = [accuracy for accuracy, _ in done.values()]
        row = PeerRound(
            round=number,
            accuracy=fmean(accuracies),
            worst=min(accuracies),
            foreign_mass=fmean(foreign for _, foreign in done.values()),
        )
        self.rounds.append(row)
        self._on_round(row)


def _as_scenario(scenario: PeerScenario) -> Scenario:
    """The same fleet for whoever deals out data; no hub will look at the policy."""
    run, devices = scenario.run, scenario.fleet.devices
    policy = RoundPolicy(devices_per_round=devices, quorum=devices)
    plan = RunPlan(name=run.name, rounds=run.rounds, model=run.model, policy=policy, seed=run.seed)
    return Scenario(
        run=plan,
        fleet=scenario.fleet,
        link=scenario.link,
        device=scenario.device,
        seed=scenario.seed,
    )


def _members(scenario: PeerScenario, whole: Scenario, data: FleetData) -> list[Member]:
    run, table = scenario.run, scenario.peers
    graph = neighbours_in(table.topology, data.devices)
    spec = ModelSpec(name=run.model.name, sizes=run.model.sizes)
    plan = LocalPlan(model=spec, seed=run.seed, **msgspec.structs.asdict(run.training))
    members = []
    population = population_of(whole, data, sleeps=False)
    for member in map(population.member, range(len(population.names))):
        terms = PeerTerms(
            neighbours=graph[member.name],
            rule=table.rule,
            params=table.params,
            hold_out=table.hold_out,
            rotate_every=table.rotate_every,
            patience_s=table.patience_s,
            timeout_s=scenario.device.timeout_s,
        )
        peering = PeerPlan(run=run.name, plan=plan, terms=terms, rounds=run.rounds)
        model = dataclasses.replace(member.model, peering=peering)
        held = _shifted(scenario, member.name, member.data, set(scenario.shift.devices))
        members.append(Member(member.name, held, model))
    return members


def _shifted(scenario: PeerScenario, name: str, data: LocalData, shifted: set[str]) -> LocalData:
    if name not in shifted:
        return data
    return labels_shifted(data, scenario.shift.by, sizes_of(scenario.run.model)["classes"])


def _check_names(scenario: PeerScenario, data: FleetData, lies: Mapping[str, str]) -> None:
    for name in (*lies, *scenario.shift.devices):
        if name not in data.devices:
            raise ConfigError(
                f"{name!r} is no device of this fleet; there are {', '.join(data.devices)}: "
                "correct liars and shift"
            )
    if len(lies) == len(data.devices):
        raise ConfigError("every device is a liar; at least one is to be measured: spare one")
