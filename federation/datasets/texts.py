"""Real texts that ship inside packages: speeches, and two Bibles that share their verses.

A corpus is kept in the cache as one run of UTF-8 bytes and the places where its documents end.
The conversions are here too, since texts have no samples of one shape.
"""

import html
import json
import re
import struct
import zlib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from federation.datasets.conversion import Arrays, Members
from federation.errors import DataError

_NOTES = re.compile(r"(?s)<(note|title).*?</\1>")
_MARKUP = re.compile(r"<[^>]+>")
_BLANKS = re.compile(r"\s+")


@dataclass(frozen=True)
class Corpus:
    """Documents in order, and whose each is.

    Attributes:
        documents: One text each; of a Bible a verse, empty where the edition has none there.
        client: Whose each document is, an index into `client_names`; None without authors.
    """

    name: str
    documents: tuple[str, ...]
    client: npt.NDArray[np.int64] | None
    client_names: tuple[str, ...]
    source: str
    licence: str


def pair(one: Corpus, other: Corpus) -> list[tuple[str, str]]:
    """The documents that stand at the same place in both, where neither is empty.

    Raises:
        DataError: The two have different numbers of documents: they share no places.
    """
    if len(one.documents) != len(other.documents):
        raise DataError(
            f"{one.name} has {len(one.documents)} documents and {other.name} "
            f"{len(other.documents)}; as many in both were expected; pair two editions of one text"
        )
    both = zip(one.documents, other.documents, strict=True)
    return [(left, right) for left, right in both if left and right]


def pack_documents(documents: list[str]) -> Arrays:
    """The arrays that the cache keeps of these documents."""
    encoded = [document.encode() for document in documents]
    ends = np.cumsum([len(document) for document in encoded], dtype=np.int64)
    return {"text": np.frombuffer(b"".join(encoded), np.uint8), "ends": ends}


def unpack_documents(arrays: Arrays) -> tuple[str, ...]:
    """The documents in arrays of `pack_documents`.

    Raises:
        UnicodeDecodeError: The bytes are not the text they were.
    """
    text = arrays["text"].tobytes()
    places = pairwise([0, *arrays["ends"].tolist()])
    return tuple(text[start:end].decode() for start, end in places)


def convert_speeches(members: Members) -> Arrays:
    """State of the Union: one JSON file a speech, the years in order; presidents by name."""
    speeches = [json.loads(content) for _, content in sorted(members.items())]
    speeches.sort(key=lambda speech: int(speech["year"]))
    names = sorted({speech["name"] for speech in speeches})
    author = np.array([names.index(speech["name"]) for speech in speeches], np.int64)
    return pack_documents([speech["text"] for speech in speeches]) | {"client": author}


def convert_verses(members: Members) -> Arrays:
    """A Bible as a SWORD module (zText4, blocks by book): one verse an index entry.

    Index entries of headings hold no verse text; they stay as empty documents, so that two
    editions of one versification agree place by place.
    """
    by_file = {Path(name).name: content for name, content in members.items()}
    verses: list[str] = []
    for part in ("ot", "nt"):
        verses += _verses_of(*(by_file[f"{part}.{kind}"] for kind in ("bzs", "bzv", "bzz")))
    return pack_documents(verses)


def _verses_of(blocks: bytes, places: bytes, packed: bytes) -> list[str]:
    """`blocks`: (offset, size, unpacked size) each; `places`: (block, offset, size) of a verse."""
    spans = list(struct.iter_unpack("<III", blocks))
    unpacked: dict[int, bytes] = {}
    verses = []
    for block, start, size in struct.iter_unpack("<IIH", places):
        if size and block not in unpacked:
            offset, length, _ = spans[block]
            unpacked[block] = zlib.decompress(packed[offset : offset + length])
        raw = unpacked[block][start : start + size].decode(errors="replace") if size else ""
        verses.append(_plain(raw))
    return verses


def _plain(marked: str) -> str:
    text = html.unescape(_MARKUP.sub("", _NOTES.sub("", marked)))
    return _BLANKS.sub(" ", text).strip(" ¶")
