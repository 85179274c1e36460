"""Shadows: merge patches, two writers, versions, the past, and how old a word may be."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from federation.errors import TwinConflictError, TwinError
from twin.history import as_of_revision, as_of_time
from twin.merging import check_patch, delta, difference, is_same, leaves, merge_patch
from twin.shadow import (
    PRESUMED_DEAD_S,
    Edit,
    Shadow,
    apply,
    freshness,
    is_in_sync,
    presence,
    staleness,
    wanting,
    write,
)

ORDER = ("live", "fresh", "stale", "lost", "presumed dead")

KEYS = st.sampled_from(["a", "b", "c/d", "e~f"])
SCALARS = st.one_of(
    st.booleans(), st.integers(-5, 5), st.floats(-2, 2), st.text("xé\n", max_size=3)
)
VALUES = st.one_of(SCALARS, st.lists(SCALARS, max_size=2))
DOCUMENTS = st.recursive(
    st.dictionaries(KEYS, VALUES, max_size=3),
    lambda inner: st.dictionaries(KEYS, st.one_of(VALUES, inner), max_size=3),
    max_leaves=6,
)
PATCHES = st.recursive(
    st.dictionaries(KEYS, st.one_of(VALUES, st.none()), max_size=3),
    lambda inner: st.dictionaries(KEYS, st.one_of(VALUES, st.none(), inner), max_size=3),
    max_leaves=6,
)


def edit(patch, part="desired", at=1.0, **more):
    writer = "device" if part == "reported" else "hub"
    fields = {"writer": writer, "part": part, "patch": patch, "received_at": at}
    return Edit(**(fields | {"actor": "me", "cause": "a test"} | more))


def new():
    return Shadow(device="d1", created_at=0.0, modified_at=0.0)


def written(edits):
    shadow, changes = new(), []
    for each in edits:
        shadow, change = write(shadow, each)
        changes += [change] if change is not None else []
    return shadow, changes


@pytest.mark.parametrize(
    ("document", "patch", "merged"),
    [
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ({"a": "foo"}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ],
)
def test_patches_merge_as_the_rfc_says(document, patch, merged) -> None:
    """The examples of RFC 7396, appendix A, that are objects."""
    assert merge_patch(document, patch) == merged


@given(DOCUMENTS, DOCUMENTS)
@settings(deadline=None)
def test_a_difference_leads_from_one_to_the_other(before, after) -> None:
    """Merging the difference of two documents into the first gives the second."""
    assert is_same(merge_patch(before, difference(before, after)), after)
    assert difference(after, after) == {}


@given(DOCUMENTS, PATCHES)
@settings(deadline=None)
def test_a_patch_merged_again_changes_nothing(document, patch) -> None:
    """Merging is idempotent, and leaves no null behind."""
    once = merge_patch(document, patch)

    assert is_same(merge_patch(once, patch), once)
    assert all(value is not None for _, value in leaves(once))


@given(DOCUMENTS, DOCUMENTS)
@settings(deadline=None)
def test_a_delta_is_what_is_missing(desired, reported) -> None:
    """A device that took the delta over is as desired, and keeps what is its own."""
    missing = delta(desired, reported)

    assert delta(desired, merge_patch(reported, missing)) == {}
    assert delta(desired, desired) == {}


def test_true_is_not_one() -> None:
    """In JSON true and 1 differ, and 1 and 1.0 do not."""
    assert difference({"a": 1}, {"a": True}) == {"a": True}
    assert difference({"a": 1}, {"a": 1.0}) == {}
    assert delta({"a": [True]}, {"a": [1]}) == {"a": [True]}


@given(st.lists(st.tuples(PATCHES, st.sampled_from(["desired", "reported", "tags"])), max_size=8))
@settings(max_examples=60, deadline=None)
def test_the_past_is_what_it_was(patches) -> None:
    """A shadow replayed from its changes is, at each revision and time, as it was then."""
    shadow, changes, seen = new(), [], {0: new()}
    for number, (patch, part) in enumerate(patches):
        shadow, change = write(shadow, edit(patch, part, at=float(number)))
        if change is not None:
            changes.append(change)
            seen[shadow.revision] = shadow

    for revision, then in seen.items():
        again = as_of_revision(new(), changes, revision)
        assert is_same(again.desired.state, then.desired.state)
        assert is_same(again.reported.state, then.reported.state)
        at_its_time = as_of_time(new(), changes, then.modified_at)
        assert at_its_time.revision == revision or revision == 0
    for part in (shadow.desired, shadow.reported, shadow.tags):
        assert part.leaves.keys() == dict(leaves(part.state)).keys()


def test_changes_come_back_from_json() -> None:
    """A change and a shadow survive their encoding."""
    shadow, changes = written([edit({"a": {"b": 1}}), edit({"a": None})])

    for value in (shadow, *changes):
        assert msgspec.json.decode(msgspec.json.encode(value), type=type(value)) == value


def test_writers_are_kept_apart() -> None:
    """A device cannot write what is desired, nor the hub what was reported."""
    with pytest.raises(TwinError, match="only the hub may"):
        write(new(), edit({"a": 1}, writer="device"))
    with pytest.raises(TwinError, match="only the device may"):
        write(new(), edit({"a": 1}, "reported", writer="hub"))


def test_two_counters_avoid_lost_updates() -> None:
    """What the device reports meanwhile is no conflict for a wish; another wish is."""
    shadow, _ = written([edit({"a": 1})])
    shadow, _ = write(shadow, edit({"b": 2}, "reported"))

    after, _ = write(shadow, edit({"a": 2}), expected=1)
    with pytest.raises(TwinConflictError, match="has version 2"):
        write(after, edit({"a": 3}), expected=1)

    assert (after.revision, after.desired.version, after.reported.version) == (3, 2, 1)


def test_what_is_repeated_is_young_again() -> None:
    """Saying the same again makes no revision, but its leaf has the new time."""
    shadow, _ = written([edit({"a": 1, "b": 2}, "reported", at=1.0)])

    again, change = write(shadow, edit({"a": 1}, "reported", at=9.0, source="measured"))

    assert change is None
    assert again.revision == shadow.revision
    assert [again.reported.leaves[leaf].at for leaf in ("/a", "/b")] == [9.0, 1.0]
    assert again.reported.leaves["/a"].source == "measured"


@pytest.mark.parametrize(
    ("patch", "says"),
    [
        ([1], "an array"),
        ({"a": float("inf")}, "a finite number"),
        ({"a": 2**60}, "beyond 2"),
        ({"a": {"b": [1, None]}}, "/a/b/1 is null"),
        ({"a" * 65: 1}, "1 to 64"),
        ({"": 1}, "1 to 64"),
        ({"a": "x\x00"}, "NUL"),
        ({"a": {"a": {"a": {"a": {"a": {"a": {"a": {"a": 1}}}}}}}}, "deep"),
        ({"a": object()}, "JSON has not"),
    ],
)
def test_bad_patches_are_refused(patch, says) -> None:
    """What JSON or a database cannot keep is refused, with the place and the remedy."""
    with pytest.raises(TwinError, match=says):
        check_patch(patch)


def test_a_document_is_bounded() -> None:
    """Patches cannot make a document grow without end."""
    shadow, _ = written([edit({"a": "x" * 16_000})])

    with pytest.raises(TwinError, match="at most 16384"):
        write(shadow, edit({"b": "y" * 1000}))


def test_history_has_no_gaps() -> None:
    """A change that is not the next one is refused, and so is a revision that is not kept."""
    _, changes = written([edit({"a": number}) for number in range(3)])

    with pytest.raises(TwinError, match="gap"):
        apply(new(), changes[1])
    with pytest.raises(TwinError, match="leads to 3"):
        as_of_revision(new(), changes, 9)


@given(st.floats(0, 1e7), st.floats(0, 1e7), st.floats(0, 1e6), st.booleans(), st.floats(0, 4e6))
@settings(deadline=None)
def test_with_time_alone_nothing_gets_fresher(age_s, time_to_live_s, later_s, is_there, away_s):
    """As time goes by without news the class of a value only gets worse."""
    now = freshness(age_s, time_to_live_s, is_there=is_there, away_s=away_s)
    then = freshness(
        age_s + later_s,
        time_to_live_s,
        is_there=is_there,
        away_s=away_s if is_there else away_s + later_s,
    )

    assert ORDER.index(then) >= ORDER.index(now)


def test_each_feature_has_its_own_time_to_live() -> None:
    """Settings go stale in a day, hardware in a month; a device away for long is presumed dead."""
    said = {"hardware": {"cores": 4}, "settings": {"enabled": True}}
    shadow, _ = written([edit(said | {"connection": {"state": "ready"}}, "reported", at=0.0)])
    day = 24 * 3600.0

    assert set(staleness(shadow, 10.0).values()) == {"live"}
    assert staleness(shadow, 2 * day)["settings"] == "stale"
    assert staleness(shadow, 2 * day)["hardware"] == "live"
    gone, _ = write(shadow, edit({"connection": {"state": "lost"}}, "reported", at=2 * day))
    assert staleness(gone, 2 * day + 60)["hardware"] == "fresh"
    assert staleness(gone, 3 * day)["settings"] == "lost"
    assert presence(gone, 3 * day) == (False, day)
    assert set(staleness(gone, 3 * day + PRESUMED_DEAD_S).values()) == {"presumed dead"}


def test_a_shadow_is_in_sync_when_the_device_answered_the_newest_wish() -> None:
    """In sync is not that all was applied, but that the device said what it made of it."""
    shadow, _ = written([edit({"heartbeat_s": 5, "colour": "red"})])
    assert not is_in_sync(shadow)

    said = {"settings": {"heartbeat_s": 5}, "applied": {"version": 1}}
    shadow, _ = write(shadow, edit(said, "reported"))

    assert is_in_sync(shadow)
    assert wanting(shadow) == {"colour": "red"}
    assert is_in_sync(new())
