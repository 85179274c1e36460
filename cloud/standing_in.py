"""Digital agents at work beside the rounds: what they train, the hub's thread never waits for."""

import contextlib
import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

from cloud.coordination.run import parse_attempt
from federation.errors import HeadwaterError
from federation.protocol.effects import Train, Trained
from twin.agent import DigitalAgents
from twin.mirror import MirrorStore

_log = logging.getLogger("headwater.hub")


@dataclass(frozen=True, slots=True)
class StoodIn:
    """A digital agent finished an attempt, or says why it could not."""

    trained: Trained


class StandIns:
    """A thread on which agents train, one after the other, exactly as their devices would."""

    def __init__(self, mirrors: MirrorStore, on_done: Callable[[StoodIn], None]) -> None:
        self._agents = DigitalAgents(mirrors, accelerator="cpu")
        self._on_done = on_done
        self._jobs: queue.SimpleQueue[Train | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def train(self, task: Train) -> None:
        """Train this soon; the thread is begun with the first task."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="digital-agents", daemon=True)
            self._thread.start()
        self._jobs.put(task)

    def close(self, patience_s: float = 10.0) -> None:
        """Finish the task in hand, within this patience; the others end with their round."""
        if self._thread is not None:
            with contextlib.suppress(queue.Empty):  # The thread may take the last one first.
                while True:
                    self._jobs.get_nowait()
            self._jobs.put(None)
            self._thread.join(patience_s)

    def _work(self) -> None:
        while (task := self._jobs.get()) is not None:
            attempt = task.assignment.attempt
            device = (parse_attempt(attempt) or ("", 0, ""))[2]
            try:
                [trained] = self._agents.fulfil([(device, task.assignment, task.base)], exact=True)
            except HeadwaterError as error:
                trained = Trained(attempt, failure=str(error))
            except Exception as error:  # the outermost loop of this thread: the next may do
                _log.exception("digital agent failed attempt=%s", attempt)
                trained = Trained(attempt, failure=f"failed unexpectedly ({error!r}): report it")
            self._on_done(StoodIn(trained))
