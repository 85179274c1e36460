import socket
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulations.link import HOST, LinkProxy, _Packets

PUBACK = b"\x40\x02\x00\x01"
PUBLISH = b"\x30\x82\x01" + bytes(130)
PING = b"\xd0\x00"


def fill(size: int) -> bytes:
    """One MQTT packet of exactly this size, with a body that shows a lost or swapped byte."""
    body = size - 5
    length = bytes([body & 127 | 128, body >> 7 & 127 | 128, body >> 14 & 127 | 128, body >> 21])
    return b"\x30" + length + (bytes(range(251)) * (body // 251 + 1))[:body]


@pytest.fixture
def echo_port() -> Iterator[int]:
    """A server that sends back whatever it gets."""
    server = socket.create_server((HOST, 0))

    def answer(near: socket.socket) -> None:
        with near:
            try:
                while block := near.recv(65536):
                    near.sendall(block)
            except OSError:
                pass

    def accept() -> None:
        try:
            while True:
                threading.Thread(target=answer, args=[server.accept()[0]], daemon=True).start()
        except OSError:
            pass

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    yield server.getsockname()[1]
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join()


def connect(link: LinkProxy) -> socket.socket:
    return socket.create_connection((HOST, link.port), timeout=5.0)


def read_exactly(sock: socket.socket, size: int) -> bytes:
    block = b""
    while len(block) < size:
        more = sock.recv(size - len(block))
        if not more:
            raise ConnectionResetError
        block += more
    return block


def test_bytes_pass_unchanged(echo_port: int) -> None:
    """Without a fault, both directions carry every byte in order."""
    sent = fill(1_000_000)

    with LinkProxy(echo_port) as link, connect(link) as sock:
        writer = threading.Thread(target=sock.sendall, args=[sent])
        writer.start()
        received = read_exactly(sock, len(sent))
        writer.join()

        assert received == sent
        assert link.up_bytes == link.down_bytes == len(sent)


@pytest.mark.parametrize("rate_bps", [500e3, 8e6])
def test_rate_is_held(echo_port: int, rate_bps: float) -> None:
    """A paced link takes the time its rate says, within 15 %, and pushes back."""
    sent = fill(int(rate_bps / 8 * 1.5))

    with LinkProxy(echo_port, rate_bps=rate_bps) as link, connect(link) as sock:
        began = time.monotonic()
        writer = threading.Thread(target=sock.sendall, args=[sent])
        writer.start()
        read_exactly(sock, len(sent))
        took_s = time.monotonic() - began
        writer.join()

    assert took_s == pytest.approx(1.5, rel=0.15)


def test_latency_delays_but_does_not_slow(echo_port: int) -> None:
    """Latency is paid once per direction, however many bytes follow each other."""
    sent = fill(1_000_000)

    with LinkProxy(echo_port, latency_s=0.1) as link, connect(link) as sock:
        began = time.monotonic()
        writer = threading.Thread(target=sock.sendall, args=[sent])
        writer.start()
        read_exactly(sock, 1)
        first_s = time.monotonic() - began
        read_exactly(sock, len(sent) - 1)
        all_s = time.monotonic() - began
        writer.join()

    assert first_s >= 0.2
    assert all_s < 1.5


def test_cut_resets_and_refuses(echo_port: int) -> None:
    """A cut ends every connection at once and each new one until its time is over."""
    with LinkProxy(echo_port) as link, connect(link) as sock:
        sock.sendall(PING)
        read_exactly(sock, 2)

        link.cut(for_s=0.3)
        cut_at = time.monotonic()
        with pytest.raises(ConnectionResetError):
            read_exactly(sock, 1)

        assert link.connections == 0
        while True:
            try:
                with connect(link) as again:
                    again.sendall(PING)
                    assert read_exactly(again, 2) == PING
                break
            except OSError:
                assert time.monotonic() - cut_at < 5.0
        assert time.monotonic() - cut_at >= 0.25


def test_blackhole_is_silent_then_resets(echo_port: int) -> None:
    """A black hole answers nothing and closes nothing; what lost bytes is reset afterwards."""
    with LinkProxy(echo_port) as link, connect(link) as sock:
        link.blackhole(True)
        sock.sendall(b"lost")
        sock.settimeout(0.3)
        with pytest.raises(TimeoutError):
            sock.recv(1)
        assert link.up_bytes == 0

        link.blackhole(False)

        sock.settimeout(5.0)
        with pytest.raises(ConnectionResetError):
            read_exactly(sock, 1)


def test_nth_puback_is_lost(echo_port: int) -> None:
    """Only the n-th PUBACK after the call is missing from the stream."""
    sent = PUBACK + PUBLISH + PUBACK + PUBACK + PUBLISH

    with LinkProxy(echo_port) as link, connect(link) as sock:
        link.lose_puback(2)
        sock.sendall(sent)

        assert read_exactly(sock, len(sent) - len(PUBACK)) == PUBACK + PUBLISH + PUBACK + PUBLISH


@given(
    st.lists(st.sampled_from([PUBACK, PUBLISH, PING]), max_size=20),
    st.lists(st.integers(1, 150), min_size=1),
)
def test_packets_survive_any_cutting(packets: list[bytes], sizes: list[int]) -> None:
    """However a stream is cut into blocks, exactly the doomed packets are left out."""
    stream, sifter, kept, turn = b"".join(packets), _Packets(), b"", 0
    while stream:
        size = sizes[turn % len(sizes)]
        kept += sifter.sift(stream[:size], lambda kind: kind == 0x40)
        stream, turn = stream[size:], turn + 1

    assert kept == b"".join(packet for packet in packets if packet != PUBACK)
