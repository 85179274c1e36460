"""Keeps the twins up with the log, in a thread beside the hub's."""

import logging
import threading

from cloud.twins.store import TwinStore
from federation.errors import StoreError

PAUSE_S = 0.25
"""How long it rests when it has come to the end of the log."""

RETRY_S = 5.0

PAGE = 500

_log = logging.getLogger("headwater.twins")


class Follower:
    """Follows the log until it is closed. What fails is tried again from where it stood."""

    def __init__(self, twins: TwinStore) -> None:
        self._twins = twins
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="twins", daemon=True)

    def start(self) -> None:
        """Begin to follow."""
        self._thread.start()

    def close(self) -> None:
        """End after the page in hand."""
        self._is_over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._is_over.is_set():
            try:
                is_at_end = self._twins.follow(PAGE) < PAGE
            except StoreError as error:
                _log.warning("twins cannot follow the log, next try in %.0f s: %s", RETRY_S, error)
                self._is_over.wait(RETRY_S)
                continue
            except Exception:  # the outermost loop of this thread: twins that stand still lie
                _log.exception("twins cannot follow the log, next try in %.0f s", RETRY_S)
                self._is_over.wait(RETRY_S)
                continue
            if is_at_end:
                self._is_over.wait(PAUSE_S)
