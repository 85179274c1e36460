import copy
import random
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloud.coordination.rounds import Status
from cloud.record.registry import Registry
from cloud.record.store import Store
from federation.protocol.messages import State, Verdict
from tests.histories import REPORT, UPDATE, History, emptied, plan_of


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


WEIGHTS = {
    "commit": 4,
    "crash": 2,
    "come_or_go": 2,
    "open_run": 9,
    "end_run": 1,
    "open_round": 6,
    "close_round": 2,
    "abandon": 1,
    "mark": 3,
    "chunks": 6,
    "accept": 6,
    "refuse": 1,
    "refuse_again": 1,
    "release": 2,
}
"""How often each step is taken, where it can be; made so that all of them often can."""

DEVICES = ["d1", "d2", "d3"]
REFUSALS: list[Verdict] = ["rejected", "too-late"]


class Walk:
    """A random legal history in batches of any length, with crashes between any two facts.

    What a crash loses is what was not committed: `kept` is the memory as of the last commit.
    """

    def __init__(self, url: str, registry: Registry, rng: random.Random) -> None:
        self.url, self.registry, self.rng = url, registry, rng
        self.store = Store(url)
        self.history = History()
        self.kept = copy.deepcopy(self.history.memory)
        self.taken: Counter[str] = Counter()

    def step(self) -> None:
        able = [name for name in WEIGHTS if self.can(name)]
        (name,) = self.rng.choices(able, [WEIGHTS[name] for name in able])
        getattr(self, name)()
        self.taken[name] += 1

    def can(self, name: str) -> bool:
        run = self.history.memory.run
        match name:
            case "open_run":
                return run is None
            case "end_run" | "release":
                return run is not None and not run.is_open and run.round > 1
            case "open_round":
                return run is not None and not run.is_open
            case "close_round" | "mark":
                return run is not None and run.is_open
            case "abandon":
                return run is not None
            case "chunks" | "refuse":
                return bool(self.open_attempts())
            case "accept":
                return bool(self.complete())
            case "refuse_again":
                return run is not None and bool(run.settled)
            case _:
                return True

    def commit(self) -> None:
        times = self.rng.choice([1, 1, 2])  # twice: a fact that comes again has no effect
        facts = [fact for fact in self.history.noted for _ in range(times)]
        self.store.record(facts, self.registry)
        self.history.noted = []
        self.kept = copy.deepcopy(self.history.memory)

    def crash(self) -> None:
        self.store.close()
        self.store = Store(self.url)
        restored = self.store.restore(self.registry)
        assert restored == self.kept
        self.history.memory, self.history.noted = restored, []

    def come_or_go(self) -> None:
        device = self.rng.choice(DEVICES)
        if device in self.history.memory.devices and self.rng.random() < 0.6:
            self.history.present(device, self.rng.choice(get_args(State)))
        else:
            self.history.born(device, self.rng.randint(1, 9))

    def open_run(self) -> None:
        # The request is no fact of the hub's: another process makes it, in its own time.
        plan = plan_of(f"run-{self.taken['open_run']}", self.rng.choice(["drop", "keep"]))
        self.store.request_run(plan)
        self.history.open_run(plan, b"initial")

    def end_run(self) -> None:
        self.history.end_run(self.rng.choice(["finished", "failed", "stopped"]))

    def open_round(self) -> None:
        devices = self.rng.sample(DEVICES, self.rng.randint(1, 3))
        self.history.open_round(sorted(devices), {"d9": "it left"})

    def close_round(self) -> None:
        self.history.close_round(self.rng.randbytes(3), self.rng.randint(0, 9), 2**40)

    def abandon(self) -> None:
        self.history.abandon()

    def mark(self) -> None:
        attempt = self.rng.choice(sorted(self.history.run.attempts))
        status = self.rng.choice([s for s in get_args(Status) if s != "received"])
        self.history.mark(attempt, status, self.rng.choice(["because", ""]))

    def chunks(self) -> None:
        attempt = self.rng.choice(self.open_attempts())
        data = self.rng.choice([b"a" * 2500, b"a" * 2500, b"b" * 2500])
        for index in self.rng.choice([(0, 1, 2), (0, 1, 2), (0, 1), (2,)]):
            self.history.chunk(attempt, data, index, REPORT)

    def accept(self) -> None:
        self.history.accept(self.rng.choice(self.complete()))

    def refuse(self) -> None:
        self.history.refuse(self.rng.choice(self.open_attempts()), self.rng.choice(REFUSALS))

    def refuse_again(self) -> None:
        settled = self.history.run.settled
        attempt = self.rng.choice(sorted(settled))
        first = settled[attempt]
        self.history.refuse(attempt, self.rng.choice(REFUSALS))
        settled[attempt] = first

    def release(self) -> None:
        self.history.release(self.rng.randbytes(2))

    def open_attempts(self) -> list[str]:
        """The attempts whose updates may still come: of the open round, and late ones."""
        run = self.history.memory.run
        if run is None:
            return []
        mine = {*(run.attempts if run.is_open else ()), *self.history.memory.uploads}
        return sorted(mine - set(run.settled))

    def complete(self) -> list[str]:
        uploads = self.history.memory.uploads
        mine = [attempt for attempt in self.open_attempts() if attempt in uploads]
        return [a for a in mine if len(uploads[a].parts) == uploads[a].content.chunks]


@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(seed=st.integers(0, 2**32))
def test_any_history_survives_any_crash(database_url: str, registry: Registry, seed: int) -> None:
    """After any legal facts and a crash anywhere, the memory is that of what was recorded."""
    walk = Walk(emptied(database_url), registry, random.Random(seed))

    for _ in range(150):
        walk.step()
    walk.commit()
    walk.crash()

    walk.store.close()
    assert min(walk.taken[name] for name in ("crash", "commit", "chunks", "mark")) > 0


def test_what_was_committed_survives_sigkill(
    database_url: str, registry: Registry, tmp_path: Path
) -> None:
    """A hub killed in the midst of writing loses no batch it was told is safe, nor half of one."""
    program = textwrap.dedent("""
        import sys
        from pathlib import Path
        from cloud.record.registry import Registry
        from cloud.record.store import Store
        from tests.histories import commit, send, with_open_round
        store, registry = Store(sys.argv[1]), Registry(Path(sys.argv[2]))
        history = with_open_round(store, devices=tuple(f"d{n}" for n in range(100)))
        commit(store, history, registry)
        for n in range(100):
            send(history, f"demo_1_d{n}")
            history.accept(f"demo_1_d{n}")
            commit(store, history, registry)
            print(n, flush=True)
    """)
    for until in (0, 23):
        order = [sys.executable, "-c", program, emptied(database_url), str(tmp_path / "registry")]
        with subprocess.Popen(order, stdout=subprocess.PIPE) as hub:
            assert hub.stdout is not None
            while (line := hub.stdout.readline()) and int(line) < until:
                pass
            hub.send_signal(signal.SIGKILL)
        store = Store(database_url)

        memory = store.restore(registry)

        assert memory.run is not None
        assert len(memory.run.accepted) > until
        assert all(kept.data == UPDATE for kept in memory.run.accepted)
        assert memory.uploads == {}
        received = [a for a in memory.run.attempts.values() if a.status == "received"]
        assert len(received) == len(memory.run.settled) == len(memory.run.accepted)
        store.close()
