"""Between an HTTP request and the engine: submit, wait, and let go when the client hangs up."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

from fastapi import Request

from moe_serving.hosting import Host, Hosted
from moe_serving.requests import Ending, Generated, RefusedError, Ticket, Work
from moe_serving.serving.metrics import Metrics

CLIENT_LETTERS = 64


class Desk:
    """Where requests of HTTP are handed over; `client_header` is as the configuration says."""

    def __init__(self, host: Host, metrics: Metrics, client_header: str) -> None:
        self.host = host
        self.metrics = metrics
        self._client_header = client_header

    def find(self, name: str, version: int | None = None) -> Hosted:
        """Who serves under this name.

        Raises:
            RefusedError: `unknown`, `loading` or `draining`; it is counted.
        """
        try:
            return self.host.find(name, version)
        except RefusedError as error:
            self.metrics.on_ended("", 0, error.outcome)
            raise

    async def answer(
        self, request: Request, hosted: Hosted, work: Work, deadline_s: float | None
    ) -> tuple[Hosted, Ending]:
        """Submit and wait for the end; a client that hangs up is nobody's any more.

        Raises:
            RefusedError: It was not accepted, or did not end well.
        """
        events = _Events()
        hosted, ticket = self._submit(request, hosted, work, events, deadline_s)
        gone = asyncio.ensure_future(_until_gone(request))
        ended = asyncio.ensure_future(events.ending())
        try:
            await asyncio.wait({gone, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():
                hosted.engine.cancel(ticket)
            return hosted, _sound(await ended)
        finally:
            gone.cancel()
            ended.cancel()
            if ticket.ending is None:
                hosted.engine.cancel(ticket)

    async def stream(
        self, request: Request, hosted: Hosted, work: Work, deadline_s: float | None
    ) -> tuple[Hosted, AsyncIterator[Generated | Ending]]:
        """Submit and wait for the first part; then parts as they come, and the ending.

        Raises:
            RefusedError: It was not accepted, or ended badly before its first part.
        """
        events = _Events()
        hosted, ticket = self._submit(request, hosted, work, events, deadline_s)
        try:
            first = await events.next()
        except asyncio.CancelledError:
            hosted.engine.cancel(ticket)
            raise
        if isinstance(first, Ending):
            _sound(first)
        return hosted, _parts(first, events, lambda: hosted.engine.cancel(ticket))

    def _submit(
        self,
        request: Request,
        hosted: Hosted,
        work: Work,
        events: "_Events",
        deadline_s: float | None,
    ) -> tuple[Hosted, Ticket]:
        try:
            return self.host.submit(
                hosted, self._client(request), work, events.hear, deadline_s=deadline_s
            )
        except RefusedError as error:
            self.metrics.on_ended(hosted.name, hosted.version, error.outcome)
            raise

    def _client(self, request: Request) -> str:
        named = request.headers.get(self._client_header) if self._client_header else None
        address = request.client.host if request.client is not None else ""
        return (named or address)[:CLIENT_LETTERS]


class _Events:
    """What comes of one request, carried from the engine's thread to this loop.

    It holds at most what the answer has tokens: the longest answer bounds it.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Generated | Ending] = asyncio.Queue()

    def hear(self, event: Generated | Ending) -> None:
        with suppress(RuntimeError):  # the loop has ended: so have its clients
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    async def next(self) -> Generated | Ending:
        return await self._queue.get()

    async def ending(self) -> Ending:
        while not isinstance(event := await self._queue.get(), Ending):
            pass
        return event


async def _parts(
    first: Generated | Ending, events: _Events, let_go: Callable[[], None]
) -> AsyncIterator[Generated | Ending]:
    event = first
    try:
        yield event
        while not isinstance(event, Ending):
            event = await events.next()
            yield event
    finally:
        if not isinstance(event, Ending):
            let_go()


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _sound(ending: Ending) -> Ending:
    if ending.outcome != "ok":
        raise RefusedError(ending.outcome, ending.reason, retry_after_s=ending.retry_after_s)
    return ending
