"""A learned Q in one file: safetensors, with what it is for in the header. Nothing is unpickled."""

import json
from pathlib import Path

import msgspec
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from federation.errors import StoreError
from optimizer.observation import LADDER
from optimizer.qlearning import LinearValues, TableValues

_FORMAT = "headwater-q/1"
_TENSORS = {
    "linear": ("gram_PFF", "moment_PF", "weights_PF"),
    "table": ("costs_SP", "seen_SP"),
}


class _Header(msgspec.Struct, frozen=True):
    """What a learned Q is for."""

    format: str = ""
    ladder: list[list[float]] = []
    students: tuple[str, ...] = ()
    kind: str = ""
    rate: float = 0.0


def save_values(values: LinearValues | TableValues, students: tuple[str, ...], path: Path) -> None:
    """Write a Q-function, and the students' names in the order it knows them by.

    Raises:
        StoreError: the file cannot be written.
    """
    kind = "linear" if isinstance(values, LinearValues) else "table"
    rate = values.forgetting if isinstance(values, LinearValues) else values.slowest_rate
    header = {"format": _FORMAT, "kind": kind, "rate": rate, "ladder": LADDER, "students": students}
    tensors = {name: np.ascontiguousarray(getattr(values, name)) for name in _TENSORS[kind]}
    aside = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, aside, metadata={"headwater": json.dumps(header)})
        aside.replace(path)
    except OSError as error:
        raise StoreError(f"{path}: cannot be written ({error}); choose another place") from error


def load_values(path: Path, students: tuple[str, ...]) -> LinearValues | TableValues:
    """Read a Q-function for planning with these students, by name and in this order.

    Raises:
        StoreError: no such file, another format, damaged tensors, or other students.
    """
    try:
        with safe_open(path, framework="numpy") as opened:
            said = (opened.metadata() or {}).get("headwater", "{}")
            header = msgspec.json.decode(said, type=_Header)
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError, ValueError, msgspec.MsgspecError) as error:
        raise StoreError(f"{path}: not a learned Q ({error}); train one and save it") from error
    if header.format != _FORMAT or header.ladder != [list(rung) for rung in LADDER]:
        raise StoreError(f"{path}: a learned Q of another format; train it again")
    if header.students != students:
        raise StoreError(
            f"{path}: learned for students {', '.join(header.students)}; asked for "
            f"{', '.join(students)}: train one for these"
        )
    kind, rate = header.kind, header.rate
    pairs = 2 * len(students) + 1
    blank = LinearValues.blank(pairs) if kind == "linear" else TableValues.blank(pairs)
    for name in _TENSORS.get(kind, ("kind",)):
        wanted = getattr(blank, name, np.zeros(0)).shape
        if name not in tensors or tensors[name].shape != wanted:
            raise StoreError(f"{path}: {name} is not there or not of shape {wanted}; train again")
        if not np.isfinite(tensors[name]).all():
            raise StoreError(f"{path}: {name} holds numbers that are not finite; train again")
    if isinstance(blank, LinearValues):
        return LinearValues(**tensors, forgetting=rate)
    return TableValues(**tensors, slowest_rate=rate)
