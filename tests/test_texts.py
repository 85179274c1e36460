"""Texts are fetched, kept and given back as they were written."""

import os
from itertools import pairwise
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from federation.datasets.cached import cache_folder, fetch, load, load_corpus
from federation.datasets.fetching import UnreachableError
from federation.datasets.texts import Corpus, pack_documents, pair, unpack_documents
from federation.errors import DataError


def _fetched(name: str) -> Corpus:
    """The real text; it skips only where there is no network and it was never fetched."""
    cache = cache_folder(os.environ)
    try:
        fetch(name, cache=cache, on_progress=lambda _stage, _done, _total: None)
    except UnreachableError as cause:
        pytest.skip(str(cause))
    return load_corpus(name, cache=cache)


def test_the_speeches_are_all_there() -> None:
    """State of the Union has 233 speeches of 43 presidents, Washington's of 1790 first."""
    sotu = _fetched("sotu")

    assert len(sotu.documents) == 233
    assert sum(map(len, sotu.documents)) == 10_759_831
    assert sotu.client is not None
    assert len(np.unique(sotu.client)) == len(sotu.client_names) == 43
    assert sotu.client_names[sotu.client[0]] == "George Washington"
    assert sotu.client_names[sotu.client[-1]] == "Joseph R Biden"


def test_two_bibles_share_their_verses() -> None:
    """31,084 verses stand in both editions, and a verse stands beside its translation."""
    english, spanish = _fetched("kjv"), _fetched("reina-valera")
    pairs = pair(english, spanish)

    assert len(pairs) == 31_084
    begun = next(found for found in pairs if found[0].startswith("In the beginning God"))
    assert begun[1].startswith("EN el principio")
    assert pairs[-1][1].startswith("La gracia de nuestro Señor Jesucristo")
    assert not any("<" in text for couple in pairs for text in couple)


@given(st.lists(st.text(), min_size=1))
def test_documents_come_back_as_they_were(documents: list[str]) -> None:
    """Whatever the characters, and where documents are empty, the cache gives the same back."""
    kept = [text.encode(errors="ignore").decode() for text in documents]

    assert unpack_documents(pack_documents(kept)) == tuple(kept)


def test_a_text_is_no_set_of_samples_and_the_other_way_round(tmp_path: Path) -> None:
    """Asked for in the wrong way a set says what it is instead."""
    with pytest.raises(DataError, match="sotu is a text"):
        load("sotu", cache=tmp_path)
    with pytest.raises(DataError, match="digits is no text"):
        load_corpus("digits", cache=tmp_path)


def test_a_cut_text_is_refused(tmp_path: Path) -> None:
    """A cache file whose documents do not fill it is refused with the way to mend it."""
    entire = _fetched("sotu")
    arrays = pack_documents(list(entire.documents))
    name = fetch("sotu", cache=cache_folder(os.environ), on_progress=lambda *_: None).name
    np.savez(tmp_path / name, text=arrays["text"][:-1], ends=arrays["ends"])

    with pytest.raises(DataError, match="delete"):
        load_corpus("sotu", cache=tmp_path)


def test_editions_of_different_texts_do_not_pair() -> None:
    """Corpora without common places are refused rather than paired by accident."""
    one, two = (
        Corpus(name, tuple(name), None, (), "", "") for name, _ in pairwise(("ab", "abc", ""))
    )
    with pytest.raises(DataError, match="as many in both"):
        pair(one, two)
