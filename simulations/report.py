"""What a simulation came to: a row a round, the event log, and the files it all goes into."""

import importlib.metadata
import platform
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeAlias

import msgspec

from cloud.config import RunPlan
from cloud.coordination.facts import (
    AttemptChanged,
    ChunkStored,
    HubFact,
    LetterRefused,
    RoundAbandoned,
    RoundClosed,
    RoundOpened,
    RunEnded,
    UpdateAccepted,
    UpdateRefused,
)
from cloud.record.events import event_of
from federation.errors import ConfigError
from federation.learning.data import LocalData
from federation.protocol import codec
from federation.protocol.messages import ModelSpec

LAST_ROUNDS = 10
"""What a run came to is read from so many rounds at its end."""


Remember: TypeAlias = Callable[[str, Callable[[], bytes]], bytes]
"""The value of a key, made only if it is not known."""


def at_once(_key: str, make: Callable[[], bytes]) -> bytes:
    """Remembers nothing."""
    return make()


class Drop(msgspec.Struct, frozen=True, kw_only=True):
    """A device that was asked and whose update does not count in this round, and why."""

    device: str
    status: str
    reason: str = ""


class RoundResult(msgspec.Struct, frozen=True, kw_only=True):
    """One round. Times are virtual seconds; bytes are those of models and updates.

    `energy_j` and `train_s` are what the devices that were asked have spent on it.

    `interruptions` counts the times that a device which had been asked was lost, whether or
    not it came back in time. `accuracy` and `loss` are those of the new model on the held-out
    data, the loss in nats; both are None for a round that gave no model.
    """

    round: int
    status: str
    opened_s: float
    closed_s: float
    asked: int
    not_asked: dict[str, int]
    devices: tuple[str, ...] = ()
    dropped: tuple[Drop, ...] = ()
    interruptions: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    training_loss: float | None = None
    accuracy: float | None = None
    loss: float | None = None
    energy_j: float = 0.0
    train_s: float = 0.0


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """All of a simulation that is worth keeping; the same scenario and seed give the same.

    `updates` counts accepted updates, `refused` the others by verdict, `letters_refused` the
    letters that were not acted upon. `wire_up_bytes` and `wire_down_bytes` are all topics and
    payloads between devices and broker. `model_sha256` names the final weights.
    """

    status: str
    reason: str
    seed: int
    virtual_s: float
    rounds: tuple[RoundResult, ...]
    accuracy: float | None
    initial_accuracy: float
    updates: int
    refused: dict[str, int]
    letters_refused: int
    drop_reasons: dict[str, int]
    bytes_up: int
    bytes_down: int
    wire_up_bytes: int
    wire_down_bytes: int
    model_sha256: str
    run: RunPlan
    versions: dict[str, str]


class Ledger:
    """Watches the facts of one run and keeps the account; `log` takes the event log's lines.

    `spent` tells what the devices of the round that is closing took, in joules and seconds.

    Each new model is measured on the held-out data when its round closes.
    """

    def __init__(
        self,
        plan: RunPlan,
        held_out: LocalData,
        *,
        log: IO[bytes] | None = None,
        on_round: Callable[[RoundResult], None] | None = None,
        spent: Callable[[], tuple[float, float]] = lambda: (0.0, 0.0),
        remember: Remember = at_once,
    ) -> None:
        self._spent, self._remember = spent, remember
        self.rounds: list[RoundResult] = []
        self.updates = self.letters_refused = 0
        self.refused: Counter[str] = Counter()
        self.bytes_up = self.bytes_down = 0
        self._spec = ModelSpec(name=plan.model.name, sizes=plan.model.sizes)
        self._held_out = held_out
        self._log, self._on_round = log, on_round
        self._opened: RoundOpened | None = None
        self._fates: dict[str, AttemptChanged] = {}
        self._interruptions = 0

    def observe(self, fact: HubFact) -> None:
        """Take one recorded fact in."""
        if self._log is not None and not isinstance(fact, ChunkStored):
            self._log.write(msgspec.json.encode(event_of(fact)) + b"\n")
        match fact:
            case RoundOpened():
                self._opened, self._fates, self._interruptions = fact, {}, 0
            case AttemptChanged():
                self._fates[fact.device] = fact
                self._interruptions += fact.status == "lost"
            case UpdateAccepted():
                self.updates += 1
            case UpdateRefused():
                self.refused[fact.verdict] += 1
            case LetterRefused():
                self.letters_refused += 1
            case RoundClosed():
                self._close(fact)
            case RoundAbandoned() if self._opened is not None and self._opened.round == fact.round:
                self._add(self._row(self._opened, "abandoned", fact.at, ()))
            case _:
                pass

    def accuracy_of(self, model: bytes) -> tuple[float, float]:
        """Accuracy (0 to 1) and mean loss (nats) of encoded weights on the held-out data."""
        from federation.learning.evaluation import evaluate

        def measure() -> bytes:
            tally = evaluate(self._spec, codec.decode(model), self._held_out)
            return msgspec.json.encode((tally.accuracy, tally.mean_loss))

        found = self._remember(f"accuracy of {codec.digest_of(model)}", measure)
        return msgspec.json.decode(found, type=tuple[float, float])

    def _close(self, fact: RoundClosed) -> None:
        if self._opened is None:
            return
        accuracy, loss = self.accuracy_of(fact.model)
        row = self._row(self._opened, "closed", fact.at, fact.devices)
        up, down = fact.bytes_up - self.bytes_up, fact.bytes_down - self.bytes_down
        self.bytes_up, self.bytes_down = fact.bytes_up, fact.bytes_down
        samples = fact.report.samples
        self._add(
            msgspec.structs.replace(
                row,
                bytes_up=up,
                bytes_down=down,
                training_loss=fact.report.loss_sum / samples if samples else None,
                accuracy=accuracy,
                loss=loss,
            )
        )

    def _row(
        self, opened: RoundOpened, status: str, at: float, devices: tuple[str, ...]
    ) -> RoundResult:
        energy_j, train_s = self._spent()
        missing = sorted({entry.device for entry in opened.attempts} - set(devices))
        return RoundResult(
            round=opened.round,
            status=status,
            opened_s=opened.at,
            closed_s=at,
            asked=len(opened.attempts),
            not_asked=dict(Counter(opened.excluded.values()) + Counter(opened.unnamed)),
            devices=devices,
            dropped=tuple(self._drop(device) for device in missing),
            interruptions=self._interruptions,
            energy_j=energy_j,
            train_s=train_s,
        )

    def _drop(self, device: str) -> Drop:
        fate = self._fates.get(device)
        if fate is None:
            return Drop(device=device, status="assigned", reason="never answered")
        return Drop(device=device, status=fate.status, reason=fate.reason)

    def _add(self, row: RoundResult) -> None:
        self._opened = None
        self.rounds.append(row)
        if self._on_round is not None:
            self._on_round(row)


def last_accuracies(rounds: Sequence[RoundResult], last: int = LAST_ROUNDS) -> list[float]:
    """The accuracies of the last rounds that gave a model, at most so many."""
    return [row.accuracy for row in rounds if row.accuracy is not None][-last:]


def mean_accuracy(rounds: Sequence[RoundResult], last: int = LAST_ROUNDS) -> float | None:
    """Their mean: steadier than the last round alone. None where no round gave a model."""
    accuracies = last_accuracies(rounds, last)
    return statistics.fmean(accuracies) if accuracies else None


def jitter(rounds: Sequence[RoundResult], last: int = LAST_ROUNDS) -> float | None:
    """Their standard deviation: how much it matters when training is stopped. None as above."""
    accuracies = last_accuracies(rounds, last)
    return statistics.pstdev(accuracies) if accuracies else None


def drop_reasons(rounds: list[RoundResult]) -> dict[str, int]:
    """How often each reason kept an update out, the commonest first."""
    reasons: Counter[str] = Counter()
    for row in rounds:
        for drop in row.dropped:
            reason = drop.reason.replace(f"round {row.round} ", "its round ")
            reasons[f"{drop.status}: {reason}" if reason else drop.status] += 1
    return dict(reasons.most_common())


def versions() -> dict[str, str]:
    """The versions that may decide a bit."""
    names = ("headwater", "numpy", "torch", "msgspec", "safetensors")
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in names
    }


def outcome_of(ended: RunEnded | None) -> tuple[str, str]:
    """Status and reason of a run; one that has not ended is unfinished."""
    return (ended.status, ended.reason) if ended else ("unfinished", "the time limit was reached")


def write_result(result: Result, folder: Path) -> None:
    """Write `result.json` and `curves.png`.

    Raises:
        ConfigError: the folder cannot be written to.
    """
    try:
        (folder / "result.json").write_bytes(as_json(result))
        plot_curves(result, folder / "curves.png")
    except OSError as error:
        raise ConfigError(
            f"cannot write to {folder}: {error.strerror}; give another folder with --out"
        ) from error


def plot_curves(result: Result, path: Path) -> None:
    """Draw accuracy and participation by round."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True)
    closed = [row for row in result.rounds if row.accuracy is not None]
    above.plot(
        [0, *(row.round for row in closed)],
        [result.initial_accuracy, *(row.accuracy for row in closed)],
        marker=".",
    )
    above.set_ylabel("accuracy on held-out data")
    above.grid(visible=True, alpha=0.3)
    numbers = [row.round for row in result.rounds]
    below.bar(numbers, [row.asked for row in result.rounds], color="lightgrey", label="asked")
    below.bar(numbers, [len(row.devices) for row in result.rounds], label="counted")
    below.set_xlabel("round")
    below.set_ylabel("devices")
    below.legend()
    figure.suptitle(f"{result.run.name}: {result.run.method.name}, {result.status}")
    figure.savefig(path, dpi=120)


def as_json(value: object) -> bytes:
    """A record as indented JSON, which ends its last line."""
    text = msgspec.json.encode(value, enc_hook=_path_to_text)
    return msgspec.json.format(text, indent=1) + b"\n"


def as_builtins(result: msgspec.Struct) -> Mapping[str, Any]:
    """The result as plain dictionaries and lists, as its JSON file holds them."""
    built: Mapping[str, Any] = msgspec.to_builtins(result, enc_hook=_path_to_text)
    return built


def _path_to_text(value: Any) -> str:
    if isinstance(value, Path):
        return str(value)
    raise NotImplementedError(f"cannot write a {type(value).__name__}")
