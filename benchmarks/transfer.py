"""A 5 MB update over a slow link that is cut every few seconds, beside a plain MQTT publish."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import msgspec

from benchmarks.claims import Claim, Options, claim, main
from benchmarks.fleet import (
    Fleet,
    agent_settings,
    all_ready,
    check_alive,
    echo_plan,
    hub_settings,
    running,
    serving,
    write_samples,
)
from benchmarks.plain_publish import generous_broker, publish_plainly
from benchmarks.processes import wait_until
from federation.protocol.clock import steady_clock
from simulations.link import LinkProxy
from simulations.processes import agent_process

RATE_BPS = 2e6
CUT_EVERY_S = 5.0
KEEPALIVE_S = 30
GOAL = 1.25
"""At most this many times the ideal: the update's bits over the link's rate."""


@dataclass(frozen=True, slots=True)
class Upload:
    """One update's way: seconds from the device's disk to the hub's record, bytes on the link."""

    seconds: float
    passed_bytes: int
    size_bytes: int
    base_s: float

    @property
    def ideal_s(self) -> float:
        """What the link's rate alone asks for."""
        return self.size_bytes * 8 / RATE_BPS


def measure(options: Options) -> list[Claim]:
    """A real agent sends an update through a proxy of 2 Mbit/s that resets it every 5 seconds.

    The task is an echo, so the base model comes down the same bad link first. What is timed is
    the way up: from the update being on the device's disk to its being in the hub's record.
    """
    size, times, patience_s = (2_000_000, 1, 15.0) if options.is_quick else (5_000_000, 3, 60.0)
    with _plain_link(options) as (port, near):
        calm_s = _plainly(options, near, port, size, patience_s)
        uploads = _uploads(options, size, times)
        options.tell(f"paho's plain publish, a cut every {CUT_EVERY_S:g} s")
        with _cutting(near):
            cut_s = _plainly(options, near, port, size, patience_s)
    return _claims(uploads, calm_s, cut_s, patience_s)


def _claims(
    uploads: list[Upload], calm_s: float | None, cut_s: float | None, patience_s: float
) -> list[Claim]:
    ideal_s = uploads[0].ideal_s
    task = f"{uploads[0].size_bytes / 1e6:.3g} MB up at 2 Mbit/s, a cut every {CUT_EVERY_S:g} s"
    seconds = median(upload.seconds for upload in uploads)
    worst = max(upload.seconds for upload in uploads)
    beyond = median(upload.passed_bytes - upload.size_bytes for upload in uploads)
    peer = "paho's plain publish, same cuts"
    plain = peer if cut_s is not None else f"{peer}: not within {patience_s:g} s"
    return [
        claim(f"{task}: time", seconds, "s", peer=plain, peer_value=cut_s),
        claim(
            f"{task}: times the ideal",
            seconds / ideal_s,
            "x",
            peer="bound: bits over rate",
            peer_value=1.0,
            goal=GOAL,
        ),
        claim(f"{task}: times the ideal, slowest of {len(uploads)}", worst / ideal_s, "x"),
        claim(
            f"{task}: bytes on the link beyond the update's",
            100 * beyond / uploads[0].size_bytes,
            "%",
        ),
        claim(
            "the base on its way down, same cuts: time",
            median(upload.base_s for upload in uploads),
            "s",
            peer="bound: bits over rate",
            peer_value=ideal_s,
        ),
        claim(
            f"{task}: time",
            seconds,
            "s",
            peer="paho's plain publish, without cuts",
            peer_value=calm_s,
        ),
    ]


def _uploads(options: Options, size: int, times: int) -> list[Upload]:
    config = hub_settings(options.folder, options.broker)
    home = options.folder / "slow"
    with (
        serving(config, options.folder) as (hub, store),
        LinkProxy(config.broker.port, rate_bps=RATE_BPS) as link,
    ):
        settings = agent_settings(home, link.port, write_samples(options.folder / "data"))
        settings = msgspec.structs.replace(settings, keepalive_s=KEEPALIVE_S)
        agent = agent_process(settings, home, verbose=True)
        with running([agent]):
            fleet = Fleet(hub, {home.name: agent}, store)
            wait_until(lambda: all_ready(fleet), "start of the agent", patience_s=60.0)
            found = []
            for number in range(1, times + 1):
                options.tell(f"a base down and its update up, {number} of {times}, with cuts")
                with _cutting(link):
                    found.append(_upload(fleet, link, home / "journal", f"run-{number}", size))
            return found


def _upload(fleet: Fleet, link: LinkProxy, journal: Path, run: str, size: int) -> Upload:
    store, clock = fleet.store, steady_clock()
    store.request_run(echo_plan(run, model_bytes=size, devices=1, rounds=1))

    def has_update() -> bool:
        check_alive([fleet.hub, *fleet.agents.values()])
        # Written beside and renamed: the name is there when the whole is on the disk.
        return any(path.suffix == "" for path in (journal / "updates").iterdir())

    wait_until(has_update, "the base's way down", patience_s=300.0, every_s=0.005)
    began, passed = clock(), link.up_bytes
    wait_until(
        lambda: store.run_status(run).status == "finished",
        "the update's way up",
        patience_s=300.0,
    )
    passed = link.up_bytes - passed
    row = store.rounds(run)[0]
    (kept,) = (event for event in store.events(run) if event.kind == "update-accepted")
    return Upload(
        seconds=kept.at - began,
        passed_bytes=passed,
        size_bytes=kept.detail["content"]["size"],
        base_s=began - row.opened_at,
    )


def _plainly(
    options: Options, near: LinkProxy, port: int, size: int, patience_s: float
) -> float | None:
    options.tell(f"paho's plain publish, at most {patience_s:g} s")
    return publish_plainly(
        os.urandom(size),
        near_port=near.port,
        broker_port=port,
        keepalive_s=KEEPALIVE_S,
        patience_s=patience_s,
    )


@contextmanager
def _plain_link(options: Options) -> Iterator[tuple[int, LinkProxy]]:
    with (
        generous_broker(options.broker, options.folder / "plain") as port,
        LinkProxy(port, rate_bps=RATE_BPS) as near,
    ):
        yield port, near


@contextmanager
def _cutting(link: LinkProxy) -> Iterator[None]:
    """Reset the link every `CUT_EVERY_S`, for as long as this lasts."""
    is_over = threading.Event()

    def cut() -> None:
        while not is_over.wait(CUT_EVERY_S):
            link.cut()

    thread = threading.Thread(target=cut, name="cutter", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


if __name__ == "__main__":
    main("transfer", measure)
