"""What processes cost: CPU seconds and memory of a process with all that it started."""

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psutil

from federation.errors import HeadwaterError

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of some processes together, in MiB.

    `rss_mb` counts what processes share once for each; `pss_mb` counts it once in all;
    `uss_mb` is what would be free if they ended.
    """

    processes: int
    rss_mb: float
    pss_mb: float
    uss_mb: float


def tree(pids: Iterable[int]) -> list[psutil.Process]:
    """These processes and all their living descendants."""
    found: dict[int, psutil.Process] = {}
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            root = psutil.Process(pid)
            found |= {each.pid: each for each in (root, *root.children(recursive=True))}
    return list(found.values())


def cpu_s(pids: Iterable[int]) -> float:
    """CPU seconds spent so far by these processes and their descendants, ended ones included."""
    total = 0.0
    for process in tree(pids):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def memory(pids: Iterable[int]) -> Memory:
    """Memory of these processes and their descendants now."""
    infos = []
    for process in tree(pids):
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            infos.append(process.memory_full_info())
    return Memory(
        processes=len(infos),
        rss_mb=sum(info.rss for info in infos) / MIB,
        pss_mb=sum(info.pss for info in infos) / MIB,
        uss_mb=sum(info.uss for info in infos) / MIB,
    )


def wait_until(
    condition: Callable[[], Any],
    what: str,
    *,
    patience_s: float,
    every_s: float = 0.1,
) -> None:
    """Wait until the condition holds.

    Raises:
        HeadwaterError: it does not within this patience.
    """
    deadline = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > deadline:
            raise HeadwaterError(f"{what}: not within {patience_s:g} s; see what is said above")
        time.sleep(every_s)
