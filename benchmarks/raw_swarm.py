"""The bound of a swarm: as many clients exchange the same bytes with one other, and no more.

Each exchange is an update's worth both ways, in letters of the size of chunks, at QoS 1: the
middle sends to a client, the client answers, and the middle sends to it again. The clients are
the swarm's own connections and the middle is the hub's own mailbox, in a process each, so what
is left out is all that a hub and an agent do with a letter.
"""

import argparse
import asyncio
import json
import queue
import random
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.claims import ROOT
from benchmarks.fleet import check_alive, running
from benchmarks.processes import wait_until
from cloud.broker import Broker
from federation.errors import HeadwaterError
from federation.protocol.effects import Link
from federation.protocol.link import Arrived, MailboxConfig
from federation.protocol.mqtt import Mailbox
from federation.protocol.topics import Route
from federation.protocol.transfer import DEFAULT_CHUNK_BYTES
from simulations.processes import Process
from simulations.swarm.connection import Connection, raise_descriptor_limit

PATIENCE_S = 300.0


@dataclass(frozen=True, slots=True)
class Bare:
    """The broker alone: exchanges a second, and CPU seconds an exchange of it and of its ends."""

    rate: float
    broker_cpu_s: float
    ends_cpu_s: float


def exchange(broker: Broker, folder: Path, *, clients: int, rounds: int, update_bytes: int) -> Bare:
    """Exchanges of all clients together, over a broker that was started.

    Raises:
        HeadwaterError: not done within the patience.
    """
    shape = [str(clients), str(rounds), str(update_bytes)]
    command, url = [sys.executable, "-m", "benchmarks.raw_swarm"], broker.url
    environment = {"PYTHONPATH": str(ROOT)}
    crowd = Process([*command, "crowd", url, *shape], folder / "crowd.log", environment)
    middle = Process([*command, "middle", url, *shape], folder / "middle.log", environment)
    for process in (crowd, middle):
        process.log.unlink(missing_ok=True)

    def is_ready() -> bool:
        check_alive([crowd])
        return "ready" in crowd.last_words()

    with running([crowd]):
        wait_until(is_ready, "connecting the clients", patience_s=PATIENCE_S)
        began_s = process_cpu_s(broker.pid), process_cpu_s(crowd.pid)
        with running([middle]):
            wait_until(lambda: not middle.is_running, "the exchanges", patience_s=PATIENCE_S)
        ended_s = process_cpu_s(broker.pid), process_cpu_s(crowd.pid)
    try:
        said = json.loads(middle.last_words())
        seconds, cpu_s = float(said["seconds"]), float(said["cpu_s"])
    except (ValueError, KeyError) as error:
        raise HeadwaterError(f"no figure of the broker alone:\n{middle.last_words()}") from error
    count = clients * rounds
    broker_s, crowd_s = (after - before for before, after in zip(began_s, ended_s, strict=True))
    return Bare(count / seconds, broker_s / count, (crowd_s + cpu_s) / count)


def process_cpu_s(pid: int) -> float:
    """CPU seconds spent by this process alone."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def letters_of(update_bytes: int) -> list[bytes]:
    """An update's worth of bytes, cut as its chunks are."""
    whole = random.Random(0).randbytes(update_bytes)
    return [
        whole[begin : begin + DEFAULT_CHUNK_BYTES]
        for begin in range(0, update_bytes, DEFAULT_CHUNK_BYTES)
    ]


def down(client: int) -> str:
    """The topic on which a client is sent to."""
    return f"raw/{client}/down"


def up(client: int) -> str:
    """The topic on which a client answers."""
    return f"raw/{client}/up"


async def crowd(url: str, clients: int, update_bytes: int) -> None:
    """All clients: each answers in full when it was sent to in full, until the process ends."""
    raise_descriptor_limit(4 * clients + 256)
    letters = letters_of(update_bytes)
    linked: set[int] = set()
    connections: dict[int, Connection] = {}

    def connect(client: int) -> Connection:
        arrived = Counter[int]()

        def deliver(event: Arrived | Link) -> None:
            if isinstance(event, Link):
                linked.add(client)
                return
            arrived[client] += 1
            if arrived[client] % len(letters) == 0:
                for letter in letters:
                    connections[client].publish(Route(up(client)), letter)

        config = MailboxConfig(
            url=url, client_id=f"raw-{client}", filters=(down(client),), session_expiry_s=0
        )
        return Connection(config, epoch=1, is_five=True, deliver=deliver)

    gate = asyncio.Semaphore(32)
    connections |= {client: connect(client) for client in range(clients)}
    lives = [
        asyncio.create_task(each.run(Route(f"raw/{client}/will"), b"", gate=gate))
        for client, each in connections.items()
    ]
    while len(linked) < clients:
        await asyncio.sleep(0.05)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    await asyncio.gather(*lives)


def middle(url: str, clients: int, rounds: int, update_bytes: int) -> dict[str, float]:
    """Send to all clients so many times, the next time when the answer is there; what it took."""
    letters = letters_of(update_bytes)
    inbox: queue.SimpleQueue[Arrived | Link] = queue.SimpleQueue()
    config = MailboxConfig(
        url=url,
        client_id="raw-middle",
        filters=("raw/+/up",),
        manual_ack=True,
        session_expiry_s=0,
        receive_maximum=200,
        window=200,
    )
    mailbox = Mailbox(
        config,
        deliver=inbox.put,
        next_epoch=lambda: 1,
        last_will=lambda _: (Route("raw/will"), b""),
        rng=random.Random(0),
    )
    mailbox.open()
    first = inbox.get(timeout=30.0)
    if not (isinstance(first, Link) and first.is_up):
        raise HeadwaterError(f"the middle has no link: {first}")
    waiting = deque((client, letter) for client in range(clients) for letter in letters)
    heard = Counter[str]()
    left, began, cpu_s = clients * rounds * len(letters), time.perf_counter(), time.process_time()
    while left:
        while waiting and mailbox.publish(Route(down(waiting[0][0])), waiting[0][1]):
            waiting.popleft()
        try:
            event = inbox.get(timeout=0.005 if waiting else 30.0)
        except queue.Empty:
            if waiting:
                continue
            raise HeadwaterError(f"{left} letters did not come within 30 s") from None
        if isinstance(event, Link):
            raise HeadwaterError(f"the middle lost its link: {event.reason}")
        mailbox.acknowledge(event)
        left -= 1
        heard[event.topic] += 1
        done, rest = divmod(heard[event.topic], len(letters))
        if rest == 0 and done < rounds:
            client = int(event.topic.split("/")[1])
            waiting.extend((client, letter) for letter in letters)
    took = {"seconds": time.perf_counter() - began, "cpu_s": time.process_time() - cpu_s}
    mailbox.close()
    return took


def _run() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.raw_swarm", description=__doc__)
    parser.add_argument("part", choices=("crowd", "middle"))
    parser.add_argument("url")
    for name in ("clients", "rounds", "update_bytes"):
        parser.add_argument(name, type=int)
    given = parser.parse_args()
    if given.part == "crowd":
        asyncio.run(crowd(given.url, given.clients, given.update_bytes))
    else:
        took = middle(given.url, given.clients, given.rounds, given.update_bytes)
        sys.stdout.write(json.dumps(took))


if __name__ == "__main__":
    _run()
