import random
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from safetensors.numpy import save

from cloud.broker import Broker, start_broker
from edge_agent.config import AgentConfig, DataConfig
from edge_agent.runner import AgentRunner
from federation.datasets.cached import load
from federation.learning.data import LocalData
from federation.protocol import codec
from federation.protocol import messages as m
from federation.protocol.clock import steady_clock
from federation.protocol.codec import Weights
from federation.protocol.transfer import content_of, cut
from simulations.demo.script import write_data
from tests.strangers import Clock, RunningHub, Stranger, running_hub, small_plan, until

pytestmark = pytest.mark.broker

HOUR_S = 3600.0

Meet = Callable[..., Stranger]


@pytest.fixture
def own_broker(tmp_path: Path) -> Iterator[Broker]:
    """A broker with nobody else on it."""
    with start_broker("auto", tmp_path / "broker") as started:
        yield started


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningHub]:
    with (
        start_broker("auto", tmp_path_factory.mktemp("broker")) as broker,
        running_hub(tmp_path_factory.mktemp("hub"), broker.url) as running,
    ):
        yield running


@pytest.fixture(scope="module")
def honest(hub: RunningHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentConfig]:
    """A real agent that takes part in every run."""
    with running_agent(tmp_path_factory.mktemp("honest"), hub.url) as config:
        yield config


@pytest.fixture
def meet(hub: RunningHub) -> Iterator[Meet]:
    """Strangers who are known to the hub; they leave in the end."""
    met: list[Stranger] = []

    def join(name: str, **capability: Any) -> Stranger:
        met.append(Stranger(name, hub.url))
        met[-1].join(**capability)
        met[-1].hear(m.Welcome)
        return met[-1]

    yield join
    for stranger in met:
        stranger.leave()


class running_agent:  # noqa: N801 -- used as a function
    """A real agent in a thread, on a few of the digits."""

    def __init__(self, home: Path, url: str, clock: Clock | None = None) -> None:
        if not (home / "data").is_dir():
            digits = load("digits", cache=Path())
            write_data(home / "data", LocalData(digits.x[:64], digits.y[:64]))
        self.config = AgentConfig(
            device="honest",
            broker=url,
            folder=home / "journal",
            infers=False,
            data=DataConfig(folder=home / "data"),
        )
        self._clock = clock or steady_clock()

    def __enter__(self) -> AgentConfig:
        self._runner = AgentRunner(self.config, clock=self._clock, rng=random.Random(2))
        self._thread = threading.Thread(target=self._runner.run, name="agent")
        self._thread.start()
        return self.config

    def __exit__(self, *_: object) -> None:
        self._runner.stop()
        self._thread.join(40.0)
        assert not self._thread.is_alive()


def begin_run(hub: RunningHub, stranger: Stranger, **options: Any) -> tuple[m.Assignment, Weights]:
    """A run of the honest device and a stranger, up to the stranger's assignment."""
    hub.ask(small_plan(stranger.name, **options))
    assignment = stranger.hear(m.Assignment)
    assert assignment.inline is not None
    return assignment, codec.decode(assignment.inline)


def open_letter_of(assignment: m.Assignment, data: bytes, **changes: Any) -> m.UpdateOpen:
    letter = m.UpdateOpen(
        attempt=assignment.attempt,
        content=content_of(data, 64 * 1024),
        report=m.Report(samples=10),
        inline=data,
    )
    return msgspec.structs.replace(letter, **changes)


def nan(base: Weights) -> bytes:
    return save({**base, "classifier.bias": np.full(10, np.nan, np.float32)})


def infinite(base: Weights) -> bytes:
    return save({**base, "classifier.bias": np.full(10, np.inf, np.float32)})


def another_shape(base: Weights) -> bytes:
    return save({**base, "classifier.weight": np.zeros((10, 65), np.float32)})


def another_name(base: Weights) -> bytes:
    return save({**base, "backdoor": np.zeros(3, np.float32)})


def another_type(base: Weights) -> bytes:
    return save({**base, "classifier.bias": np.zeros(10, np.float64)})


def a_tensor_less(base: Weights) -> bytes:
    return save({"classifier.bias": base["classifier.bias"]})


def no_tensors(_: Weights) -> bytes:
    return b"these are not the tensors you are looking for"


def cut_short(base: Weights) -> bytes:
    return codec.encode(base)[:-4]


@pytest.mark.parametrize(
    ("poison", "words"),
    [
        (nan, "classifier.bias"),
        (infinite, "classifier.bias"),
        (another_shape, "(10, 65)"),
        (another_name, "backdoor"),
        (another_type, "float64"),
        (a_tensor_less, "classifier.weight"),
        (no_tensors, "cut short or not tensors"),
        (cut_short, "fetch it again"),
    ],
)
def test_an_update_that_cannot_be_averaged_is_refused_alone(
    poison: Callable[[Weights], bytes],
    words: str,
    hub: RunningHub,
    honest: AgentConfig,
    meet: Meet,
) -> None:
    """A useless update is refused with its reason, and the round closes with the others'."""
    stranger = meet(poison.__name__.replace("_", "-"))
    assignment, base = begin_run(hub, stranger)

    stranger.say(open_letter_of(assignment, poison(base)))

    told = stranger.hear(m.UpdateAck)
    assert told.verdict == "rejected"
    assert words in told.reason
    run = stranger.name
    assert hub.finish(run).status == "finished"
    assert hub.store.rounds(run)[0].devices == (honest.device,)
    assert words in hub.why(run).dropped[stranger.name]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"content": m.Content(digest="0" * 64, size=2**40, chunk_bytes=65536)}, "16777216 chunks"),
        ({"content": m.Content(digest="0" * 64, size=100, chunk_bytes=0)}, "chunks of 0"),
        ({"content": m.Content(digest="0" * 64, size=2000, chunk_bytes=2**30)}, "262144"),
        ({"inline": b"short"}, "5 bytes"),
        ({"report": m.Report(samples=-5)}, "-5 samples"),
        ({"report": m.Report(samples=1, loss_sum=float("nan"))}, "not finite"),
        ({"report": m.Report(samples=1, seconds=1e308)}, "beyond all reason"),
        ({"report": m.Report(samples=1, steps=2**64 - 1)}, "18446744073709551615 steps"),
    ],
)
def test_an_announcement_that_cannot_be_is_refused_before_a_byte_is_taken(
    changes: dict[str, Any],
    words: str,
    hub: RunningHub,
    honest: AgentConfig,
    meet: Meet,
    request: pytest.FixtureRequest,
) -> None:
    """An update of impossible size, chunks or report is refused, and the run goes on."""
    stranger = meet(f"announces-{request.node.callspec.indices['changes']}")
    assignment, base = begin_run(hub, stranger)

    stranger.say(open_letter_of(assignment, codec.encode(base), **changes))

    told = stranger.hear(m.UpdateAck)
    assert told.verdict == "rejected"
    assert words in told.reason
    assert hub.finish(stranger.name).status == "finished"
    assert hub.store.rounds(stranger.name)[0].devices == (honest.device,)


def test_a_bad_chunk_costs_neither_its_update_nor_another(
    hub: RunningHub, honest: AgentConfig, meet: Meet
) -> None:
    """Truncated, oversize, damaged and misplaced chunks are refused; the right ones then count."""
    stranger = meet("chunks")
    assignment, base = begin_run(hub, stranger)
    data = codec.encode(base)
    content = content_of(data, 1024)
    crc32, chunk = cut(data, content, 0)
    chunks = {
        "truncated": (0, zlib.crc32(chunk[:100]), chunk[:100]),
        "oversize": (0, zlib.crc32(bytes(4096)), bytes(4096)),
        "damaged": (0, crc32, chunk[::-1]),
        "misplaced": (999, crc32, chunk),
        "negative": (-1, crc32, chunk),
    }
    stranger.say(open_letter_of(assignment, data, content=content, inline=None))
    stranger.hear(m.UpdateAck)

    def send(index: int, crc32: int, chunk: bytes) -> m.UpdateAck:
        named = {"attempt": assignment.attempt, "digest": content.digest}
        stranger.say(m.UpdateChunk(**named, index=index, crc32=crc32, data=chunk))
        return stranger.hear(m.UpdateAck)

    answers = [send(*bad) for bad in chunks.values()]
    for index in range(content.chunks):
        last = send(index, *cut(data, content, index))

    assert [(a.verdict, any(a.received)) for a in answers] == [("open", False)] * len(chunks)
    assert last.verdict == "stored"
    assert len(hub.refused("chunks")) == len(chunks)
    assert hub.finish("chunks").status == "finished"
    assert hub.store.rounds("chunks")[0].devices == ("chunks", honest.device)


def test_letters_that_cannot_be_read_are_recorded_and_the_hub_goes_on(
    hub: RunningHub, honest: AgentConfig, meet: Meet
) -> None:
    """Another version, noise, a forged sender or a wrong topic: each is refused and on record."""
    stranger = meet("letters")
    begin_run(hub, stranger)
    mine, his = "fl/1/fleet/d/letters/up", f"fl/1/fleet/d/{honest.device}/up"
    beat = m.Heartbeat()
    newer = msgspec.msgpack.encode(
        m.Envelope(version=2, sender="letters", epoch=stranger.epoch, body=beat)
    )
    unknown = {"version": 1, "sender": "letters", "epoch": 1, "body": {"letter": "love"}}
    goodbye = m.seal("letters", 2**40, m.Presence(state="disconnected"))
    thrown = {
        "protocol version 2": (f"{mine}/hb", newer),
        "not readable": (f"{mine}/hb", b"\xc1 is never MessagePack"),
        "malformed": (f"{mine}/hb", msgspec.msgpack.encode(unknown)),
        "'letters' came on the branch of 'honest'": (f"{his}/state", goodbye),
        "it belongs on": (f"{mine}/task", m.seal("letters", stranger.epoch, beat)),
        "is not of this fleet": ("fl/1/fleet/d/NOT A NAME/up/hb", newer),
    }
    before = len(hub.refused(""))

    for topic, payload in thrown.values():
        stranger.throw(topic, payload)

    until(lambda: len(hub.refused("")) == before + len(thrown))
    reasons = [event.detail["reason"] for event in hub.refused("")[before:]]
    for words in thrown:
        assert [words in reason for reason in reasons].count(True) >= 1, (words, reasons)
    stranger.leave()
    assert hub.finish("letters").status == "finished"
    assert hub.store.rounds("letters")[0].devices == (honest.device,)


def test_somebody_elses_attempt_is_not_mine_to_speak_of(
    hub: RunningHub, honest: AgentConfig, meet: Meet
) -> None:
    """A device that declines, or fills, its neighbour's attempt changes nothing of it."""
    stranger = meet("neighbour")
    assignment, base = begin_run(hub, stranger, rounds=2)
    his = assignment.attempt.replace("_neighbour", f"_{honest.device}")

    stranger.say(m.TaskEvent(attempt=his, event="declined", reason="not today"))
    letter = open_letter_of(assignment, nan(base), attempt=his)
    stranger.say(letter)

    until(lambda: len(hub.refused("neighbour")) == 2)
    stranger.leave()
    assert hub.finish("neighbour").status == "finished"
    assert [row.devices for row in hub.store.rounds("neighbour")] == [(honest.device,)] * 2


def test_an_agent_survives_what_is_not_for_it(
    hub: RunningHub, honest: AgentConfig, meet: Meet, caplog: pytest.LogCaptureFixture
) -> None:
    """Noise, another version and chunks nobody asked for on its branch do not disturb an agent."""
    stranger = meet("pretender")
    branch = f"fl/1/fleet/d/{honest.device}/dn"
    newer = m.Envelope(version=2, sender="hub", epoch=2**40, body=m.Cancel(attempt="a", reason=""))
    chunk = m.BlobChunk(digest="0" * 64, index=7, crc32=0, data=b"unasked")

    stranger.throw(f"{branch}/task", msgspec.msgpack.encode(newer))
    stranger.throw(f"{branch}/ctl", b"")
    stranger.throw(f"{branch}/blob/{chunk.digest}/7", m.seal("hub", 2, chunk))
    stranger.throw(f"{branch}/task", m.seal("pretender", 2**40, m.Cancel(attempt="a", reason="")))

    until(lambda: caplog.text.count("letter refused") == 3, lambda: caplog.text)
    assert "protocol version 2" in caplog.text
    hub.ask(small_plan("undisturbed", devices_per_round=1))
    stranger.leave()
    assert hub.finish("undisturbed").status == "finished"


def test_the_steady_clock_never_jumps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Setting the wall clock, either way, moves no moment of a process that runs."""
    clock = steady_clock()
    before = clock()

    for jump_s in (-HOUR_S, HOUR_S):
        monkeypatch.setattr(time, "time", lambda jump_s=jump_s: before + jump_s)
        assert 0.0 <= clock() - before < 5.0


@pytest.mark.parametrize("jump_s", [-HOUR_S, HOUR_S], ids=["back", "forward"])
def test_a_clock_that_was_set_at_a_restart_stretches_no_deadline(
    jump_s: float, own_broker: Broker, tmp_path: Path
) -> None:
    """A round open over a restart ends within its own deadline, wherever the clock is set."""
    now = steady_clock()
    plan = small_plan("hour", devices_per_round=1, deadline_s=2.0, max_abandoned=0)
    with running_hub(tmp_path, own_broker.url, now) as hub:
        silent = Stranger("silent", own_broker.url)
        silent.join()
        hub.ask(plan)
        silent.hear(m.Assignment)

    with running_hub(tmp_path, own_broker.url, lambda: now() + jump_s) as hub:
        begun = time.monotonic()
        ended = hub.finish("hour")

    silent.leave()
    assert time.monotonic() - begun < 8.0
    assert ended.status == "failed"
    assert "quorum is 1" in ended.reason


def test_a_clock_set_back_loses_no_training(own_broker: Broker, tmp_path: Path) -> None:
    """Agent and hub restarted an hour earlier finish the round they were in, counting it once."""
    now = steady_clock()
    plan = small_plan("back", devices_per_round=1, lost_grace_s=60, deadline_s=60, epochs=500)
    with (
        running_hub(tmp_path / "hub", own_broker.url, now) as hub,
        running_agent(tmp_path, own_broker.url, now),
    ):
        hub.ask(plan)
        until(lambda: [a.status for a in hub.store.attempts("back", 1)] == ["training"])

    def earlier() -> float:
        return now() - HOUR_S

    with (
        running_hub(tmp_path / "hub", own_broker.url, earlier) as hub,
        running_agent(tmp_path, own_broker.url, earlier),
    ):
        ended = hub.finish("back")

    assert ended.status == "finished"
    assert ended.round == 1
    assert hub.store.rounds("back")[0].devices == ("honest",)
