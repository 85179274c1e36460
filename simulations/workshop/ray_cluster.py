"""Trainings on a Ray cluster: more than one machine. Ray is an optional extra.

Each worker is an actor on one core. The fleet's data and the bases lie in Ray's object store,
once a machine, and workers read them where they lie; orders and answers are bytes.
"""

import importlib
import logging
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from federation.errors import ConfigError, TrainingError
from federation.learning.data import LocalData
from simulations.workshop.cohorts import CohortRule
from simulations.workshop.grouped import Grouped
from simulations.workshop.job import Job, Trainer
from simulations.workshop.manner import manner_of
from simulations.workshop.orders import (
    bases_of,
    pack_answer,
    pack_order,
    unpack_answer,
    unpack_order,
)
from simulations.workshop.pool import Answer, Pool


class RayWorkshop(Grouped):
    """Trains cohorts in actors of a Ray cluster.

    Every machine of the cluster needs this package at the same version. Bits agree with those
    of other workshops where processors and libraries are of one kind.

    Args:
        data: what each device holds; it is stored in the cluster once.
        workers: how many actors, from 1, each with a core of its own. They decide no bit.
        address: a running cluster's, as `ray.init` takes it (none: begin one on this machine,
            on loopback, that ends with the workshop). A process keeps to one of the two.
        exact: as for `InProcess`.
        train: as for `InProcess`; it must be a function that the other machines can import.
        rule: as for `InProcess`.

    Raises:
        ConfigError: no workers, Ray is not installed, or the cluster cannot be reached.
        TrainingError: actors that do not start.
    """

    def __init__(
        self,
        data: Mapping[str, LocalData],
        *,
        workers: int,
        address: str | None = None,
        exact: bool = False,
        train: Trainer | None = None,
        rule: CohortRule | None = None,
    ) -> None:
        crew = Actors(data, workers, address, exact=exact, train=train)
        super().__init__(Pool(crew), data, manner_of(exact=exact, train=train, rule=rule))


class Actors:
    """A crew of Ray actors."""

    def __init__(
        self,
        data: Mapping[str, LocalData],
        workers: int,
        address: str | None,
        *,
        exact: bool,
        train: Trainer | None,
    ) -> None:
        if workers < 1:
            raise ConfigError(f"{workers} workers; expected 1 or more")
        self._ray = _ray(address)
        self._is_ours = _connect(self._ray, address, workers)
        self._pending: dict[Any, tuple[int, int, Sequence[Job]]] = {}
        self._bases: list[bytes] = []
        self._stored: list[Any] = []
        actor = self._ray.remote(num_cpus=1)(_Actor)
        stored = self._ray.put(data)
        self._actors = [actor.remote(stored, exact, train) for _ in range(workers)]
        try:
            self._await_start()
        except BaseException:
            self.close()
            raise

    @property
    def workers(self) -> int:
        """How many actors there are."""
        return len(self._actors)

    def give(self, worker: int, number: int, cohort: Sequence[Job]) -> None:
        """Send a cohort; its bases travel to the actor's machine once."""
        bases = bases_of(cohort)
        if [id(base) for base in bases] != [id(base) for base in self._bases]:
            self._bases, self._stored = bases, [self._ray.put(base) for base in bases]
        order = msgspec.msgpack.encode(pack_order(cohort))
        answer = self._actors[worker].train.remote(order, *self._stored)
        self._pending[answer] = (worker, number, cohort)

    def wait(self) -> list[Answer]:
        """Block until one answer or more are there.

        Raises:
            TrainingError: an actor has died, or could not do what it was given.
        """
        ready, _ = self._ray.wait(list(self._pending), num_returns=1)
        answers = []
        for reference in ready:
            worker, number, cohort = self._pending.pop(reference)
            parts = msgspec.msgpack.decode(self._get(reference, cohort), type=list[bytes])
            answers.append(Answer(worker, number, unpack_answer(parts)))
        return answers

    def close(self) -> None:
        """End all actors, in the middle of a training too."""
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors = []
        self._pending.clear()
        self._stored.clear()
        if self._is_ours:
            self._ray.shutdown()

    def _await_start(self) -> None:
        ready = [actor.is_ready.remote() for actor in self._actors]
        try:
            self._ray.get(ready, timeout=_START_S)
        except self._ray.exceptions.GetTimeoutError:
            raise TrainingError(
                f"{len(ready)} Ray actors are not ready after {_START_S:g} s: the cluster may "
                "have fewer cores free than workers; ask for fewer"
            ) from None
        except self._ray.exceptions.RayError as error:
            raise TrainingError(
                f"Ray actors cannot start ({_in_short(error)}): install the same version of "
                "this package and of Python on every machine of the cluster"
            ) from None

    def _get(self, reference: Any, cohort: Sequence[Job]) -> bytes:
        names = ", ".join(job.device for job in cohort[:3])
        try:
            answer: bytes = self._ray.get(reference)
        except self._ray.exceptions.RayActorError as error:
            raise TrainingError(
                f"a Ray actor died while it trained {names} ({_in_short(error)}), probably for "
                "want of memory: use fewer workers, or a smaller batch or model, and run again"
            ) from None
        except self._ray.exceptions.RayError as error:
            raise TrainingError(
                f"training of {names} failed on the cluster ({_in_short(error)}): run it in one "
                "process to see where"
            ) from None
        return answer


_START_S = 120.0
"""Actors that are not ready after so long are waiting for cores that never come free."""


class _Actor:
    """What runs on the cluster."""

    def __init__(self, data: Mapping[str, LocalData], exact: bool, train: Trainer | None) -> None:
        import torch

        torch.set_num_threads(1)
        self._data = data
        self._manner = manner_of(exact=exact, train=train, rule=None)

    def is_ready(self) -> bool:
        return True

    def train(self, order: bytes, *bases: bytes) -> bytes:
        parts = msgspec.msgpack.decode(order, type=list[bytes])
        cohort = unpack_order(parts, bases)
        return msgspec.msgpack.encode(pack_answer(self._manner.train(cohort, self._data)))


def _ray(address: str | None) -> Any:
    """Ray, told before it is loaded what it reads once: it would tell its makers of its use."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address is None and "ray" not in sys.modules:
        # Who reaches a cluster can run code on it. So ours listens on loopback alone, as Ray
        # does elsewhere where this is off, and to whom knows a secret of this process.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        if "RAY_AUTH_MODE" not in os.environ:
            os.environ["RAY_AUTH_MODE"] = "token"
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    try:
        return importlib.import_module("ray")
    except ImportError:
        raise ConfigError(
            "Ray is not installed: install headwater[ray], or train in local processes"
        ) from None


def _connect(ray: Any, address: str | None, workers: int) -> bool:
    """Join a cluster, or begin one; whether it is ours to end."""
    if ray.is_initialized():
        return False
    try:
        if address is not None:
            ray.init(address, logging_level=logging.ERROR, log_to_driver=False)
        else:
            ray.init(
                num_cpus=workers,
                include_dashboard=False,
                logging_level=logging.ERROR,
                log_to_driver=False,
            )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"no Ray cluster at {address or 'this machine'} ({_in_short(error)}): start it, or "
            "correct the address"
        ) from None
    return True


def _in_short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1].strip()}" if lines else type(error).__name__
