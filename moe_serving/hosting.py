"""Which models are served, in which version, and how one version follows another.

A newer version is loaded and probed beside the one that serves, then takes its name over in one
step; the older one finishes what it has accepted and goes. Where loading fails, nothing changes.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from federation.errors import HeadwaterError, StoreError
from moe_serving.config import MoeConfig
from moe_serving.engine import Engine, Observer
from moe_serving.loading import Loaded, load_version
from moe_serving.repository import check_model_name, models, open_version, versions
from moe_serving.requests import Deliver, RefusedError, Ticket, Work

State: TypeAlias = Literal["READY", "LOADING", "UNAVAILABLE"]
"""A version's state, in the words of the Open Inference Protocol's repository extension."""

RETIRE_S = 5.0
"""How much longer than its longest deadline an older version is given to finish."""

_log = logging.getLogger("headwater.moe.hosting")


@dataclass(frozen=True, slots=True, eq=False)
class Hosted:
    """A version that serves."""

    loaded: Loaded
    engine: Engine

    @property
    def name(self) -> str:
        """The model's name."""
        return self.loaded.published.name

    @property
    def version(self) -> int:
        """Its version."""
        return self.loaded.published.version


@dataclass(frozen=True, slots=True)
class Row:
    """One version in the repository's index; `reason` says why it is not ready."""

    name: str
    version: int
    state: State
    reason: str = ""


@dataclass(slots=True)
class _Place:
    """One model's name: who has it, and what became of other versions."""

    loading: threading.Lock = field(default_factory=threading.Lock)
    hosted: Hosted | None = None
    coming: int = 0
    tried: int = 0
    failures: dict[int, str] = field(default_factory=dict)


class Host:
    """The models of one repository. All methods may be called from any thread."""

    def __init__(
        self,
        config: MoeConfig,
        *,
        observe: Callable[[str, int], Observer],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.clock = clock
        self._observe = observe
        self._lock = threading.Lock()
        self._places: dict[str, _Place] = {}
        self._retiring: set[Hosted] = set()
        self._is_draining = False
        self._is_begun = False

    def begin(self) -> None:
        """Load every model that is to be served; those that fail are in the index.

        Raises:
            StoreError: none could be loaded, or there is none.
        """
        names = self.wanted()
        for name in names:
            try:
                self.load(name, self.config.of_model(name).version or None)
            except HeadwaterError as error:
                _log.error("model not loaded model=%s reason=%s", name, error)
        if names and not self.hosted():
            reasons = [row.reason for row in self.index() if row.reason]
            raise StoreError(reasons[0] if reasons else "no model could be loaded")
        self._is_begun = True

    def wanted(self) -> list[str]:
        """The models that the configuration names, or all of the repository."""
        return sorted(self.config.models) or models(self.config.repository)

    @property
    def is_ready(self) -> bool:
        """Whether everything to be loaded was tried, something serves, and no end is near."""
        return self._is_begun and not self._is_draining and bool(self.hosted())

    @property
    def is_draining(self) -> bool:
        """Whether the end has begun."""
        return self._is_draining

    def hosted(self) -> list[Hosted]:
        """All that serves."""
        with self._lock:
            return [place.hosted for place in self._places.values() if place.hosted is not None]

    def find(self, name: str, version: int | None = None) -> Hosted:
        """Who serves under this name.

        Raises:
            RefusedError: `unknown`, `loading` or `draining`.
        """
        with self._lock:
            place = self._places.get(name)
            hosted = place.hosted if place is not None else None
            is_coming = place is not None and bool(place.coming)
        if self._is_draining:
            raise RefusedError("draining", "the server is about to stop", retry_after_s=1.0)
        if hosted is not None and version in {None, hosted.version}:
            return hosted
        if hosted is None and is_coming:
            raise RefusedError("loading", f"model {name!r} is being loaded", retry_after_s=2.0)
        there = ", ".join(f"{each.name} ({each.version})" for each in self.hosted())
        asked = name[:80] if version is None else f"{name[:80]} ({version})"
        raise RefusedError("unknown", f"there is no model {asked}; served are: {there or 'none'}")

    def submit(
        self,
        hosted: Hosted,
        client: str,
        work: Work,
        deliver: Deliver,
        *,
        deadline_s: float | None = None,
    ) -> tuple[Hosted, Ticket]:
        """Accept a request for a version, or for the one that has taken over from it just now.

        Raises:
            RefusedError: As `Engine.submit` says.
        """
        while True:
            engine = hosted.engine
            longest_s = engine.limits.deadline_s
            now = self.clock()
            until = now + min(deadline_s if deadline_s is not None else longest_s, longest_s)
            ticket = Ticket(client, work, accepted_at=now, deadline=until, deliver=deliver)
            try:
                engine.submit(ticket)
            except RefusedError as error:
                follower = self.find(hosted.name) if error.outcome == "draining" else hosted
                if follower is hosted:
                    raise
                hosted = follower
            else:
                return hosted, ticket

    def load(self, name: str, version: int | None = None) -> Hosted:
        """Serve a version (the newest if none is named) from now on; it returns when it does.

        Raises:
            StoreError: It is not there, damaged, or failed its probe; who served still does.
        """
        place = self._place(check_model_name(name))
        with place.loading:
            found = version or max(versions(self.config.repository, name), default=0)
            before = place.hosted
            if before is not None and before.version == found:
                return before
            place.coming, place.tried = found, max(place.tried, found)
            try:
                hosted = self._bring_up(name, version)
            except HeadwaterError as error:
                place.failures[found] = str(error)
                raise
            finally:
                place.coming = 0
            place.failures.pop(hosted.version, None)
            with self._lock:
                is_late = self._is_draining
                place.hosted = place.hosted if is_late else hosted
            if is_late:
                hosted.engine.close()
                hosted.loaded.close()
                raise RefusedError("draining", "the server is about to stop")
        _log.info("model serves model=%s version=%d", name, hosted.version)
        if before is not None:
            self._retire(before)
        return hosted

    def unload(self, name: str) -> None:
        """Serve this model no longer; what was accepted is finished.

        Raises:
            RefusedError: `unknown`: it is not served.
        """
        self.find(name)
        place = self._place(name)
        with place.loading:
            with self._lock:
                hosted, place.hosted = place.hosted, None
            if hosted is None:
                raise RefusedError("unknown", f"model {name[:80]!r} is not served")
        self._retire(hosted)

    def follow(self) -> None:
        """Load what is newer than all that was tried, so that a failure is not tried again."""
        for name in self.wanted():
            newest = max(versions(self.config.repository, name), default=0)
            if not self.config.of_model(name).version and newest > self._place(name).tried:
                try:
                    self.load(name)
                except HeadwaterError as error:
                    _log.error("model not loaded model=%s reason=%s", name, error)

    def index(self) -> list[Row]:
        """Every version of every model in the repository, and how it is."""
        rows = []
        with self._lock:
            places: Mapping[str, _Place] = dict(self._places)
        for name in sorted({*models(self.config.repository), *places}):
            place = places.get(name, _Place())
            there = {*versions(self.config.repository, name), *place.failures} - {0}
            rows += [_row(name, version, place) for version in sorted(there)]
            if 0 in place.failures:
                rows.append(Row(name, 0, "UNAVAILABLE", place.failures[0]))
        return rows

    def drain(self, grace_s: float) -> int:
        """Accept nothing more, finish what was accepted, end all; how many did not finish."""
        with self._lock:
            self._is_draining = True
        until = time.monotonic() + grace_s
        everyone = [*self.hosted(), *self._retiring]
        for hosted in everyone:
            hosted.engine.drain(max(0.0, until - time.monotonic()))
        left = sum(hosted.engine.close() for hosted in everyone)
        for hosted in everyone:
            hosted.loaded.close()
        return left

    def _place(self, name: str) -> _Place:
        with self._lock:
            return self._places.setdefault(name, _Place())

    def _bring_up(self, name: str, version: int | None) -> Hosted:
        settings = self.config.of_model(name)
        loaded = load_version(open_version(self.config.repository, name, version), settings)
        engine = Engine(
            f"{name} {loaded.published.version}",
            loaded.batcher,
            settings.limits,
            loaded.pace,
            observer=self._observe(name, loaded.published.version),
            clock=self.clock,
        )
        engine.start()
        return Hosted(loaded, engine)

    def _retire(self, hosted: Hosted) -> None:
        """Let it finish, beside what serves now."""
        self._retiring.add(hosted)

        def finish() -> None:
            hosted.engine.drain(hosted.engine.limits.deadline_s + RETIRE_S)
            hosted.engine.close()
            hosted.loaded.close()
            self._retiring.discard(hosted)
            _log.info("model put away model=%s version=%d", hosted.name, hosted.version)

        threading.Thread(target=finish, name=f"retire {hosted.name}", daemon=True).start()


def _row(name: str, version: int, place: _Place) -> Row:
    if place.hosted is not None and place.hosted.version == version:
        return Row(name, version, "READY")
    if place.coming == version:
        return Row(name, version, "LOADING")
    return Row(name, version, "UNAVAILABLE", place.failures.get(version, "not loaded"))
