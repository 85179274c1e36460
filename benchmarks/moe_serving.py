"""Serving under load: tokens a second beside plain `generate`, and what overload and ends cost."""

import asyncio
import functools
import json
import os
import re
import signal
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from benchmarks.claims import Claim, Options, claim, main
from benchmarks.completions_load import Answered, Target, closed_loop, open_loop
from benchmarks.fleet import running
from benchmarks.processes import cpu_s, memory, wait_until
from simulations.processes import Process, free_port

CLIENTS, PEER_CLIENTS = 200, 4
DEADLINE_S, TARGET_WAIT_S, GRACE_S = 20.0, 4.0, 90.0
LONGEST_S = 90.0
"""The server's longest deadline: what is asked where nothing but an answer counts."""

SLOTS, ROWS = 64, 256
VOCABULARY, LENGTH = 259, 256
START_S = 120.0
SPEED_UP = 3.0
FLAT_MB = 16.0
PEER = "transformers generate behind FastAPI"

Result = TypeVar("Result")


@dataclass(slots=True)
class Measured:
    """What one server did in all its turns of one load."""

    tokens: int = 0
    seconds: float = 0.0
    cpu_s: float = 0.0
    requests: int = 0
    statuses: Counter[int] = field(default_factory=Counter)

    def add(self, answers: list[Answered], seconds: float, cpu: float) -> None:
        """One more turn."""
        self.tokens += sum(each.tokens for each in answers)
        self.requests += sum(each.status == 200 for each in answers)
        self.seconds += seconds
        self.cpu_s += cpu
        self.statuses.update(each.status for each in answers)


def measure(options: Options) -> list[Claim]:
    """200 clients with mixed lengths: throughput, overload, a version's takeover, and a drain."""
    checkpoint = options.folder / "mixtral"
    options.tell("making a Mixtral-like checkpoint with transformers")
    _make_checkpoint(checkpoint)
    repository = options.folder / "repository"
    publish_again = _publisher(checkpoint, repository)
    publish_again()
    # In CPU seconds of the server: on a busy machine a turn then takes longer, and is as good.
    turn_s = 4.0 if options.is_quick else 12.0
    turns = 1 if options.is_quick else 3
    with _servers(options.folder, checkpoint, repository) as (ours, process, theirs, peer):
        claims, capacity = _compare(options, (ours, process, theirs, peer), turns, turn_s)
        claims += _overload(options, ours, process, capacity, turn_s)
        claims += _take_over(options, ours, turn_s, publish_again)
        claims += _drain(options, ours, process)
    return claims


def _make_checkpoint(folder: Path) -> None:
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=LENGTH,
        sliding_window=None,
    )
    MixtralForCausalLM(config).save_pretrained(folder)


def _publisher(checkpoint: Path, repository: Path) -> Callable[[], object]:
    """Publishes the same weights as the next version each time it is called."""
    from moe_serving.checkpoint import save
    from moe_serving.models.huggingface import load_huggingface
    from moe_serving.repository import About, publish

    made = checkpoint.with_name("ours")
    save(load_huggingface(checkpoint), made)
    return lambda: publish(repository, "mixtral", made, About(kind="lm", tokenizer="numbers"))


@contextmanager
def _servers(
    folder: Path, checkpoint: Path, repository: Path
) -> Iterator[tuple[Target, Process, Target, Process]]:
    """Both, ready, each a process with one thread for mathematics."""
    port, other = free_port(), free_port()
    settings = folder / "moe.toml"
    settings.write_text(
        f"repository = '{repository}'\ngrace_s = {GRACE_S}\npoll_s = 0.5\nthreads = 1\n"
        f"[http]\nport = {port}\nclient_header = 'x-client'\n"
        f"[models.mixtral]\nslots = {SLOTS}\nrows = {ROWS}\nlength = {LENGTH}\n"
        f"target_wait_s = {TARGET_WAIT_S}\ndeadline_s = {LONGEST_S}\n"
    )
    serve = [sys.executable, "-m", "moe_serving", "serve", str(settings)]
    plain = [sys.executable, "-m", "benchmarks.plain_generate", str(checkpoint), str(other)]
    ours = Process(serve, folder / "moe.log")
    theirs = Process(plain, folder / "plain.log")
    targets = (Target(f"http://127.0.0.1:{port}", "mixtral"),
               Target(f"http://127.0.0.1:{other}", "mixtral"))  # fmt: skip
    with running([ours, theirs]):
        for target in targets:
            is_ready = functools.partial(_is_ready, target)
            wait_until(is_ready, "start of a server", patience_s=START_S)
        yield targets[0], ours, targets[1], theirs


def _is_ready(target: Target) -> bool:
    try:
        with urllib.request.urlopen(f"{target.url}/health", timeout=2) as answer:
            return bool(json.load(answer)["ready"])
    except OSError:
        return False


def _compare(
    options: Options, servers: tuple[Target, Process, Target, Process], turns: int, turn_s: float
) -> tuple[list[Claim], float]:
    """Both in turn, full of clients; the claims, and our requests a second."""
    ours, process, theirs, peer = servers
    found = {"ours": Measured(), "theirs": Measured()}
    loads = [("ours", ours, process, CLIENTS), ("theirs", theirs, peer, PEER_CLIENTS)]
    _closed(ours, CLIENTS, _spent(process, turn_s / 5))
    for turn in range(turns):
        for name, target, which, clients in loads:
            options.tell(f"throughput, turn {turn + 1} of {turns}: {name}, {clients} clients")
            begun, cpu = time.monotonic(), cpu_s([which.pid])
            answers = _closed(target, clients, _spent(which, turn_s))
            found[name].add(answers, time.monotonic() - begun, cpu_s([which.pid]) - cpu)
    mine, other = found["ours"], found["theirs"]
    options.tell(f"ours: {dict(mine.statuses)}, {mine.tokens / mine.seconds:.0f} tokens/s; "
                 f"plain: {other.tokens / other.seconds:.0f} tokens/s")  # fmt: skip
    claims = []
    for name, cost, theirs_cost, unit in (
        ("wall time", mine.seconds / mine.tokens, other.seconds / other.tokens, "ms"),
        ("CPU", mine.cpu_s / mine.tokens, other.cpu_s / other.tokens, "CPU ms"),
    ):
        text = f"a token of an answer, {CLIENTS} clients: {name}"
        goal = 1e3 * theirs_cost / SPEED_UP
        claims.append(
            claim(text, 1e3 * cost, unit, peer=PEER, peer_value=1e3 * theirs_cost, goal=goal)
        )
    return claims, mine.requests / mine.seconds


def _closed(target: Target, clients: int, is_over: Callable[[], bool]) -> list[Answered]:
    return _run(lambda: closed_loop(target, clients, VOCABULARY, is_over=is_over))


def _spent(process: Process, seconds: float) -> Callable[[], bool]:
    """Whether a process has spent so many CPU seconds from now on."""
    until = cpu_s([process.pid]) + seconds
    return lambda: cpu_s([process.pid]) >= until


def _run(make: Callable[[], Awaitable[Result]]) -> Result:
    async def run() -> Result:
        return await make()

    return asyncio.run(run())


def _overload(
    options: Options, target: Target, process: Process, capacity: float, turn_s: float
) -> list[Claim]:
    """Twice what it can do: all end once, those let in within the deadline, in steady memory."""
    options.tell(f"overload: {2 * capacity:.0f} requests/s, twice what it does")
    sizes, is_over = [], threading.Event()

    def watch() -> None:
        while not is_over.wait(0.25):
            sizes.append(memory([process.pid]).uss_mb)

    watching = threading.Thread(target=watch)
    watching.start()
    before = _counted(target)
    hurried = replace(target, deadline_s=DEADLINE_S)
    answers = _run(lambda: open_loop(hurried, CLIENTS, 2 * capacity, 2 * turn_s, VOCABULARY))
    is_over.set()
    watching.join()
    wait_until(lambda: _counted(target) - before >= len(answers), "counts", patience_s=10.0)
    admitted = [each.seconds for each in answers if each.status == 200]
    statuses = Counter(each.status for each in answers)
    options.tell(f"overload: {dict(statuses)}")
    odd = sum(n for status, n in statuses.items() if status not in {200, 429, 503, 504})
    miscounted = abs(_counted(target) - before - len(answers))
    third = len(sizes) // 3
    growth = max(sizes[-third:]) - max(sizes[third : 2 * third]) if third else 0.0
    return [
        claim("twice the load: requests without one clear status", odd + miscounted, "", goal=0),
        claim("twice the load: p99 of those let in", np.quantile(admitted, 0.99), "s",
              goal=DEADLINE_S),
        claim("twice the load: refused at once or expired",
              100 * (1 - len(admitted) / len(answers)), "%"),
        claim("twice the load: growth of memory, middle to last third", max(0.0, growth), "MiB",
              goal=FLAT_MB),
    ]  # fmt: skip


def _counted(target: Target) -> int:
    """All requests that have ended, as the server counts them."""
    with urllib.request.urlopen(f"{target.url}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    pattern = r"^headwater_moe_requests_total\{.*\} (\S+)$"
    return round(sum(float(value) for value in re.findall(pattern, text, re.M)))


def _take_over(
    options: Options, target: Target, turn_s: float, publish_again: Callable[[], object]
) -> list[Claim]:
    """A newer version is published while clients ask; nobody may notice."""
    options.tell("a newer version takes over under load")
    is_new = threading.Event()

    def swap() -> None:
        time.sleep(turn_s / 4)
        publish_again()
        deadline = time.monotonic() + START_S
        while _serving(target) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        is_new.set()

    swapping = threading.Thread(target=swap)
    swapping.start()
    answers = _closed(target, CLIENTS, is_new.is_set)
    swapping.join()
    options.tell(f"takeover: {dict(Counter(each.status for each in answers))}")
    bad = [each.status for each in answers if each.status not in {200, 429, 503}]
    if _serving(target) < 2:
        bad.append(0)
    return [claim("a version takes over under load: errors", len(bad), "", goal=0)]


def _serving(target: Target) -> int:
    with urllib.request.urlopen(f"{target.url}/health", timeout=10) as answer:
        return int(json.load(answer)["models"].get("mixtral", 0))


def _drain(options: Options, target: Target, process: Process) -> list[Claim]:
    """SIGTERM amid the load: whoever was let in is answered, and the process says it lost none."""
    options.tell("drain under load")
    is_told = threading.Event()

    def tell() -> None:
        time.sleep(2.0)
        is_told.set()
        os.kill(process.pid, signal.SIGTERM)

    telling = threading.Thread(target=tell)
    telling.start()
    answers = _closed(target, CLIENTS, is_told.is_set)
    telling.join()
    # Not told twice: a signal that meets an ending interpreter would kill it.
    wait_until(lambda: not process.is_running, "end of the server", patience_s=GRACE_S + 60.0)
    code = process.stop()
    statuses = Counter(each.status for each in answers)
    options.tell(f"drain: {dict(statuses)}, exit code {code}")
    lost = sum(n for status, n in statuses.items() if status not in {200, 429, 503, 504})
    return [claim("drain under load: requests without an answer", lost + (code != 0), "", goal=0)]


if __name__ == "__main__":
    main("moe_serving", measure)
