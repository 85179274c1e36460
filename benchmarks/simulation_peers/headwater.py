"""The same work with Headwater, with all that is lifelike switched on.

Devices come and go, some fail in the middle of a round and come back, links have delays, and all
of it happens on the virtual clock.
"""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path

from benchmarks.simulation_peers.marks import Marks
from benchmarks.simulation_peers.tasks import MODELS
from benchmarks.simulation_peers.work import Arrays, Work
from cloud.config import ReleasePlan, RunPlan
from cloud.coordination.rounds import RoundPolicy
from federation.learning.data import LocalData
from federation.learning.plans import TrainingPlan
from simulations.fleet import FleetData, device_names
from simulations.report import RoundResult
from simulations.scenario import Scenario
from simulations.simulation import simulate
from simulations.tables import (
    AvailabilityPlan,
    DeviceClass,
    DevicePlan,
    FailurePlan,
    FleetPlan,
    LinkPlan,
)
from simulations.workshop import InProcess, Processes, Workshop

SHARE_ON = 0.9
"""The share of devices that are on in a round."""

FAILURES = 0.05
"""The chance that a device that was asked fails before it has sent its update."""


DEVICES = DevicePlan(
    classes=(
        DeviceClass(like="raspberry_pi_4", share=0.5),
        DeviceClass(like="phone", share=0.5),
    ),
    spread=0.5,
    clock_offset_s=2.0,
    clock_drift_ppm=50.0,
)
"""Two classes of devices, each with its pace, energy and links, and clocks that differ."""


class Held(Mapping[str, LocalData]):
    """Whose data are whose: a window on everybody's samples, made when it is asked for."""

    def __init__(self, arrays: Arrays, clients: int) -> None:
        self._arrays = arrays
        self._clients = clients

    def __getitem__(self, name: str) -> LocalData:
        return LocalData(*self._arrays.client(int(name.removeprefix("d"))))

    def __iter__(self) -> Iterator[str]:
        return iter(device_names(self._clients))

    def __len__(self) -> int:
        return self._clients


def scenario_of(work: Work) -> Scenario:
    """The work as a scenario.

    A device that fails is back in time to do its part, so that as many updates count as with the
    peers, none of which can lose one; `harness` looks at that.
    """
    return Scenario(
        run=RunPlan(
            name="bench",
            rounds=work.rounds,
            model=MODELS[work.task],
            policy=RoundPolicy(devices_per_round=work.per_round, quorum=work.per_round // 2),
            training=TrainingPlan(
                epochs=work.epochs, batch_size=work.batch_size, learning_rate=work.learning_rate
            ),
            release=ReleasePlan(every=0),
            seed=work.seed,
        ),
        fleet=FleetPlan(devices=work.clients),
        link=LinkPlan(delay_s=(0.01, 0.1)),
        device=DEVICES,
        availability=AvailabilityPlan(kind="bernoulli", q=SHARE_ON),
        failures=FailurePlan(chance=FAILURES, away_s=(1.0, 5.0)),
        seed=work.seed,
    )


def run(work: Work) -> Marks:
    """Do the work: its marks."""
    arrays, marks = Arrays(work), Marks(work.rounds)
    held_out = LocalData(arrays.test_x, arrays.test_y)

    def mark(row: RoundResult) -> None:
        marks.mark(len(row.devices), row.accuracy or 0.0)

    data = FleetData(Held(arrays, work.clients), held_out)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        with closing(_workshop(work, data)) as workshop:
            simulate(scenario_of(work), out, cache=out, data=data, workshop=workshop, on_round=mark)
    return marks


def _workshop(work: Work, data: FleetData) -> Workshop:
    if work.processes > 1:
        return Processes(data.devices, workers=work.processes)
    return InProcess(data.devices, in_place=True)
