"""Clients of completions, many at once: closed loops that wait, and an open one that does not."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import cycle
from urllib.parse import urlsplit

import numpy as np

PATIENCE_S = 120.0


@dataclass(frozen=True, slots=True)
class Answered:
    """One request's end as its client saw it; status 0: the connection was lost or refused."""

    status: int
    seconds: float
    tokens: int = 0
    retry_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Target:
    """A server of completions, the model to ask there, and until when to wait for each answer."""

    url: str
    model: str
    deadline_s: float | None = None


def bodies(target: Target, seed: int, vocabulary: int) -> Iterator[bytes]:
    """Requests of mixed lengths without end: 16 to 128 tokens read, 8 to 64 made."""
    rng = np.random.default_rng(seed)
    while True:
        prompt = rng.integers(0, vocabulary, rng.integers(16, 129)).tolist()
        made = int(rng.integers(8, 65))
        body = {"model": target.model, "prompt": prompt, "max_tokens": made, "temperature": 0.0}
        yield json.dumps(body | {"deadline_s": target.deadline_s}).encode()


async def complete(target: Target, body: bytes, client: str) -> Answered:
    """Post one request on a connection of its own."""
    begun = time.monotonic()
    try:
        async with asyncio.timeout(PATIENCE_S), _connected(target.url) as (reader, writer):
            head = (
                "POST /v1/completions HTTP/1.1\r\nHost: benchmark\r\nConnection: close\r\n"
                f"X-Client: {client}\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n"
            )
            writer.write(head.encode() + body)
            answer = await reader.read(-1)
    except (OSError, TimeoutError):
        return Answered(0, time.monotonic() - begun)
    return _read(answer, time.monotonic() - begun)


@asynccontextmanager
async def _connected(url: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        yield reader, writer
    finally:
        writer.close()


def _read(answer: bytes, seconds: float) -> Answered:
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    words = lines[0].split()
    status = int(words[1]) if len(words) > 1 else 0
    headers = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
    tokens = json.loads(body)["usage"]["completion_tokens"] if status == 200 else 0
    return Answered(status, seconds, tokens, float(headers.get("retry-after", 0.0)))


async def closed_loop(
    target: Target, clients: int, vocabulary: int, *, is_over: Callable[[], bool]
) -> list[Answered]:
    """Each client asks again when it was answered, after Retry-After where it was refused.

    When `is_over` nobody asks again; who asked by then is waited for.
    """
    answers: list[Answered] = []
    end = asyncio.Event()

    async def go_on(number: int) -> None:
        for body in bodies(target, number, vocabulary):
            answered = await complete(target, body, f"c{number}")
            answers.append(answered)
            with suppress(TimeoutError):
                await asyncio.wait_for(end.wait(), answered.retry_s)
            if end.is_set():
                return

    async def watch() -> None:
        while not is_over():
            await asyncio.sleep(0.1)
        end.set()

    await asyncio.gather(watch(), *(go_on(number) for number in range(clients)))
    return answers


async def open_loop(
    target: Target, clients: int, per_s: float, seconds: float, vocabulary: int
) -> list[Answered]:
    """Requests come at this rate whatever becomes of them, from these clients in turn."""
    made = bodies(target, 0, vocabulary)
    names = cycle(f"c{number}" for number in range(clients))
    begun, tasks = time.monotonic(), []
    for n in range(int(per_s * seconds)):
        await asyncio.sleep(max(0.0, begun + n / per_s - time.monotonic()))
        tasks.append(asyncio.create_task(complete(target, next(made), next(names))))
    return await asyncio.gather(*tasks)
