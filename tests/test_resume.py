from collections import Counter
from signal import SIGKILL

import pytest
from hypothesis import given
from hypothesis import strategies as st

from federation.errors import ConfigError, StoreError
from federation.protocol.codec import digest_of
from simulations.workshop import CohortRule, InProcess, Processes, Remembered
from simulations.workshop.journal import Journal
from simulations.workshop.remembered import journal_path
from tests.workshops import OWNER, SMALL, average, fleet, job, noted, run_remembered, told


def final(folder):
    return (folder / "final").read_text()


def undisturbed(**options):
    with InProcess(fleet(), **options) as workshop:
        return digest_of(average(workshop))


def trained(folder):
    return (folder / "trained").read_text().split()


def test_a_killed_run_resumes_without_training_again(tmp_path):
    """Killed twice, a run ends in the bits of an undisturbed one, and trains everybody once."""
    assert run_remembered(tmp_path, "noted", die_after=11) == -SIGKILL
    assert len(trained(tmp_path)) == 11
    assert run_remembered(tmp_path, "noted", die_after=17) == -SIGKILL

    assert run_remembered(tmp_path, "noted") == 0

    assert final(tmp_path) == undisturbed(exact=True)
    assert set(Counter(trained(tmp_path)).values()) == {1}
    assert len(trained(tmp_path)) == 3 * 8


@pytest.mark.parametrize(("first", "then"), [("in-process", "forks"), ("forks", "in-process")])
def test_a_run_resumes_on_another_bench(first, then, tmp_path):
    """What one bench trained before the kill is the same for any other that goes on."""
    assert run_remembered(tmp_path, first, die_after=13) == -SIGKILL

    assert run_remembered(tmp_path, then) == 0

    assert final(tmp_path) == undisturbed(rule=SMALL)


def test_a_torn_last_training_is_done_again(tmp_path):
    """A journal that was cut in the middle of a record loses that record and no other."""
    assert run_remembered(tmp_path, "noted", die_after=10) == -SIGKILL
    journal = journal_path(tmp_path)
    journal.write_bytes(journal.read_bytes()[:-7])
    before = trained(tmp_path)

    assert run_remembered(tmp_path, "noted") == 0

    again = [attempt for attempt, times in Counter(trained(tmp_path)).items() if times == 2]
    assert final(tmp_path) == undisturbed(exact=True)
    assert again == [before[-1]]


ENTRIES = st.lists(st.tuples(st.text(max_size=8), st.binary(max_size=60)), max_size=6)


@given(entries=ENTRIES, data=st.data())
def test_a_journal_cut_anywhere_keeps_what_is_whole(entries, data, tmp_path_factory):
    """Whatever a kill leaves of the file, whole records are read and new ones can be added."""
    path = tmp_path_factory.mktemp("journal") / "journal"
    ends = [fill(path, [])] + [fill(path, [entry]) for entry in entries]
    cut = data.draw(st.integers(0, ends[-1]))
    path.write_bytes(path.read_bytes()[:cut])

    fill(path, [("new", b"value")])

    whole = dict(entries[: sum(end <= cut for end in ends[1:])])
    journal = Journal(path, "me")
    assert {key: journal.get(key) for key in whole} == {**whole} | (
        {"new": b"value"} if "new" in whole else {}
    )
    assert journal.get("new") == b"value"
    assert len(journal) == len({*whole, "new"})
    journal.close()


def fill(path, entries):
    """Open a journal, add these, and close it: the size of its file."""
    journal = Journal(path, "me")
    for key, value in entries:
        journal.add(key, value)
    journal.close()
    return path.stat().st_size


@given(flipped=st.integers(0, 10_000))
def test_a_damaged_record_is_never_believed(flipped, tmp_path_factory):
    """With any bit turned, a journal gives the right value, or none, or refuses itself."""
    path = tmp_path_factory.mktemp("journal") / "journal"
    fill(path, [("a", b"first" * 9), ("b", b"second" * 9)])
    content = bytearray(path.read_bytes())
    content[flipped // 8 % len(content)] ^= 1 << flipped % 8
    path.write_bytes(content)

    try:
        journal = Journal(path, "me")
    except ConfigError:
        return

    assert journal.get("a") in (b"first" * 9, None)
    assert journal.get("b") in (b"second" * 9, None)
    journal.close()


def test_the_journal_of_another_run_is_refused(tmp_path):
    """A journal of another scenario, seed or manner is named, with what to do, and stays."""
    with Remembered(InProcess(fleet(), rule=SMALL), tmp_path, owner="smoke, seed 3"):
        pass
    content = journal_path(tmp_path).read_bytes()

    same, other = "smoke, seed 3", "smoke, seed 4"
    for owner, options in (
        (other, {"rule": SMALL}),
        (same, {"rule": CohortRule(most=2)}),
        (same, {"rule": SMALL, "exact": True}),
    ):
        with pytest.raises(ConfigError, match=r"not finished, smoke, seed 3 .* remove the file"):
            Remembered(InProcess(fleet(), **options), tmp_path, owner=owner)
    assert journal_path(tmp_path).read_bytes() == content


def test_what_is_no_journal_is_refused(tmp_path):
    """A file of something else is not written over."""
    journal_path(tmp_path).write_bytes(b"a letter to my aunt")

    with pytest.raises(ConfigError, match="is not a journal: give the run another folder"):
        Remembered(InProcess(fleet()), tmp_path, owner=OWNER)

    assert journal_path(tmp_path).read_bytes() == b"a letter to my aunt"


def test_two_runs_never_share_a_journal(tmp_path):
    """A second run in the folder of one under way is refused."""
    with (
        Remembered(InProcess(fleet()), tmp_path, owner=OWNER),
        pytest.raises(ConfigError, match="is in use by another process"),
    ):
        Remembered(InProcess(fleet()), tmp_path, owner=OWNER)


def test_a_folder_that_cannot_be_written_to_is_told(tmp_path):
    """A path that cannot be made is an error that names it."""
    (tmp_path / "file").touch()

    with pytest.raises(StoreError, match=r"cannot open .*file"):
        Remembered(InProcess(fleet()), tmp_path / "file", owner=OWNER)


def test_figures_are_remembered_too(tmp_path):
    """What `remember` was given once it gives again, in another process's life as well."""
    made = []

    def make():
        made.append("made")
        return b"0.75"

    for _ in range(2):
        with Remembered(InProcess(fleet()), tmp_path, owner=OWNER) as workshop:
            assert workshop.remember("accuracy of m1", make) == b"0.75"
    assert made == ["made"]


def test_a_run_that_ended_leaves_no_journal(tmp_path):
    """The journal goes when its run is over; the next one begins anew."""
    workshop = Remembered(InProcess(fleet(), rule=SMALL), tmp_path, owner=OWNER)
    average(workshop, rounds=1)
    workshop.forget()

    assert list(tmp_path.iterdir()) == []


def test_dropped_jobs_are_remembered_as_dropped(tmp_path):
    """A cohort that nobody wants any more is neither trained nor kept."""
    for _ in range(2):
        inner = InProcess(fleet(), train=noted(tmp_path))
        with Remembered(inner, tmp_path, owner=OWNER) as workshop:
            for place in range(3):
                workshop.begin(job(place))
            workshop.result("r_1_d02")
            workshop.drop("r_1_d00")
            workshop.result("r_1_d01")

    assert trained(tmp_path) == ["r_1_d02", "r_1_d01"]
    assert workshop.resumed == 2


def test_one_job_done_twice_differently_is_not_mixed_up(tmp_path):
    """A result is remembered for the base it was trained from, not for its name alone."""
    with Remembered(InProcess(fleet(), exact=True), tmp_path, owner=OWNER) as workshop:
        workshop.begin(job(0))
        first = told(workshop.result("r_1_d00"))
    with Remembered(Processes(fleet(), workers=1, exact=True), tmp_path, owner=OWNER) as workshop:
        workshop.begin(job(0, epochs=1))
        second = told(workshop.result("r_1_d00"))
        workshop.begin(job(0))

        assert told(workshop.result("r_1_d00")) == first
    assert first != second
