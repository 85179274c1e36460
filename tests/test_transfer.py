"""Chunk transfers end with the same bytes, whatever the link and the restarts do."""

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from federation.errors import TransferError
from federation.protocol.bitmap import bitmap, indices_in
from federation.protocol.messages import Content
from federation.protocol.transfer import (
    Download,
    Incoming,
    check_content,
    chunk_size,
    content_of,
    cut,
)
from federation.protocol.upload import MAX_WINDOW, Upload

TIMEOUT_S = 10.0
LONGEST_DELAY_S = 3.0
MAX_STEPS = 20_000


@dataclass
class Channel:
    """Loses, repeats, delays, reorders and damages; cuts and restarts happen between letters."""

    rng: random.Random
    loss: float
    repeat: float
    damage: float
    now: float = 0.0
    queue: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    sent: int = 0

    def send(self, deliver: Callable[[], None]) -> None:
        for _ in range(1 + (self.rng.random() < self.repeat)):
            self.sent += 1
            if self.rng.random() >= self.loss:
                at = self.now + self.rng.uniform(0.0, LONGEST_DELAY_S)
                heapq.heappush(self.queue, (at, self.sent, deliver))

    def damaged(self, data: bytes) -> bytes:
        if not data or self.rng.random() >= self.damage:
            return data
        position, bit = self.rng.randrange(len(data)), self.rng.randrange(8)
        return data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :]

    def step(self, wake_at: float | None, on_wake: Callable[[], None]) -> None:
        if self.queue and (wake_at is None or self.queue[0][0] <= wake_at):
            self.now, _, deliver = heapq.heappop(self.queue)
            deliver()
        else:
            assert wake_at is not None, "nothing under way and nobody will wake: stuck"
            self.now = max(self.now, wake_at)
            on_wake()


@dataclass
class Push:
    """An Upload and its receiver, which remembers what it stored; both may restart."""

    data: bytes
    content: Content
    channel: Channel
    parts: dict[int, bytes] = field(default_factory=dict)
    stored: bytes | None = None
    is_done: bool = False

    def __post_init__(self) -> None:
        self.restart_receiver()
        self.restart_sender()

    def restart_receiver(self) -> None:
        self.incoming = Incoming(self.content, self.parts)

    def restart_sender(self) -> None:
        self.upload = Upload(self.content, self.data, timeout_s=TIMEOUT_S)
        self.told: set[int] = set()
        self.open()

    def open(self) -> None:
        self.sent_at: dict[int, float] = {}
        self.is_answered = False
        self.upload.open(self.channel.now)
        self.channel.send(self.acknowledge)

    def acknowledge(self) -> None:
        if self.incoming.is_complete:
            self.stored = self.incoming.assemble()
        received, is_final = self.incoming.received, self.stored is not None
        upload = self.upload
        self.channel.send(lambda: upload is self.upload and self.take_ack(received, is_final))

    def take_ack(self, received: bytes, is_final: bool) -> None:
        self.told |= indices_in(received, self.content.chunks)
        self.is_done = self.is_done or is_final
        for index in self.upload.on_ack(received, self.channel.now):
            assert index not in self.told, "an acknowledged chunk was sent again"
            last = self.sent_at.get(index, float("-inf"))
            assert self.channel.now >= last + TIMEOUT_S, "sent twice within its time-out"
            self.sent_at[index] = self.channel.now
            self.send_chunk(index)

    def send_chunk(self, index: int) -> None:
        crc32, chunk = self.upload.chunk(index)
        chunk = self.channel.damaged(chunk)
        self.channel.send(lambda: self.take_chunk(index, crc32, chunk))

    def take_chunk(self, index: int, crc32: int, chunk: bytes) -> None:
        try:
            if self.incoming.add(index, crc32, chunk):
                self.parts[index] = chunk
        except TransferError:
            return
        self.acknowledge()

    def wake(self) -> None:
        assert self.upload.on_timeout(self.channel.now)
        self.channel.send(self.acknowledge)

    def cut_link(self) -> None:
        self.channel.queue.clear()
        self.open()


@dataclass
class Pull:
    """A Download that remembers what it stored, and a hub that remembers nothing."""

    data: bytes
    content: Content
    channel: Channel
    parts: dict[int, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.download = Download(Incoming(self.content, self.parts), timeout_s=TIMEOUT_S)
        self.asked_at: dict[int, float] = {}
        self.ask()

    def ask(self) -> None:
        wanted = self.download.request(self.channel.now)
        for index in wanted:
            assert index not in self.parts, "a chunk that arrived was asked for again"
            last = self.asked_at.get(index, float("-inf"))
            assert self.channel.now >= last + TIMEOUT_S, "asked twice within its time-out"
            self.asked_at[index] = self.channel.now
        if wanted:
            self.channel.send(lambda: self.serve(wanted))

    def serve(self, wanted: tuple[int, ...]) -> None:
        for index in wanted:
            crc32, chunk = cut(self.data, self.content, index)
            chunk = self.channel.damaged(chunk)
            self.channel.send(lambda i=index, c=crc32, d=chunk: self.take_chunk(i, c, d))

    def take_chunk(self, index: int, crc32: int, chunk: bytes) -> None:
        try:
            if self.download.on_chunk(index, crc32, chunk, self.channel.now):
                self.parts[index] = chunk
        except TransferError:
            return
        self.ask()

    def cut_link(self) -> None:
        self.channel.queue.clear()
        self.download.on_link_up()
        self.asked_at.clear()
        self.ask()


datas = st.binary(min_size=0, max_size=400)
chunk_bytes = st.integers(1, 64)
channels = st.builds(
    Channel,
    rng=st.integers(0, 2**32).map(random.Random),
    loss=st.floats(0.0, 0.4),
    repeat=st.floats(0.0, 0.4),
    damage=st.floats(0.0, 0.3),
)
mishaps = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 2)), max_size=6)


@given(datas, chunk_bytes, channels, mishaps)
def test_a_push_ends_with_the_same_bytes(data, chunk_bytes, channel, mishaps):
    """Through loss, repetition, reordering, damage, cuts and restarts a push arrives whole."""
    push = Push(data, content_of(data, chunk_bytes), channel)
    acts = [push.restart_sender, push.restart_receiver, push.cut_link]
    plan = [(steps, acts[act]) for steps, act in mishaps]

    for _ in range(MAX_STEPS):
        if push.is_done:
            break
        if plan and plan[0][0] == 0:
            plan.pop(0)[1]()
        plan[:1] = [(steps - 1, act) for steps, act in plan[:1]]
        channel.step(push.upload.wake_at, push.wake)

    assert push.is_done
    assert push.stored == data


@given(datas, chunk_bytes, channels, mishaps)
def test_a_pull_ends_with_the_same_bytes(data, chunk_bytes, channel, mishaps):
    """Through loss, repetition, reordering, damage, cuts and restarts a pull arrives whole."""
    pull = Pull(data, content_of(data, chunk_bytes), channel)
    acts = [pull.restart, pull.cut_link, pull.restart]
    plan = [(steps, acts[act]) for steps, act in mishaps]

    for _ in range(MAX_STEPS):
        if pull.download.incoming.is_complete:
            break
        if plan and plan[0][0] == 0:
            plan.pop(0)[1]()
        plan[:1] = [(steps - 1, act) for steps, act in plan[:1]]
        channel.step(pull.download.wake_at, pull.ask)

    assert pull.download.incoming.assemble() == data


@dataclass
class Wire:
    """A bottleneck of a fixed rate and delay; a cut loses what is still on it."""

    bps: float
    delay_s: float
    free_at: float = 0.0

    def arrival(self, size_bytes: int, now: float) -> float:
        self.free_at = max(self.free_at, now) + size_bytes * 8 / self.bps
        return self.free_at + self.delay_s


def push_over(
    wire: Wire, upload: Upload, *, cut_every_s: float = float("inf")
) -> tuple[float, int]:
    """The seconds until all is acknowledged, and how many chunks were sent."""
    incoming = Incoming(upload.content)
    now, sent, next_cut = 0.0, 0, cut_every_s
    upload.open(now)
    arrivals = [(wire.arrival(200, now), -1)]
    while not upload.is_acknowledged:
        if not arrivals or arrivals[0][0] > next_cut:
            now, wire.free_at, next_cut = next_cut, next_cut, next_cut + cut_every_s
            upload.open(now)
            arrivals = [(wire.arrival(200, now), -1)]
            continue
        now, index = arrivals.pop(0)
        if index >= 0:
            incoming.add(index, *upload.chunk(index))
        for following in upload.on_ack(incoming.received, now):
            arrivals.append((wire.arrival(upload.content.chunk_bytes, now), following))
            sent += 1
    return now, sent


FIVE_MB = bytes(5_000_000)


@pytest.mark.parametrize(("bps", "delay_s"), [(1e5, 0.05), (2e6, 0.02), (1e8, 0.1)])
def test_the_window_keeps_a_link_busy_and_sends_nothing_twice(bps, delay_s):
    """On a clean link each chunk travels once, in little more than the ideal time."""
    upload = Upload(content_of(FIVE_MB, 64 * 1024), FIVE_MB, timeout_s=TIMEOUT_S)

    took_s, sent = push_over(Wire(bps, delay_s), upload)

    ideal_s = len(FIVE_MB) * 8 / bps
    assert sent == upload.content.chunks
    assert took_s < 1.05 * ideal_s + 20 * delay_s
    assert upload.rate_bps == pytest.approx(bps, rel=0.1) or delay_s > 0.05


def test_a_link_cut_every_five_seconds_costs_less_than_a_quarter():
    """5 MB at 2 Mbit/s with a cut every 5 s take at most 1.25 times the ideal time."""
    upload = Upload(content_of(FIVE_MB, 64 * 1024), FIVE_MB, timeout_s=TIMEOUT_S)

    took_s, _ = push_over(Wire(2e6, 0.02), upload, cut_every_s=5.0)

    assert took_s < 1.25 * len(FIVE_MB) * 8 / 2e6


def test_the_window_stays_bounded():
    """However promptly acknowledgements come, at most MAX_WINDOW chunks are in flight."""
    data = bytes(8000)
    upload = Upload(content_of(data, 1), data)
    incoming, in_flight, now, most = Incoming(upload.content), [], 0.0, 0
    upload.open(now)
    in_flight += upload.on_ack(incoming.received, now)

    while in_flight:
        most = max(most, len(in_flight))
        now += 0.001
        for index in in_flight.copy():
            in_flight.remove(index)
            incoming.add(index, *upload.chunk(index))
            in_flight += upload.on_ack(incoming.received, now)

    assert upload.is_acknowledged
    assert most == MAX_WINDOW


@given(st.lists(st.binary(max_size=40), max_size=20), datas, chunk_bytes)
def test_hostile_acknowledgements_do_no_harm(acks, data, chunk_bytes):
    """Bitmaps too long, too short or senseless only ever name chunks of the content."""
    upload = Upload(content_of(data, chunk_bytes), data, timeout_s=TIMEOUT_S)
    upload.open(0.0)

    sent = [index for now, ack in enumerate(acks) for index in upload.on_ack(ack, now / 10)]

    assert len(sent) == len(set(sent))
    assert set(sent) <= set(range(upload.content.chunks))


def test_a_chunk_that_is_lost_among_others_is_sent_again_in_time():
    """While acknowledgements flow, a lost chunk waits for its time-out and halves the window."""
    data = bytes(4000)
    upload = Upload(content_of(data, 1), data, timeout_s=TIMEOUT_S)
    upload.open(0.0)
    in_flight, arrived = upload.on_ack(b"", 0.0), set()
    assert in_flight == [0, 1, 2, 3]
    most, now = 0, 0.0

    while not arrived or 0 not in in_flight:
        now += 0.1
        arrived |= {index for index in in_flight if index}
        most = max(most, len(in_flight))
        in_flight = upload.on_ack(bitmap(arrived, 4000), now)

    assert TIMEOUT_S <= now < TIMEOUT_S + 0.2
    assert len(in_flight) <= most / 2 + 1


def test_nothing_is_sent_before_the_receiver_has_spoken():
    """A chunk leaves only after an answer to the opening; silence asks again, ever more rarely."""
    upload = Upload(content_of(bytes(100), 10), bytes(100), timeout_s=TIMEOUT_S)

    assert upload.wake_at is None
    assert upload.on_ack(b"", 0.0) == []
    upload.open(1.0)
    waits = []
    for _ in range(6):
        before = upload.wake_at
        assert not upload.on_timeout(before - 0.1)
        assert upload.on_timeout(before)
        waits.append(upload.wake_at - before)
    assert waits == [20.0, 40.0, 60.0, 60.0, 60.0, 60.0]
    assert upload.on_ack(bitmap(range(8), 10), 400.0) == [8, 9]


def test_a_receiver_may_take_back_what_it_found_damaged():
    """All acknowledged, no verdict, and asked again the receiver has nothing: it is sent again."""
    upload = Upload(content_of(bytes(30), 10), bytes(30), timeout_s=TIMEOUT_S)
    upload.open(0.0)
    upload.on_ack(b"\x07", 1.0)

    assert upload.is_acknowledged
    assert upload.on_ack(b"\x00", 2.0) == []
    assert upload.on_timeout(upload.wake_at)
    assert upload.on_ack(b"\x02", 23.0) == [0, 2]


def test_a_download_asks_in_batches_and_asks_again_after_a_cut():
    """Half a window must be free before more is asked for; a new link voids what was asked."""
    data = bytes(range(200))
    download = Download(Incoming(content_of(data, 10), {3: data[30:40]}), window=4)

    assert download.request(0.0) == (0, 1, 2, 4)
    download.on_chunk(0, *cut(data, download.incoming.content, 0), 1.0)
    assert download.request(1.0) == ()
    download.on_chunk(1, *cut(data, download.incoming.content, 1), 1.0)
    assert download.request(1.0) == (5, 6)
    download.on_link_up()
    assert download.request(2.0) == (2, 4, 5, 6)


CONTENT = content_of(bytes(range(100)), 30)
GOOD = cut(bytes(range(100)), CONTENT, 1)


@pytest.mark.parametrize(
    ("index", "crc32", "data", "complaint"),
    [
        (4, *GOOD, "out of range"),
        (-1, *GOOD, "out of range"),
        (1, GOOD[0], GOOD[1][:-1], "has 29 bytes; expected 30"),
        (1, GOOD[0], GOOD[1] + b"x", "has 31 bytes; expected 30"),
        (3, *GOOD, "has 30 bytes; expected 10"),
        (1, GOOD[0] ^ 1, GOOD[1], "does not match its CRC-32"),
        (0, *GOOD, "came again with other bytes"),
    ],
)
def test_a_chunk_that_does_not_fit_is_refused(index, crc32, data, complaint):
    """Out of range, oversize, truncated, damaged or contradicting chunks change nothing."""
    incoming = Incoming(CONTENT, {0: bytes(range(30)), 2: b"short", 9: b"beyond"})

    with pytest.raises(TransferError, match=complaint):
        incoming.add(index, crc32, data)

    assert incoming.received == b"\x01"
    assert list(incoming.missing) == [1, 2, 3]


def test_a_content_that_is_not_its_digest_is_refused():
    """Whole chunks with right checksums are not enough: the digest decides; none may lack."""
    data = bytes(100)
    incoming = Incoming(CONTENT)
    for index in range(4):
        with pytest.raises(TransferError, match=f"lacks {4 - index} chunks"):
            incoming.assemble()
        incoming.add(index, *cut(data, CONTENT, index))

    with pytest.raises(TransferError, match="another SHA-256"):
        incoming.assemble()


@pytest.mark.parametrize(
    "content",
    [
        Content(digest="../../etc/passwd", size=1, chunk_bytes=1),
        Content(digest="A" * 64, size=1, chunk_bytes=1),
        Content(digest="a" * 64, size=-1, chunk_bytes=1),
        Content(digest="a" * 64, size=1, chunk_bytes=0),
        Content(digest="a" * 64, size=1, chunk_bytes=2**20),
        Content(digest="a" * 64, size=10**12, chunk_bytes=1),
    ],
)
def test_a_senseless_manifest_is_refused(content):
    """Nothing is allocated, divided or named by a manifest that cannot be."""
    with pytest.raises(TransferError):
        check_content(content)
    with pytest.raises(TransferError):
        Incoming(content)


@given(st.floats(0, 1e10), st.floats(0.1, 3600), st.integers(0, 2**28))
def test_a_chunk_suits_link_and_broker(link_bps, keepalive_s, max_payload):
    """16 to 256 KiB, within an eighth of the keep-alive, and within what the broker takes."""
    size = chunk_size(link_bps=link_bps, keepalive_s=keepalive_s, max_payload=max_payload)

    assert 1 <= size <= 256 * 1024
    if max_payload == 0 or max_payload >= 20 * 1024:
        assert size >= 16 * 1024
    if max_payload > 1:
        assert size < max_payload
    if link_bps > 0 and size > 16 * 1024:
        assert size * 8 / link_bps <= keepalive_s / 8 * 1.001


def test_a_chunk_is_64_kib_where_nothing_is_known():
    """The default fits every broker's default limit but one."""
    assert chunk_size(link_bps=0, keepalive_s=60, max_payload=0) == 64 * 1024
    assert chunk_size(link_bps=1e5, keepalive_s=60, max_payload=0) == 93_750
    assert chunk_size(link_bps=0, keepalive_s=60, max_payload=20 * 1024) == 16 * 1024


@given(st.integers(0, 100).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, 99)))))
def test_a_bitmap_says_which(case):
    """Bit n of byte n // 8, lowest first; what is beyond the count is ignored."""
    count, indices = case[0], {index for index in case[1] if index < case[0]}

    bits = bitmap(indices, count)

    assert len(bits) == -(-count // 8)
    assert {n for n in range(count) if bits[n // 8] >> n % 8 & 1} == indices
    assert indices_in(bits, count) == indices_in(bits + b"\xff", count) == indices


@given(pace=st.floats(1e3, 1e6), size=st.integers(1, 20_000), chunk_bytes=st.integers(500, 65_536))
@settings(max_examples=30, deadline=None)
def test_a_paced_upload_keeps_its_pace_and_ends(pace: float, size: int, chunk_bytes: int) -> None:
    """Never are more bytes sent than the pace allows and a chunk more; and all of them are."""
    data = bytes(size)
    content = content_of(data, max(chunk_bytes, size // 1000 + 1))
    upload = Upload(content, data, timeout_s=TIMEOUT_S, pace_bytes_per_s=pace)
    incoming, now, sent = Incoming(content), 0.0, 0
    upload.open(now)
    ready = upload.on_ack(incoming.received, now)
    for _ in range(3 * content.chunks + 10):
        for index in ready:
            sent += len(upload.chunk(index)[1])
            incoming.add(index, *upload.chunk(index))
        assert sent <= pace * now * (1 + 1e-9) + content.chunk_bytes
        if incoming.is_complete:
            break
        ready = upload.on_ack(incoming.received, now) if ready else []
        if not ready and upload.wake_at is not None:
            now = max(now, upload.wake_at)
            ready = upload.on_pace(now)
    assert incoming.is_complete
    assert now == pytest.approx((content.chunks - 1) * content.chunk_bytes / pace)
