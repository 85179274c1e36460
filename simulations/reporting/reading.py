"""What a run left in its folder, read with care: it may be old, cut off, or not ours at all.

Only what a page shows is read, so that results of other versions can be shown too. A run must
have `result.json`; `attempts.csv` and `fleet.npy` may be missing, and what needs them is then
left out, which `Run.left_out` says.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from federation.errors import ConfigError, DataError
from simulations.reporting import attempts
from simulations.reporting.attempts import DeviceAccount, accounts_without_file, read_accounts

RESULT = "result.json"
FLEET = "fleet.npy"
FLEET_CODES = 5
"""How many states a device has in a round: off, idle, counted, lost, and asked in vain."""

Amount = Annotated[float, msgspec.Meta(ge=0.0, le=1e18)]
Count = Annotated[int, msgspec.Meta(ge=0, le=10**15)]
Share = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]


class LostUpdate(msgspec.Struct, frozen=True):
    """A device that was asked and whose update does not count, and why."""

    device: str
    status: str
    reason: str = ""


class RoundRow(msgspec.Struct, frozen=True, kw_only=True):
    """A round of `simulations.report.RoundResult`; what older results lack is None."""

    round: Annotated[int, msgspec.Meta(ge=1, le=10**9)]
    status: str
    opened_s: Amount
    closed_s: Amount
    asked: Count
    not_asked: dict[str, Count] = {}
    devices: tuple[str, ...] = ()
    dropped: tuple[LostUpdate, ...] = ()
    interruptions: Count = 0
    bytes_up: Count = 0
    bytes_down: Count = 0
    accuracy: Share | None = None
    loss: Amount | None = None
    energy_j: Amount | None = None
    train_s: Amount | None = None


class RunFile(msgspec.Struct, frozen=True, kw_only=True):
    """What a page needs of `simulations.report.Result`."""

    status: str
    reason: str
    seed: int
    virtual_s: Amount
    rounds: tuple[RoundRow, ...]
    accuracy: Share | None
    initial_accuracy: Share
    refused: dict[str, Count]
    letters_refused: Count
    drop_reasons: dict[str, Count]
    bytes_up: Count
    bytes_down: Count
    wire_up_bytes: Count
    wire_down_bytes: Count
    model_sha256: str
    run: dict[str, Any]
    versions: dict[str, str]

    @property
    def name(self) -> str:
        """What the run is called."""
        return str(self.run.get("name", "without a name"))

    @property
    def method(self) -> str:
        """Which method it ran."""
        method = self.run.get("method")
        return str(method.get("name", "")) if isinstance(method, dict) else ""


@dataclass(frozen=True, slots=True)
class Run:
    """A run's folder.

    `accounts` has each device that was asked, `fleet` the state of each of the first devices in
    each round, (rounds, devices), or is None. `left_out` says what could not be read, and why.
    """

    folder: Path
    result: RunFile
    accounts: list[DeviceAccount]
    fleet: NDArray[np.uint8] | None
    left_out: tuple[str, ...]


def read_run(folder: Path) -> Run:
    """Read a run's folder.

    Raises:
        ConfigError: it is no folder of a run, or its result is not one that can be shown.
    """
    result = _result(folder)
    left_out: list[str] = []
    counted = {row.round: frozenset(row.devices) for row in result.rounds}
    try:
        accounts = read_accounts(_present(folder / attempts.NAME), counted)
    except DataError as error:
        left_out.append(f"energy, bytes and seconds of each device: {error}")
        dropped = ((row.round, drop.device) for row in result.rounds for drop in row.dropped)
        accounts = accounts_without_file(counted, dropped)
    fleet = None
    try:
        fleet = _fleet(_present(folder / FLEET), len(result.rounds))
    except DataError as error:
        left_out.append(f"who was available: {error}")
    return Run(folder, result, accounts, fleet, tuple(left_out))


def _result(folder: Path) -> RunFile:
    if (folder / "comparison.json").is_file():
        raise ConfigError(
            f"{folder} holds a comparison; give one or two of the runs' folders in it, "
            "such as VARIANT/seed-0"
        )
    try:
        text = (folder / RESULT).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            f"{folder} is no folder of a run: it has no {RESULT}; "
            "give what was --out of headwater-sim run"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"cannot read {folder / RESULT}: {error.strerror}; correct its permissions"
        ) from error
    try:
        result = msgspec.json.decode(text, type=RunFile)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(_refusal(folder / RESULT, text, error)) from error
    numbers = [row.round for row in result.rounds]
    if any(later <= earlier for earlier, later in itertools.pairwise(numbers)):
        raise ConfigError(
            f"{folder / RESULT} is damaged: its rounds do not rise; run the scenario again"
        )
    return result


def _refusal(path: Path, text: bytes, error: Exception) -> str:
    """What to say of a result that cannot be decoded."""
    try:
        whole = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return f"{path} is damaged: {error}; run the scenario again"
    if isinstance(whole, dict) and "matrix" in whole and "rule" in whole:
        return (
            f"{path} is of peers without a hub; reports are of runs with one: "
            "give a folder of headwater-sim run"
        )
    return f"{path} is the result of another version: {error}; run the scenario again with this one"


def _present(path: Path) -> Path:
    if not path.is_file():
        raise DataError(f"there is no {path.name} in the run's folder")
    return path


def _fleet(path: Path, rounds: int) -> NDArray[np.uint8]:
    """The states of devices; mapped into memory, so that a header cannot ask for more than is."""
    try:
        table = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        raise DataError(f"{FLEET} is damaged; run the scenario again") from error
    if not isinstance(table, np.ndarray) or table.dtype != np.uint8 or table.ndim != 2:
        raise DataError(f"{FLEET} is no table of bytes; run the scenario again")
    states = np.array(table)
    if not states.size or states.max() >= FLEET_CODES:
        raise DataError(f"{FLEET} is empty or of another version; run the scenario again")
    if len(states) != rounds:
        raise DataError(
            f"{FLEET} has {len(states)} rounds and {RESULT} has {rounds}; run the scenario again"
        )
    return states
