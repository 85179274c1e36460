"""One worker of a `Processes` workshop: a forked process that trains what it is sent."""

import gc
import logging
import os
import queue
import signal
import socket
import threading
from collections.abc import Mapping, Sequence
from typing import NoReturn

import msgspec

from federation.learning.data import LocalData
from simulations.workshop.manner import Manner
from simulations.workshop.orders import pack_answer, unpack_order
from simulations.workshop.parcels import Receiver, send_parcel

_log = logging.getLogger(__name__)


class Heading(msgspec.Struct, frozen=True):
    """The first part of an answer: which cohort, or (0) that the worker is ready.

    `failure` says why there is no answer.
    """

    number: int
    failure: str = ""


def load_torch() -> None:
    """Import what a training needs, before workers are forked: then they need not do it."""
    import torch  # noqa: F401

    from federation.learning import cohort, costs  # noqa: F401


def work(
    channel: socket.socket,
    inherited: Sequence[socket.socket],
    data: Mapping[str, LocalData],
    manner: Manner,
) -> NoReturn:
    """Train what comes over the channel until it closes, then end the process at once.

    The process was forked: it must not return to what its parent was doing. `inherited` are
    the parent's own sockets, which would not close with the parent if they stayed open here.
    """
    try:
        for theirs in inherited:
            theirs.close()
        _prepare()
        orders: queue.SimpleQueue[tuple[list[bytes], list[bytes]]] = queue.SimpleQueue()
        threading.Thread(target=_read, args=(channel, orders), daemon=True).start()
        _answer(channel, Heading(0))
        while True:
            _perform(channel, *orders.get(), data, manner)
    except BaseException:
        _log.exception("worker cannot go on pid=%s", os.getpid())
    finally:
        os._exit(1)


def _prepare() -> None:
    # Ctrl-C reaches every process of the terminal; who ends workers is their parent.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # What was there before the fork stays shared with the parent: no collector touches it.
    gc.freeze()
    import torch

    # Threads of the parent's pool are not here, and a worker keeps to its core.
    torch.set_num_threads(1)


def _read(
    channel: socket.socket, orders: "queue.SimpleQueue[tuple[list[bytes], list[bytes]]]"
) -> None:
    """Read until the parent is gone; then exit, in the middle of a batch too."""
    try:
        receiver = Receiver(channel)
        while (order := receiver.receive()) is not None:
            orders.put(order)
    finally:
        os._exit(0)


def _perform(
    channel: socket.socket,
    parts: list[bytes],
    bases: list[bytes],
    data: Mapping[str, LocalData],
    manner: Manner,
) -> None:
    number = msgspec.msgpack.decode(parts[0], type=int)
    try:
        results = manner.train(unpack_order(parts[1:], bases), data)
    except MemoryError:
        failure = "out of memory: use fewer workers, or a smaller batch or model"
        _answer(channel, Heading(number, failure))
    except Exception as error:  # The outermost loop: the parent must hear of it.
        failure = f"{type(error).__name__}: {error}: run it in one process to see where"
        _answer(channel, Heading(number, failure))
    else:
        _answer(channel, Heading(number), pack_answer(results))


def _answer(channel: socket.socket, heading: Heading, parts: list[bytes] | None = None) -> None:
    try:
        send_parcel(channel, [msgspec.msgpack.encode(heading), *(parts or [])])
    except OSError:
        # The parent is gone: there is nobody left to work for.
        os._exit(0)
