"""A bad link between an agent and a broker: a TCP proxy on loopback that can be made to fail.

What it does is real for both ends: small socket buffers, so that a slow link pushes back;
resets where it is cut; silence where it is a black hole. Fault tests and the demo use it.
"""

import asyncio
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Self, TypeVar

HOST = "127.0.0.1"

_BUFFER_BYTES = 16 * 1024
_SLICE_S = 0.01
"""A paced link forwards blocks of about this long, so that its pace is even."""

_CATCH_UP_S = 0.05
"""How much time a paced link may make up for when its sleeps were too long."""

_PUBACK = 0x40

Result = TypeVar("Result")


class LinkProxy:
    """A TCP proxy in a thread of its own: `with LinkProxy(1883, rate_bps=2e6) as link: link.port`.

    `rate_bps` limits each direction, over all connections together, in bits per second (0: no
    limit); `latency_s` delays each direction. Methods may be called from any thread, and have
    taken effect when they return.
    """

    def __init__(self, target_port: int, *, rate_bps: float = 0.0, latency_s: float = 0.0) -> None:
        self.port = 0
        self._target_port = target_port
        self._latency_s = latency_s
        self._up = _Pace(rate_bps)
        self._down = _Pace(rate_bps)
        self._pairs: dict[asyncio.Task[None], _Pair] = {}
        self._pubacks_until_loss = 0
        self._refuse_until = 0.0
        self._is_hole = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="link", daemon=True)

    def __enter__(self) -> Self:
        self._listener = _open_socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind((HOST, 0))
        self._listener.listen(128)
        self.port = self._listener.getsockname()[1]
        self._loop.add_reader(self._listener, self._accept)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._shut())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._listener.close()

    @property
    def connections(self) -> int:
        """How many connections are open now."""
        return len(self._pairs)

    @property
    def up_bytes(self) -> int:
        """Bytes that went on to the target."""
        return self._up.passed_bytes

    @property
    def down_bytes(self) -> int:
        """Bytes that came back from the target."""
        return self._down.passed_bytes

    def cut(self, for_s: float = 0.0) -> None:
        """Reset every connection, and each new one for `for_s` seconds."""
        self._call(self._cut(for_s))

    def blackhole(self, is_on: bool) -> None:
        """Swallow all bytes, both ways, without a word; connections stay open.

        When it ends, connections that lost bytes are reset: their streams make no sense now.
        """
        self._call(self._swallow(is_on))

    def lose_puback(self, nth: int = 1) -> None:
        """Lose the n-th acknowledgement (PUBACK) that comes back from now on; not over TLS."""
        self._call(self._doom_puback(nth))

    def _call(self, work: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10.0)

    async def _cut(self, for_s: float) -> None:
        self._refuse_until = self._loop.time() + for_s
        await self._reset(list(self._pairs))

    async def _swallow(self, is_on: bool) -> None:
        self._is_hole = is_on
        if not is_on:
            await self._reset([task for task, pair in self._pairs.items() if pair.has_lost])

    async def _doom_puback(self, nth: int) -> None:
        self._pubacks_until_loss = nth

    async def _shut(self) -> None:
        self._loop.remove_reader(self._listener)
        await self._reset(list(self._pairs))

    async def _reset(self, tasks: list[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _accept(self) -> None:
        try:
            near, _ = self._listener.accept()
        except OSError:
            return  # whoever came has gone again
        pair = _Pair(near, _open_socket())
        if self._loop.time() < self._refuse_until:
            pair.reset()
            return
        task = self._loop.create_task(self._join(pair))
        self._pairs[task] = pair
        task.add_done_callback(lambda task: self._pairs.pop(task).reset())

    async def _join(self, pair: "_Pair") -> None:
        near, far = pair.near, pair.far
        near.setblocking(False)
        try:
            await self._loop.sock_connect(far, (HOST, self._target_port))
            async with asyncio.TaskGroup() as group:
                group.create_task(self._carry(pair, near, far, self._up))
                group.create_task(self._carry(pair, far, near, self._down))
        except* OSError:
            pass  # one end is gone, and so the other end is reset
        while self._is_hole:  # not even that comes through
            pair.has_lost = True
            await asyncio.sleep(_SLICE_S)

    async def _carry(
        self, pair: "_Pair", source: socket.socket, sink: socket.socket, pace: "_Pace"
    ) -> None:
        blocks: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(maxsize=256)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._deliver(pair, blocks, sink, pace))
            while True:
                block = await self._loop.sock_recv(source, pace.block_bytes)
                await asyncio.sleep(pace.delay_s(len(block), self._loop.time()))
                await blocks.put((self._loop.time() + self._latency_s, block))
                if not block:
                    return

    async def _deliver(
        self,
        pair: "_Pair",
        blocks: asyncio.Queue[tuple[float, bytes]],
        sink: socket.socket,
        pace: "_Pace",
    ) -> None:
        while True:
            due, block = await blocks.get()
            await asyncio.sleep(due - self._loop.time())
            if self._is_hole:
                pair.has_lost = True
            elif block:
                kept = pair.packets.sift(block, self._is_doomed) if sink is pair.near else block
                pace.passed_bytes += len(kept)
                await self._loop.sock_sendall(sink, kept)
            else:
                sink.shutdown(socket.SHUT_WR)
            if not block:
                return

    def _is_doomed(self, kind: int) -> bool:
        """Whether this packet towards the client is the acknowledgement to lose."""
        if kind != _PUBACK or not self._pubacks_until_loss:
            return False
        self._pubacks_until_loss -= 1
        return self._pubacks_until_loss == 0


class _Pace:
    """One direction's token bucket, over all connections."""

    def __init__(self, rate_bps: float) -> None:
        self.passed_bytes = 0
        self.block_bytes = 64 * 1024
        if rate_bps:
            self.block_bytes = int(min(max(rate_bps / 8 * _SLICE_S, 512), self.block_bytes))
        self._rate_bps = rate_bps
        self._free_at = 0.0

    def delay_s(self, size_bytes: int, now: float) -> float:
        """How long these bytes keep the link busy, from now on."""
        if not self._rate_bps:
            return 0.0
        self._free_at = max(self._free_at, now - _CATCH_UP_S) + size_bytes * 8 / self._rate_bps
        return max(0.0, self._free_at - now)


class _Pair:
    """The two sockets of one connection, and what is known of its streams."""

    def __init__(self, near: socket.socket, far: socket.socket) -> None:
        self.near = near
        self.far = far
        self.has_lost = False
        self.packets = _Packets()

    def reset(self) -> None:
        """Close both ends at once: a lingering time of zero makes TCP say RST."""
        for end in (self.near, self.far):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            end.close()


class _Packets:
    """Cuts a stream of bytes into MQTT packets, just enough to leave one out."""

    def __init__(self) -> None:
        self._head = bytearray()
        self._left = 0
        self._drops = False

    def sift(self, block: bytes, is_doomed: Callable[[int], bool]) -> bytes:
        """The bytes of a block that belong to packets that are not doomed."""
        kept = bytearray()
        at = 0
        while at < len(block):
            if self._left:
                body = block[at : at + self._left]
                self._left -= len(body)
                at += len(body)
                kept += b"" if self._drops else body
                continue
            self._head.append(block[at])
            at += 1
            if len(self._head) >= 2 and self._head[-1] < 0x80:
                lengths = enumerate(self._head[1:])
                self._left = sum((byte & 0x7F) << 7 * place for place, byte in lengths)
                self._drops = is_doomed(self._head[0] & 0xF0)
                kept += b"" if self._drops else self._head
                self._head.clear()
        return bytes(kept)


def _open_socket() -> socket.socket:
    opened = socket.socket()
    opened.setblocking(False)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return opened
