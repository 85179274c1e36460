import copy
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, cast, get_args

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    precondition,
    rule,
    run_state_machine_as_test,
)

from cloud.registry import Registry
from cloud.rounds import Status
from cloud.store import Store
from tests.histories import REPORT, UPDATE, History, emptied, plan_of

pytest_plugins = ["tests.databases"]


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


class Crashes(RuleBasedStateMachine):
    """Legal histories in batches of any length, with crashes that lose what is not recorded."""

    def __init__(self, url: str, registry: Registry) -> None:
        super().__init__()
        self.url, self.registry = url, registry
        self.store = Store(url)
        self.history = History()
        self.kept = copy.deepcopy(self.history.memory)
        self.runs = 0

    def teardown(self) -> None:
        self.commit(doubled=False)
        assert self.store.restore(self.registry) == self.kept
        self.store.close()

    @rule(doubled=st.booleans())
    def commit(self, doubled: bool) -> None:
        facts = self.history.noted
        self.store.record([x for x in facts for _ in range(2 if doubled else 1)], self.registry)
        self.history.noted = []
        self.kept = copy.deepcopy(self.history.memory)

    @rule()
    def crash(self) -> None:
        self.store.close()
        self.store = Store(self.url)
        restored = self.store.restore(self.registry)
        assert restored == self.kept
        self.history.memory, self.history.noted = restored, []

    @rule(device=st.sampled_from(["d1", "d2", "d3"]), epoch=st.integers(1, 9))
    def born(self, device: str, epoch: int) -> None:
        self.history.born(device, epoch)

    @precondition(lambda self: self.history.memory.devices)
    @rule(data=st.data(), state=st.sampled_from(["ready", "draining", "disconnected", "lost"]))
    def present(self, data: st.DataObject, state: str) -> None:
        device = data.draw(st.sampled_from(sorted(self.history.memory.devices)))
        self.history.present(device, state)

    @precondition(lambda self: self.history.memory.run is None)
    @rule(late=st.sampled_from(["drop", "keep"]))
    def open_run(self, late: str) -> None:
        self.runs += 1
        plan = plan_of(f"run-{self.runs}", late)
        self.store.request_run(plan)
        self.history.open_run(plan, b"initial")

    @precondition(lambda self: self.has_round(is_open=False))
    @rule(devices=st.sets(st.sampled_from(["d1", "d2", "d3"]), min_size=1))
    def open_round(self, devices: set[str]) -> None:
        self.history.open_round(sorted(devices), {"d9": "it left"})

    @precondition(lambda self: self.has_round(is_open=True))
    @rule(data=st.data(), status=st.sampled_from(get_args(Status)))
    def mark(self, data: st.DataObject, status: Status) -> None:
        attempt = data.draw(st.sampled_from(sorted(self.history.run.attempts)))
        if status != "received":
            self.history.mark(attempt, status, "because")

    @precondition(lambda self: self.open_attempts())
    @rule(data=st.data(), content=st.binary(min_size=1, max_size=1).map(lambda b: b * 2500))
    def chunks(self, data: st.DataObject, content: bytes) -> None:
        attempt = data.draw(st.sampled_from(self.open_attempts()))
        for index in data.draw(st.sets(st.integers(0, 2), min_size=1)):
            self.history.chunk(attempt, content, index, REPORT)

    @precondition(lambda self: self.complete())
    @rule(data=st.data())
    def accept(self, data: st.DataObject) -> None:
        self.history.accept(data.draw(st.sampled_from(self.complete())))

    @precondition(lambda self: self.open_attempts())
    @rule(data=st.data(), verdict=st.sampled_from(["rejected", "too-late"]))
    def refuse(self, data: st.DataObject, verdict: Any) -> None:
        self.history.refuse(data.draw(st.sampled_from(self.open_attempts())), verdict)

    @precondition(lambda self: self.has_round(is_open=True))
    @rule(model=st.binary(max_size=8))
    def close_round(self, model: bytes) -> None:
        self.history.close_round(model, self.history.run.bytes_up + 3, 2**40)

    @precondition(lambda self: self.history.memory.run is not None)
    @rule()
    def abandon(self) -> None:
        self.history.abandon()

    @precondition(lambda self: self.has_round(is_open=False) and self.history.run.round > 0)
    @rule(onnx=st.binary(max_size=4))
    def release(self, onnx: bytes) -> None:
        if self.history.run.plan.name not in self.history.memory.releases:
            self.history.release(onnx)

    @precondition(lambda self: self.history.memory.run is not None)
    @rule(status=st.sampled_from(["finished", "failed", "stopped"]))
    def end_run(self, status: Any) -> None:
        self.history.end_run(status)

    def has_round(self, *, is_open: bool) -> bool:
        run = self.history.memory.run
        return run is not None and run.is_open == is_open

    def open_attempts(self) -> list[str]:
        """The attempts whose updates may still come: of the open round, and late ones."""
        run = self.history.memory.run
        if run is None:
            return []
        mine = {*(run.attempts if run.is_open else ()), *self.history.memory.uploads}
        return sorted(mine - set(run.settled))

    def complete(self) -> list[str]:
        uploads = self.history.memory.uploads
        mine = [a for a in self.open_attempts() if a in uploads]
        return [a for a in mine if len(uploads[a].parts) == uploads[a].content.chunks]


def test_any_history_survives_any_crash(database_url: str, registry: Registry) -> None:
    """After any legal facts and a crash anywhere, the memory is that of what was recorded."""

    def machine() -> Crashes:
        return Crashes(emptied(database_url), registry)

    run_state_machine_as_test(
        cast("type[Crashes]", machine),
        settings=settings(
            max_examples=20,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_what_was_committed_survives_sigkill(
    database_url: str, registry: Registry, tmp_path: Path
) -> None:
    """A hub killed in the midst of writing loses no batch it was told is safe, nor half of one."""
    program = textwrap.dedent("""
        import sys
        from pathlib import Path
        from cloud.registry import Registry
        from cloud.store import Store
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
