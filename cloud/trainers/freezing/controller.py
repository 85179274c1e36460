"""Who asks the reference: at once, or beside the training, which never waits for it."""

from collections import deque
from collections.abc import Callable
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Protocol

from cloud.trainers.freezing.reference import Answer, Question

QUEUED = 2
"""So many questions may wait; one that comes when they do is dropped, and asked anew later."""

_LOOKS_S = 0.05


class Controller(Protocol):
    """Takes questions and has answers, later or never."""

    def ask(self, question: Question) -> bool:
        """Hand over a question without waiting; whether it was taken."""
        ...

    def answers(self) -> list[Answer]:
        """The answers there are by now, each given once."""
        ...

    def close(self) -> None:
        """No more questions."""
        ...


class AtOnce:
    """Answers as it is asked: the same run gives the same readings at the same steps."""

    def __init__(self, answer: Callable[[Question], Answer]) -> None:
        self._answer, self._answers = answer, list[Answer]()

    def ask(self, question: Question) -> bool:
        """Answer it now."""
        self._answers.append(self._answer(question))
        return True

    def answers(self) -> list[Answer]:
        """What was asked since."""
        found, self._answers = self._answers, []
        return found

    def close(self) -> None:
        """There is nothing to close."""


class Beside:
    """Answers in a thread of its own (torch computes outside the interpreter's lock).

    The two queues are bounded and nobody waits at them: Egeria (arXiv:2201.06227), section 4.3.
    Whatever ends the thread only ends the answers; `failure` then says what it was.
    """

    def __init__(self, answer: Callable[[Question], Answer]) -> None:
        self._answer = answer
        self._questions: Queue[Question] = Queue(QUEUED)
        self._answers: deque[Answer] = deque(maxlen=8 * QUEUED)
        self._is_over = Event()
        self.failure: BaseException | None = None
        self._thread = Thread(target=self._work, name="freezing-controller", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether questions are still answered."""
        return self._thread.is_alive()

    def ask(self, question: Question) -> bool:
        """Hand it over, unless too many wait or nobody answers any more."""
        if not self.is_alive:
            return False
        try:
            self._questions.put_nowait(question)
        except Full:
            return False
        return True

    def answers(self) -> list[Answer]:
        """What has been answered since."""
        found = []
        while self._answers:
            found.append(self._answers.popleft())
        return found

    def close(self) -> None:
        """End the thread after the question it is at."""
        self._is_over.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._is_over.is_set():
            try:
                question = self._questions.get(timeout=_LOOKS_S)
            except Empty:
                continue
            try:
                self._answers.append(self._answer(question))
            except Exception as error:  # the outermost loop: training goes on without us
                self.failure = error
                return
