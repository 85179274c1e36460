"""What a swarm's agents do with an assignment: train for real, or hardly anything."""

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import msgspec
import numpy as np

from federation.errors import HeadwaterError
from federation.learning.data import LocalData
from federation.learning.uplink import pack_update
from federation.protocol.codec import decode
from federation.protocol.effects import Trained
from federation.protocol.messages import Assignment, LocalPlan, Report


class Trainer(Protocol):
    """Does what an assignment asks for; a device's training may be cancelled."""

    async def train(
        self, device: str, assignment: Assignment, base: bytes, memory: bytes
    ) -> Trained:
        """The encoded update and its report, or why there is none."""
        ...

    def close(self) -> None:
        """Begin nothing more."""
        ...


class Echo:
    """Sends the base model back with one weight moved, packed as the plan asks: all is overhead.

    Since a weight moves, every round has another model that all devices fetch. Each device
    reports as many samples as it is told to here, so that sums tell who counted.
    """

    def __init__(self, samples: Mapping[str, int]) -> None:
        self._samples = samples
        self._packed: tuple[tuple[str, bytes], bytes] | None = None

    async def train(
        self, device: str, assignment: Assignment, base: bytes, memory: bytes
    ) -> Trained:
        """The base model, all but the same; `memory` stays as it is."""
        try:
            update = self._pack(assignment, base)
        except HeadwaterError as error:
            return Trained(assignment.attempt, failure=str(error))
        report = Report(samples=self._samples[device])
        return Trained(assignment.attempt, update=update, report=report, memory=memory)

    def close(self) -> None:
        """Nothing is under way."""

    def _pack(self, assignment: Assignment, base: bytes) -> bytes:
        """The same bytes for all devices of a round, unless its plans differ in more than seed."""
        plan = msgspec.structs.replace(assignment.plan, seed=0)
        key = (assignment.base.digest, msgspec.msgpack.encode(plan))
        if self._packed is None or self._packed[0] != key:
            self._packed = (key, _echo(plan, base))
        return self._packed[1]


def _echo(plan: LocalPlan, base: bytes) -> bytes:
    weights = decode(base)
    first = min(weights)
    moved = weights[first].copy()
    moved.flat[0] += np.float32(0.001)
    return pack_update({**weights, first: moved}, weights, plan, {}, {})[0]


class RealTrainer:
    """Trains as a device does, each on its own data; one at a time, on a thread of its own."""

    def __init__(self, data: Mapping[str, LocalData]) -> None:
        self._data = data
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="swarm-trainer")

    async def train(
        self, device: str, assignment: Assignment, base: bytes, memory: bytes
    ) -> Trained:
        """What comes of this training; one that is cancelled before its turn does not begin."""
        from edge_agent.trainer import fulfil

        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._thread, fulfil, assignment, base, self._data[device], memory
        )

    def close(self) -> None:
        """Wait for the training under way, and begin nothing more."""
        self._thread.shutdown(cancel_futures=True)
