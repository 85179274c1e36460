"""Measures new models and exports those worth releasing, beside the rounds, never in their way."""

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cloud.config import RunPlan
from cloud.coordination.run import CHUNK_BYTES
from cloud.record.registry import Registry
from cloud.record.store import Store
from federation.errors import HeadwaterError
from federation.learning.data import LocalData, load_folder
from federation.learning.layers import model_part
from federation.learning.methods import method_named
from federation.protocol import codec
from federation.protocol.messages import Release
from federation.protocol.transfer import content_of

_log = logging.getLogger("headwater.hub")


@dataclass(frozen=True, slots=True)
class Closed:
    """A round gave the model of this digest; `is_last` where its run is over."""

    plan: RunPlan
    round: int
    digest: str
    is_last: bool


@dataclass(frozen=True, slots=True)
class Exported:
    """A model became an ONNX file that passed its parity check."""

    release: Release
    onnx: bytes


def is_worth_releasing(plan: RunPlan, number: int, *, is_last: bool) -> bool:
    """Whether the plan wants this round's model exported: every so many rounds, and the last."""
    every = plan.release.every
    if plan.mirror or method_named(plan.method.name).is_personal:
        return False  # There is no one model of such a run.
    return every > 0 and (is_last or number % every == 0)


def last_model(plan: RunPlan, store: Store) -> Closed | None:
    """The newest model of a run that is over, whatever became of the rounds after it."""
    closed = [row for row in store.rounds(plan.name) if row.model is not None]
    if not closed or closed[-1].model is None:
        return None
    return Closed(plan, closed[-1].number, closed[-1].model, is_last=True)


def unappraised(store: Store, registry: Registry) -> list[Closed]:
    """The models of all runs that nobody has measured, or released where that is due."""
    found = []
    for run in store.runs():
        released = {entry.round for entry in registry.manifest(run.plan.name) if entry.onnx}
        newest = max(released, default=0)
        closed = [row for row in store.rounds(run.plan.name) if row.model is not None]
        for row in closed:
            is_last = run.status != "active" and row is closed[-1]
            due = row.number > newest and is_worth_releasing(run.plan, row.number, is_last=is_last)
            unmeasured = run.plan.evaluation is not None and not row.evaluations
            if row.model is not None and (due or unmeasured):
                found.append(Closed(run.plan, row.number, row.model, is_last=is_last))
    return found


class Appraiser:
    """A thread with a queue of closed rounds. A model that cannot be measured costs no round."""

    def __init__(
        self, store: Store, registry: Registry, on_exported: Callable[[Exported], None]
    ) -> None:
        self._store = store
        self._registry = registry
        self._on_exported = on_exported
        self._jobs: queue.SimpleQueue[Closed | None] = queue.SimpleQueue()
        self._data: dict[str, LocalData] = {}
        self._exported: set[str] = set()
        self._is_closing = False
        self._thread = threading.Thread(target=self._work, name="appraiser", daemon=True)
        self._thread.start()

    def appraise(self, closed: Closed) -> None:
        """Measure, and export if due, soon."""
        self._jobs.put(closed)

    def close(self, patience_s: float = 60.0) -> None:
        """Finish the model in hand, within this patience; the rest is for the next hub."""
        self._is_closing = True
        self._jobs.put(None)
        self._thread.join(patience_s)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None and not self._is_closing:
            try:
                self._take(job)
            except HeadwaterError as error:
                _log.warning("model not appraised run=%s: %s", job.plan.name, error)
            except Exception:  # the outermost loop of this thread: the next model may do
                _log.exception("model not appraised run=%s round=%d", job.plan.name, job.round)

    def _take(self, job: Closed) -> None:
        from federation.learning.evaluation import evaluate

        weights = model_part(codec.decode(self._registry.read(job.digest)))
        data = self._evaluation_data(job.plan)
        if data is not None:
            tally = evaluate(job.plan.model, weights, data)
            self._store.record_evaluation(
                job.plan.name, job.round, "held-out", tally.correct, tally.loss_sum, tally.samples
            )
        due = is_worth_releasing(job.plan, job.round, is_last=job.is_last)
        if due and job.digest not in self._exported:
            self._export(job, weights, data)
            self._exported.add(job.digest)

    def _export(self, job: Closed, weights: codec.Weights, data: LocalData | None) -> None:
        from federation.learning.export import export_onnx
        from federation.learning.models import input_shape

        if data is not None:
            example = data.x[:16]
        else:
            # Without samples of the hub's own the parity check takes noise of the right shape.
            shape = (16, *input_shape(job.plan.model))
            example = np.random.default_rng(job.round).normal(size=shape).astype(np.float32)
        labels = job.plan.release.labels
        onnx = export_onnx(job.plan.model, weights, example=example, labels=labels)
        content = content_of(onnx, CHUNK_BYTES)
        release = Release(run=job.plan.name, round=job.round, content=content, labels=labels)
        self._on_exported(Exported(release, onnx))

    def _evaluation_data(self, plan: RunPlan) -> LocalData | None:
        if plan.evaluation is None:
            return None
        key = str(plan.evaluation)
        if key not in self._data:
            self._data[key] = load_folder(plan.evaluation)
        return self._data[key]
