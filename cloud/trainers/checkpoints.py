"""A training on disk: all its state after some step, written whole or not at all."""

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from federation.errors import StoreError

_NAME = re.compile(r"step-(\d{10})\.safetensors")
_FACTS = "headwater"
KEPT = 2
"""So many of the newest checkpoints stay: one that was cut by the end of a disk has a successor."""


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What a checkpoint is of: the plan's digest, the step, and what the loop had summed up."""

    plan: str
    step: int
    seconds: float = 0.0
    notes: dict[str, float] = {}


@dataclass(frozen=True, slots=True, eq=False)
class Moment:
    """All state of a training after step `facts.step`."""

    facts: Facts
    tensors: Mapping[str, Tensor]


class Checkpoints:
    """The checkpoints of one training, in a folder of their own."""

    def __init__(self, folder: Path, plan: str) -> None:
        self._folder, self._plan = folder, plan

    def save(self, step: int, tensors: Mapping[str, Tensor], **notes: float) -> Path:
        """Keep this state, through a power cut too; older ones than the newest two go.

        Raises:
            StoreError: the folder cannot be written to, or the disk is full.
        """
        seconds = notes.pop("seconds", 0.0)
        facts = Facts(plan=self._plan, step=step, seconds=seconds, notes=notes)
        content = save(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            metadata={_FACTS: msgspec.json.encode(facts).decode()},
        )
        path = self._folder / f"step-{step:010d}.safetensors"
        part = path.with_suffix(".part")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
            for old in self._steps()[:-KEPT]:
                self._path(old).unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(
                f"cannot keep a checkpoint in {self._folder} ({error.strerror}); expected a folder "
                "that may be written to, on a disk with room: free some or choose another"
            ) from error
        return path

    def newest(self) -> Moment | None:
        """The newest whole checkpoint; None where there is none. Damaged ones are passed over.

        Raises:
            StoreError: it is of another plan.
        """
        for step in reversed(self._steps()):
            moment = self._read(self._path(step))
            if moment is None:
                continue
            if moment.facts.plan != self._plan:
                raise StoreError(
                    f"{self._folder} holds checkpoints of another plan; expected those of this "
                    "one: choose another folder, or delete them to begin anew"
                )
            return moment
        return None

    def clear(self) -> None:
        """Forget them all: the training is over."""
        for step in self._steps():
            self._path(step).unlink(missing_ok=True)

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step:010d}.safetensors"

    def _steps(self) -> list[int]:
        if not self._folder.is_dir():
            return []
        found = (_NAME.fullmatch(path.name) for path in self._folder.iterdir())
        return sorted(int(match.group(1)) for match in found if match)

    @staticmethod
    def _read(path: Path) -> Moment | None:
        try:
            with safe_open(path, framework="pt") as file:
                facts = msgspec.json.decode((file.metadata() or {})[_FACTS], type=Facts)
                return Moment(facts, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, msgspec.MsgspecError):
            return None


def digest_of(plan: msgspec.Struct) -> str:
    """What tells one plan from another: the SHA-256 of its JSON."""
    return hashlib.sha256(msgspec.json.encode(plan, enc_hook=str)).hexdigest()
