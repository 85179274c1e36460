"""What a workshop's process and its workers say to each other, in bytes."""

from collections.abc import Sequence

import msgspec

from federation.protocol.effects import Trained
from federation.protocol.messages import Assignment, Report
from simulations.workshop.job import Job


class _Line(msgspec.Struct, frozen=True):
    """One job of an order; `base` is an index into the bases that travel with it."""

    place: int
    device: str
    assignment: Assignment
    base: int


class _Outcome(msgspec.Struct, frozen=True):
    attempt: str
    report: Report
    failure: str


_ORDER = msgspec.msgpack.Decoder(list[_Line])
_ANSWER = msgspec.msgpack.Decoder(list[_Outcome])


def bases_of(cohort: Sequence[Job]) -> list[bytes]:
    """The bases of a cohort, each object once."""
    return list({id(job.base): job.base for job in cohort}.values())


def pack_order(cohort: Sequence[Job]) -> list[bytes]:
    """A cohort without its bases: what is to be done, then each job's memory."""
    index = {id(base): place for place, base in enumerate(bases_of(cohort))}
    lines = [
        _Line(
            job.place,
            job.device,
            # The base travels beside the order, once.
            msgspec.structs.replace(job.assignment, inline=None),
            index[id(job.base)],
        )
        for job in cohort
    ]
    return [msgspec.msgpack.encode(lines), *(job.memory for job in cohort)]


def unpack_order(parts: Sequence[bytes], bases: Sequence[bytes]) -> list[Job]:
    """The cohort again; jobs of one base hold the same object."""
    lines = _ORDER.decode(parts[0])
    return [
        Job(line.place, line.device, line.assignment, bases[line.base], memory)
        for line, memory in zip(lines, parts[1:], strict=True)
    ]


def pack_answer(results: Sequence[Trained]) -> list[bytes]:
    """What came of a cohort: first the reports, then each update and memory."""
    outcomes = [_Outcome(one.attempt, one.report, one.failure) for one in results]
    blobs = [blob for one in results for blob in (one.update, one.memory)]
    return [msgspec.msgpack.encode(outcomes), *blobs]


def unpack_answer(parts: Sequence[bytes]) -> list[Trained]:
    """What came of a cohort, again."""
    outcomes = _ANSWER.decode(parts[0])
    blobs = zip(parts[1::2], parts[2::2], strict=True)
    return [
        Trained(one.attempt, update=update, report=one.report, failure=one.failure, memory=memory)
        for one, (update, memory) in zip(outcomes, blobs, strict=True)
    ]
