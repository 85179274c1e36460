"""Trainings in several processes of one machine."""

import contextlib
import os
import selectors
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from federation.errors import ConfigError, TrainingError
from federation.learning.data import LocalData
from simulations.workshop.cohorts import CohortRule
from simulations.workshop.grouped import Grouped
from simulations.workshop.job import Job, Trainer
from simulations.workshop.manner import Manner, manner_of
from simulations.workshop.orders import bases_of, pack_order, unpack_answer
from simulations.workshop.parcels import Receiver, SharedFile, send_parcel, shared_file
from simulations.workshop.pool import Answer, Pool
from simulations.workshop.worker import Heading, load_torch, work

START_S = 60.0
"""A worker that is not ready after so long will never be."""

END_S = 5.0
"""A worker that has not ended so long after it was told to is killed."""


class Processes(Grouped):
    """Trains cohorts in worker processes, each on one core.

    Workers are forks of this process: they have the fleet's data without a copy, and begin in
    some milliseconds. Bases and updates travel through shared memory. Workers end with this
    process, however it ends. They train on the CPU. Make the workshop before this process uses
    an accelerator or starts threads that hold locks, since neither survives a fork.

    Args:
        data: what each device holds; it may build an entry at each access.
        workers: how many processes, from 1. They decide no bit.
        exact: as for `InProcess`.
        train: as for `InProcess`.
        rule: as for `InProcess`.

    Raises:
        ConfigError: no workers, or a system that cannot fork.
        TrainingError: workers that do not start.
    """

    def __init__(
        self,
        data: Mapping[str, LocalData],
        *,
        workers: int,
        exact: bool = False,
        train: Trainer | None = None,
        rule: CohortRule | None = None,
    ) -> None:
        manner = manner_of(exact=exact, train=train, rule=rule)
        crew = Forks(data, workers, manner)
        self.pids = crew.pids
        super().__init__(Pool(crew), data, manner)


@dataclass(slots=True, eq=False)
class _Fork:
    """A worker as its parent sees it; `doing` holds the cohorts it was given, oldest first."""

    pid: int
    channel: socket.socket
    receiver: Receiver
    doing: dict[int, Sequence[Job]] = field(default_factory=dict)


class Forks:
    """A crew of forked processes."""

    def __init__(self, data: Mapping[str, LocalData], workers: int, manner: Manner) -> None:
        if workers < 1:
            raise ConfigError(f"{workers} workers; expected 1 or more")
        if not hasattr(os, "fork"):
            raise ConfigError(
                "this system cannot fork processes: train in one process, or on a Ray cluster"
            )
        load_torch()
        self._forks: list[_Fork] = []
        self._bases: list[bytes] = []
        self._shared: SharedFile | None = None
        self._serial = 0
        self._failure = ""
        self._selector = selectors.DefaultSelector()
        for worker in range(workers):
            self._forks.append(self._fork(data, manner))
            self._selector.register(self._forks[-1].channel, selectors.EVENT_READ, worker)
        self._await_start()

    @property
    def workers(self) -> int:
        """How many processes there are."""
        return len(self._forks)

    @property
    def pids(self) -> list[int]:
        """Their process ids."""
        return [fork.pid for fork in self._forks]

    def give(self, worker: int, number: int, cohort: Sequence[Job]) -> None:
        """Send a cohort; what goes wrong with the worker is told by `wait`."""
        fork = self._forks[worker]
        fork.doing[number] = cohort
        parts = [msgspec.msgpack.encode(number), *pack_order(cohort)]
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            send_parcel(fork.channel, parts, self._share(bases_of(cohort)))

    def wait(self) -> list[Answer]:
        """Block until one answer or more are there.

        Raises:
            TrainingError: a worker has died, or could not do what it was given.
        """
        if self._failure:
            raise TrainingError(self._failure)
        answers = []
        for key, _ in self._selector.select():
            heading, parts = self._read(key.data)
            del self._forks[key.data].doing[heading.number]
            answers.append(Answer(key.data, heading.number, unpack_answer(parts)))
        return answers

    def close(self) -> None:
        """End all workers, in the middle of a training too."""
        self._failure = self._failure or "the workshop is closed; make another one"
        for fork in self._forks:
            with contextlib.suppress(OSError):
                # The worker sees the end even where a later fork holds a copy of this socket.
                fork.channel.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + END_S
        for fork in self._forks:
            _await_end(fork, deadline)
            fork.channel.close()
        self._forks.clear()
        self._selector.close()
        if self._shared is not None:
            self._shared.close()
            self._shared = None

    def _fork(self, data: Mapping[str, LocalData], manner: Manner) -> _Fork:
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            work(theirs, [ours, *(fork.channel for fork in self._forks)], data, manner)
        theirs.close()
        return _Fork(pid, ours, Receiver(ours))

    def _await_start(self) -> None:
        waiting, deadline = set(range(self.workers)), time.monotonic() + START_S
        while waiting:
            found = self._selector.select(max(deadline - time.monotonic(), 0.0))
            if not found:
                pid = self._forks[min(waiting)].pid
                raise self._give_up(
                    f"worker process {pid} is not ready after {START_S:g} s: train in one "
                    "process, or make the workshop before anything else runs in this one"
                )
            for key, _ in found:
                self._read(key.data)
                waiting.discard(key.data)

    def _read(self, worker: int) -> tuple[Heading, list[bytes]]:
        fork = self._forks[worker]
        received = fork.receiver.receive()
        if received is None:
            raise self._give_up(f"worker process {fork.pid} {_end_of(fork)}")
        parts, _ = received
        heading = msgspec.msgpack.decode(parts[0], type=Heading)
        if heading.failure:
            devices = _devices_of(fork.doing.get(heading.number, ()))
            raise self._give_up(f"training of {devices} failed: {heading.failure}")
        return heading, parts[1:]

    def _give_up(self, failure: str) -> TrainingError:
        """One worker's end is the end of all: what is missing cannot be done without."""
        self._failure = failure
        self.close()
        return TrainingError(failure)

    def _share(self, bases: list[bytes]) -> SharedFile:
        """The shared file of these bases: the last one, as long as they are the same."""
        same = len(bases) == len(self._bases) and all(
            new is old for new, old in zip(bases, self._bases, strict=True)
        )
        if self._shared is None or not same:
            if self._shared is not None:
                self._shared.close()
            self._serial += 1
            self._bases, self._shared = bases, shared_file(bases, self._serial)
        return self._shared


def _await_end(fork: _Fork, deadline: float) -> int:
    """Wait until a worker has ended, and kill it at the deadline; its exit status."""
    fork.channel.settimeout(max(deadline - time.monotonic(), 0.001))
    try:
        # Answers that nobody waits for may come before the end.
        while fork.channel.recv(4096):
            pass
    except TimeoutError:
        os.kill(fork.pid, signal.SIGKILL)
    except OSError:
        pass
    with contextlib.suppress(ChildProcessError):
        return os.waitpid(fork.pid, 0)[1]
    return 0


def _end_of(fork: _Fork) -> str:
    status = _await_end(fork, time.monotonic() + END_S)
    during = ""
    if fork.doing:
        during = f" while it trained {_devices_of(next(iter(fork.doing.values())))}"
    if os.WIFSIGNALED(status):
        return (
            f"was killed by signal {os.WTERMSIG(status)}{during}, probably for want of memory: "
            "use fewer workers, or a smaller batch or model, and run again"
        )
    return (
        f"ended with status {os.waitstatus_to_exitcode(status)}{during}; what it printed says "
        "why: run again in one process"
    )


def _devices_of(cohort: Sequence[Job]) -> str:
    names = [job.device for job in cohort]
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
