"""A workshop that remembers what was trained, so that a run that was killed goes on.

A simulation is deterministic: begun again from the top it asks for the same trainings in the
same order. Those that the journal holds are read instead of done, and the run comes to where it
was killed within moments, with the same bits.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from federation.protocol.codec import digest_of
from federation.protocol.effects import Trained
from simulations.workshop.grouped import Grouped
from simulations.workshop.job import Bench, Job
from simulations.workshop.journal import Journal

_BASES = 16
"""So many bases, with their digests, are held on to."""

_RESULTS = msgspec.msgpack.Decoder(list[Trained])


class Remembered(Grouped):
    """Another workshop, with a journal of what came of each of its cohorts.

    Whole cohorts are remembered, since the bits of a client may depend on the others of its
    cohort: a cohort of which half was known would not come out the same.

    Args:
        inner: where trainings are done that are not known; it is closed with this one.
        folder: where the journal is kept, as `trainings.journal`; made when absent.
        owner: names all that decides the run's bits, such as the digest of its scenario, its
            seed and the versions of libraries. A journal of another owner is refused.

    Raises:
        ConfigError: the journal is another run's, or in use.
        StoreError: the folder cannot be written to.
    """

    def __init__(self, inner: Grouped, folder: Path, *, owner: str) -> None:
        rule, bits = inner.manner.rule, inner.manner.bits
        cut = f"trained {bits}, in cohorts of {rule.most} or {rule.macs:g} MACs"
        try:
            self._journal = Journal(journal_path(folder), f"{owner} ({cut})")
        except BaseException:
            inner.close()
            raise
        self._bench = _Remembering(inner.bench, self._journal)
        self.resumed = len(self._journal)
        """How many cohorts and other values an earlier, unfinished run has left."""
        super().__init__(self._bench, inner.data, inner.manner)

    def remember(self, key: str, make: Callable[[], bytes]) -> bytes:
        """The value of a key: what the journal holds, or else what `make` gives, once.

        Raises:
            StoreError: the journal cannot be read or written.
        """
        key = f"value {key}"
        found = self._journal.get(key)
        if found is None:
            found = make()
            self._journal.add(key, found)
        return found

    def forget(self) -> None:
        """The run has ended: remove the journal, and close the workshop."""
        self._bench.inner.close()
        self._journal.remove()


def journal_path(folder: Path) -> Path:
    """Where the journal of a run's folder is, while the run is not finished."""
    return folder / "trainings.journal"


class _Remembering:
    """A bench that looks into the journal before another is asked."""

    def __init__(self, inner: Bench, journal: Journal) -> None:
        self.inner, self._journal = inner, journal
        self._keys: dict[int, str] = {}
        self._known: set[int] = set()
        self._digests: dict[int, tuple[bytes, str]] = {}

    def start(self, number: int, cohort: Sequence[Job]) -> None:
        self._keys[number] = self._key(cohort)
        if self._journal.knows(self._keys[number]):
            self._known.add(number)
        else:
            self.inner.start(number, cohort)

    def finish(self, number: int) -> list[Trained]:
        key = self._keys.pop(number)
        if number in self._known:
            self._known.remove(number)
            return _RESULTS.decode(self._journal.get(key) or b"")
        results = self.inner.finish(number)
        self._journal.add(key, msgspec.msgpack.encode(results))
        return results

    def cancel(self, number: int) -> None:
        del self._keys[number]
        if number in self._known:
            self._known.remove(number)
        else:
            self.inner.cancel(number)

    def close(self) -> None:
        self.inner.close()
        self._journal.close()

    def _key(self, cohort: Sequence[Job]) -> str:
        """Names a cohort by all that decides its bits, but for the fleet's data."""
        lines = [
            (
                job.place,
                job.device,
                job.assignment.attempt,
                self._digest_of(job.base),
                msgspec.json.encode(job.assignment.plan, order="sorted"),
                digest_of(job.memory),
            )
            for job in cohort
        ]
        return f"cohort {hashlib.sha256(msgspec.msgpack.encode(lines)).hexdigest()}"

    def _digest_of(self, base: bytes) -> str:
        """The digest of a base, computed once while jobs go on holding the same object."""
        known = self._digests.get(id(base))
        if known is not None and known[0] is base:
            return known[1]
        if len(self._digests) >= _BASES:
            self._digests.clear()
        digest = digest_of(base)
        self._digests[id(base)] = (base, digest)
        return digest
