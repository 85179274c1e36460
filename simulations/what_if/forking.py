"""A fork of the twins: all that a question needs of them, frozen, with where it is from."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from cloud.twins.judging import family_of
from cloud.twins.store import TwinRow
from federation.errors import ConfigError
from simulations.what_if.plan import Change, WhatIf, named
from twin.estimates import Estimate, LogNormal
from twin.model import TwinModel


class Twin(msgspec.Struct, frozen=True, kw_only=True):
    """One device in a fork: what its twin says, the fleet's figures where it never saw any.

    Times in seconds, goodputs in bytes a second. `completes` is the probability that a part it
    begins is completed, while it is there.
    """

    device: str
    revision: int
    level: int
    samples: int
    sample_s: LogNormal
    beside_s: LogNormal
    delay_s: LogNormal
    up_bytes_per_s: LogNormal | None
    down_bytes_per_s: LogNormal | None
    completes: float
    model: TwinModel


class Fork(msgspec.Struct, frozen=True, kw_only=True):
    """Twins as they were at one time. `left_out` says which cannot be simulated, and why.

    `event` is how far the hub's log was folded into them.
    """

    at: float
    event: int
    twins: tuple[Twin, ...]
    left_out: dict[str, str] = {}


def fork(
    rows: Iterable[TwinRow], fleet: TwinModel, question: WhatIf, *, at: float, event: int
) -> Fork:
    """The twins that a question is about, with its changes made.

    Raises:
        ConfigError: devices that have no twin, or none that ever trained such a model.
    """
    found = {row.shadow.device: row for row in rows}
    if unknown := sorted(named(question) - found.keys()):
        raise ConfigError(
            f"the question names {unknown[0]!r}, of which there is no twin; there are "
            f"{', '.join(sorted(found)[:8]) or 'none'}: correct the name"
        )
    twins, left_out = [], {}
    for device, row in sorted(found.items()):
        if device in question.without:
            continue
        twin = _twin(row, fleet, question)
        if isinstance(twin, str):
            left_out[device] = twin
            continue
        twins.append(changed(twin, question.change))
    if not twins:
        raise ConfigError(
            f"no twin can train model {question.run.model.name!r}: "
            f"{next(iter(left_out.values()), 'there are no twins')}; let a real round or two close "
            "first, or ask about a model that was trained before"
        )
    return Fork(at=at, event=event, twins=_copies(twins, question.copies), left_out=left_out)


def changed(twin: Twin, changes: Iterable[Change]) -> Twin:
    """The twin with these changes, one after the other."""
    for change in changes:
        if change.devices and twin.device not in change.devices:
            continue
        up, down = twin.up_bytes_per_s, twin.down_bytes_per_s
        twin = msgspec.structs.replace(
            twin,
            sample_s=twin.sample_s.times(1.0 / change.compute),
            delay_s=twin.delay_s.times(change.delay),
            up_bytes_per_s=None if up is None else up.times(change.up),
            down_bytes_per_s=None if down is None else down.times(change.down),
        )
    return twin


def save_fork(made: Fork, path: Path) -> None:
    """Keep a fork, so that the same question can be asked of the same twins again."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(made), indent=1) + b"\n")


def load_fork(path: Path) -> Fork:
    """A fork that was kept.

    Raises:
        ConfigError: no such file, or no fork in it.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=Fork)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} is no fork of twins ({error}); expected a file that what-if wrote: check it"
        ) from error


def _twin(row: TwinRow, fleet: TwinModel, question: WhatIf) -> Twin | str:
    """What a fork keeps of a twin, or why it cannot be simulated."""
    own, hardware = row.model, row.shadow.reported.state.get("hardware", {})
    if hardware.get("trains") is False:
        return "it only infers"
    family = family_of(question.run, row.shadow)
    rate = _either(own.seconds_per_sample.get(family), fleet.seconds_per_sample.get(family))
    samples = own.samples or fleet.samples
    if rate is None or not samples:
        return f"neither it nor any other device trained {family}"
    nothing = LogNormal(mu=-20.0, sigma=0.0)
    return Twin(
        device=row.shadow.device,
        revision=row.shadow.revision,
        level=int(hardware.get("level", 0)),
        samples=samples,
        sample_s=rate,
        beside_s=_either(own.beside_s, fleet.beside_s) or nothing,
        delay_s=_either(own.delay_s, fleet.delay_s) or nothing,
        up_bytes_per_s=_either(own.up_bytes_per_s, fleet.up_bytes_per_s),
        down_bytes_per_s=_either(own.down_bytes_per_s, fleet.down_bytes_per_s),
        completes=own.completes.mean(fleet.completes.mean(0.95)),
        model=own,
    )


def _either(own: Estimate | None, fleet: Estimate | None) -> LogNormal | None:
    known = own or fleet
    return None if known is None else known.next()


def _copies(twins: list[Twin], copies: int) -> tuple[Twin, ...]:
    if copies == 1:
        return tuple(twins)
    return tuple(
        msgspec.structs.replace(twin, device=f"{twin.device}.{number}")
        for twin in twins
        for number in range(1, copies + 1)
    )


def revisions(made: Fork) -> Mapping[str, int]:
    """Which revision of each device's twin was forked."""
    return {twin.device: twin.revision for twin in made.twins}
