"""The hub's tables. Exactly-once effect rests on their keys, not on the care of who writes.

One row a round by (run, number), one update an attempt and one a device and round, one chunk
by attempt and index. Reports, plans and the like are JSON text: they are read whole or not at
all, and text keeps what JSON columns of some databases refuse (NaN, NUL, integers of 64 bits).
"""

import json
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec
from sqlalchemy import (
    BigInteger,
    Dialect,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Text,
    TypeDecorator,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from cloud.config import RunPlan
from cloud.coordination.rounds import Status
from federation.protocol.messages import Capability, Report, Verdict
from twin.forecast import Forecast
from twin.model import Trial, TwinModel
from twin.shadow import Change, Shadow

Value = TypeVar("Value")


def _from_text(kind: type[Any], text: Any) -> Any:
    if issubclass(kind, Path):
        return kind(text)
    raise NotImplementedError(f"no way to read {kind.__name__} from the record")


class Document(TypeDecorator[Value], Generic[Value]):
    """A record of one kind as JSON text, read back as that kind."""

    impl = Text
    cache_ok = True

    def __init__(self, kind: type[Value]) -> None:
        super().__init__()
        self.kind = kind

    def process_bind_param(self, value: Value | None, dialect: Dialect) -> str | None:  # noqa: ARG002
        """The text of a record; floats keep every bit, NaN and infinity included."""
        return None if value is None else json.dumps(msgspec.to_builtins(value, enc_hook=str))

    def process_result_value(self, value: str | None, dialect: Dialect) -> Value | None:  # noqa: ARG002
        """The record in this text."""
        if value is None:
            return None
        return msgspec.convert(json.loads(value), self.kind, dec_hook=_from_text)


class Packed(Document[Value]):
    """A record as JSON text that has neither NaN nor infinity: several times faster."""

    cache_ok = True

    def process_bind_param(self, value: Value | None, dialect: Dialect) -> str | None:  # noqa: ARG002
        """The text of a record."""
        return None if value is None else msgspec.json.encode(value).decode()

    def process_result_value(self, value: str | None, dialect: Dialect) -> Value | None:  # noqa: ARG002
        """The record in this text."""
        return None if value is None else msgspec.json.decode(value, type=self.kind)


SERIAL = BigInteger().with_variant(Integer, "sqlite")
"""A key the database counts up; SQLite does so for INTEGER only."""


class Base(DeclarativeBase):
    """What all tables share: names for constraints, so that migrations can name them too."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {int: BigInteger, float: Double, str: Text, bytes: LargeBinary}  # noqa: RUF012


class Hub(Base):
    """The hub itself: one row."""

    __tablename__ = "hub"

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    epoch: Mapped[int]


class Device(Base):
    """A device that said its birth at least once."""

    __tablename__ = "devices"

    device: Mapped[str] = mapped_column(primary_key=True)
    epoch: Mapped[int]
    state: Mapped[str]
    capability: Mapped[Capability] = mapped_column(Document(Capability))
    born_at: Mapped[float]
    changed_at: Mapped[float]


class Model(Base):
    """A model file of the registry, by its digest."""

    __tablename__ = "models"

    digest: Mapped[str] = mapped_column(primary_key=True)
    size: Mapped[int]
    kind: Mapped[str]


class Run(Base):
    """One run: what was asked for, how it stands, what it waits for.

    `model` and `chunk_bytes` name its newest model. Bytes are counted from its beginning.
    """

    __tablename__ = "runs"

    id: Mapped[int] = mapped_column(SERIAL, primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    plan: Mapped[RunPlan] = mapped_column(Document(RunPlan))
    status: Mapped[str] = mapped_column(index=True)
    reason: Mapped[str]
    stop_requested: Mapped[bool]
    opened_at: Mapped[float | None]
    ended_at: Mapped[float | None]
    model: Mapped[str | None] = mapped_column(ForeignKey("models.digest"))
    chunk_bytes: Mapped[int | None]
    abandoned_in_a_row: Mapped[int]
    abandoned_at: Mapped[float | None]
    bytes_up: Mapped[int]
    bytes_down: Mapped[int]
    wait_name: Mapped[str]
    wait_reason: Mapped[str]
    wait_round: Mapped[int]
    wait_until: Mapped[float]
    wait_at: Mapped[float]


class MethodMemory(Base):
    """What the method of a run keeps at the hub from round to round, as encoded tensors."""

    __tablename__ = "method_memories"

    run: Mapped[str] = mapped_column(ForeignKey("runs.name"), primary_key=True)
    data: Mapped[bytes]


class Round(Base):
    """One round of a run; `model` is what came of it, `report` the sums of its devices."""

    __tablename__ = "rounds"

    run: Mapped[str] = mapped_column(ForeignKey("runs.name"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    status: Mapped[str]
    reason: Mapped[str]
    base: Mapped[str]
    deadline: Mapped[float]
    opened_at: Mapped[float]
    ended_at: Mapped[float | None]
    excluded: Mapped[dict[str, str]] = mapped_column(Document(dict[str, str]))
    model: Mapped[str | None] = mapped_column(ForeignKey("models.digest"))
    devices: Mapped[tuple[str, ...] | None] = mapped_column(Document(tuple[str, ...]))
    report: Mapped[Report | None] = mapped_column(Document(Report))
    bytes_up: Mapped[int | None]
    bytes_down: Mapped[int | None]


class Attempt(Base):
    """One device's part in a round; `verdict` is what it was told of its update."""

    __tablename__ = "attempts"
    __table_args__ = (
        ForeignKeyConstraint(["run", "round"], ["rounds.run", "rounds.number"]),
        Index(None, "run", "round"),
    )

    attempt: Mapped[str] = mapped_column(primary_key=True)
    run: Mapped[str]
    round: Mapped[int]
    device: Mapped[str]
    level: Mapped[int] = mapped_column(Integer)
    status: Mapped[Status] = mapped_column(Text)
    reason: Mapped[str]
    lost_at: Mapped[float]
    changed_at: Mapped[float]
    verdict: Mapped[Verdict | None] = mapped_column(Text)


class Upload(Base):
    """An update whose bytes are kept: on its way, or accepted and not yet aggregated."""

    __tablename__ = "uploads"

    attempt: Mapped[str] = mapped_column(ForeignKey("attempts.attempt"), primary_key=True)
    digest: Mapped[str]
    size: Mapped[int]
    chunk_bytes: Mapped[int]
    report: Mapped[Report] = mapped_column(Document(Report))


class Chunk(Base):
    """One chunk of an upload.

    The key is the attempt's, not the content's: a device that sends other bytes under the
    digest of its neighbour's update harms its own only.
    """

    __tablename__ = "chunks"

    attempt: Mapped[str] = mapped_column(
        ForeignKey("uploads.attempt", ondelete="CASCADE"), primary_key=True
    )
    index: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    data: Mapped[bytes]


class Update(Base):
    """An update that counts, once; `counts_in` is the round it is added to."""

    __tablename__ = "updates"
    __table_args__ = (UniqueConstraint("run", "round", "device"), Index(None, "run", "counts_in"))

    attempt: Mapped[str] = mapped_column(ForeignKey("attempts.attempt"), primary_key=True)
    run: Mapped[str]
    round: Mapped[int]
    device: Mapped[str]
    digest: Mapped[str]
    size: Mapped[int]
    report: Mapped[Report] = mapped_column(Document(Report))
    counts_in: Mapped[int]
    at: Mapped[float]


class Release(Base):
    """A model exported for inference."""

    __tablename__ = "releases"

    run: Mapped[str] = mapped_column(ForeignKey("runs.name"), primary_key=True)
    round: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    digest: Mapped[str] = mapped_column(ForeignKey("models.digest"))
    size: Mapped[int]
    chunk_bytes: Mapped[int]
    labels: Mapped[tuple[str, ...]] = mapped_column(Document(tuple[str, ...]))
    at: Mapped[float]


class Evaluation(Base):
    """What a model was measured to be: sums over samples, as in a report."""

    __tablename__ = "evaluations"

    run: Mapped[str] = mapped_column(ForeignKey("runs.name"), primary_key=True)
    round: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    name: Mapped[str] = mapped_column(primary_key=True)
    correct: Mapped[int]
    loss_sum: Mapped[float | None]
    samples: Mapped[int]


class Event(Base):
    """The log: every fact but chunks, in the order of recording. Rows are only ever added."""

    __tablename__ = "events"
    __table_args__ = (Index(None, "run", "id"),)

    id: Mapped[int] = mapped_column(SERIAL, primary_key=True)
    at: Mapped[float]
    kind: Mapped[str]
    run: Mapped[str]
    round: Mapped[int]
    device: Mapped[str]
    detail: Mapped[dict[str, Any]] = mapped_column(Document(dict[str, Any]))


class Twin(Base):
    """The twin of a device: its shadow as it is now, and what is estimated of it.

    `desired_version` repeats the shadow's, for a hub that looks for whom it has wishes.
    """

    __tablename__ = "twins"

    device: Mapped[str] = mapped_column(primary_key=True)
    revision: Mapped[int]
    desired_version: Mapped[int] = mapped_column(index=True)
    modified_at: Mapped[float]
    shadow: Mapped[Shadow] = mapped_column(Packed(Shadow))
    model: Mapped[TwinModel] = mapped_column(Packed(TwinModel))


class TwinChange(Base):
    """One revision of a shadow: what was changed, by whom, and why."""

    __tablename__ = "twin_changes"

    device: Mapped[str] = mapped_column(ForeignKey("twins.device"), primary_key=True)
    revision: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    received_at: Mapped[float]
    change: Mapped[Change] = mapped_column(Packed(Change))


class TwinSnapshot(Base):
    """A shadow as it once was, whole: where a look into the past begins."""

    __tablename__ = "twin_snapshots"

    device: Mapped[str] = mapped_column(ForeignKey("twins.device"), primary_key=True)
    revision: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    received_at: Mapped[float]
    shadow: Mapped[Shadow] = mapped_column(Packed(Shadow))


class TwinForecast(Base):
    """What a twin said of a device's part in a round as it opened, and what came of it.

    `outcome` is None while the part is open; `trial` has the moments seen so far.
    """

    __tablename__ = "twin_forecasts"
    __table_args__ = (Index(None, "device", "asked_at"),)

    run: Mapped[str] = mapped_column(primary_key=True)
    round: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    device: Mapped[str] = mapped_column(primary_key=True)
    asked_at: Mapped[float]
    outcome: Mapped[str | None] = mapped_column(index=True)
    trial: Mapped[Trial] = mapped_column(Packed(Trial))
    forecast: Mapped[Forecast | None] = mapped_column(Packed(Forecast))


class TwinFollowing(Base):
    """How far the twins have followed the log, and what is estimated of the fleet: one row."""

    __tablename__ = "twin_following"

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    event: Mapped[int]
    fleet: Mapped[TwinModel] = mapped_column(Packed(TwinModel))
