"""What is estimated of a device from the rounds it took part in: the twin's model.

The path of one part, on the hub's clock: asked, accepted after the letters' way there and back,
training once the base is there, opened when the first letter of the update came, received when
the update is whole. `twin.fitting` fits the same figures from a whole log at once, by medians;
here each part is learned from as it ends, and every figure knows how unsure it is.
"""

from collections.abc import Mapping
from typing import TypeVar

import msgspec

from twin.availability import Availability
from twin.calibration import Calibration
from twin.estimates import Chance, Estimate, learned

Value = TypeVar("Value")

LEAST_SHARE = 0.1
"""Of a transfer's time at least so much is its bytes', however long its letters took."""

IDLE_S = 120.0
"""A trainer's process that had nothing to do for so long has ended, and has to start again."""

SLACK = 1.05
"""A device's clock may run so much faster than the hub's before its word is not believed."""

MAX_FAMILIES = 16
"""A twin knows at most so many families of models: the last ones."""


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """What a part asks of a device.

    `epochs` and, if not 0, `max_samples` say how many samples its training sees. Bytes of 0
    ride within letters, and those of the update (`up_bytes`) are a guess until it is there.
    """

    family: str
    epochs: int
    deadline_s: float
    max_samples: int = 0
    down_bytes: int = 0
    up_bytes: int = 0

    def seen(self, samples: int) -> float:
        """How many samples training sees, with so many local ones."""
        wanted = float(self.epochs * samples)
        return min(wanted, float(self.max_samples)) if self.max_samples else wanted


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """A device's part in a round as far as it was seen; times are the hub's, None if not seen.

    `is_cold`: its trainer has to start first; None where nothing tells. `is_whole`: no link was
    lost meanwhile. `seconds` and `samples` are the device's own words, `status` the attempt's.
    """

    work: Work
    asked_at: float
    is_cold: bool | None = None
    is_whole: bool = True
    accepted_at: float | None = None
    training_at: float | None = None
    opened_at: float | None = None
    received_at: float | None = None
    up_bytes: int = 0
    samples: int = 0
    seconds: float = 0.0
    status: str = "assigned"

    @property
    def took_s(self) -> float | None:
        """From asking to receiving."""
        return None if self.received_at is None else self.received_at - self.asked_at


class TwinModel(msgspec.Struct, frozen=True, kw_only=True):
    """What a device is, as far as its rounds tell; what was never seen is None or absent.

    Goodputs are in bytes a second, delays one letter's way. `beside_s` is what a part takes beside
    its letters, transfers and training loop, `start_s` the same where the trainer had to start.
    `outcomes` counts how parts ended. `completes` is about those that came to an end of their
    own, `in_time` about all whose deadline was awaited. `was_restarted` says whether the device's
    program began anew since its last training; None where that cannot be told.
    """

    seconds_per_sample: dict[str, Estimate] = {}
    delay_s: Estimate | None = None
    down_bytes_per_s: Estimate | None = None
    up_bytes_per_s: Estimate | None = None
    beside_s: Estimate | None = None
    start_s: Estimate | None = None
    update_bytes: dict[str, int] = {}
    samples: int = 0
    memory_mb: int = 0
    availability: Availability = Availability()
    completes: Chance = Chance()
    in_time: Chance = Chance()
    outcomes: dict[str, int] = {}
    streak: int = 0
    last_trained_at: float | None = None
    was_restarted: bool | None = False
    calibration: Calibration = Calibration()


def learn(model: TwinModel, trial: Trial) -> TwinModel:
    """Gives the model after a part that came to its end with an update.

    What a device says of itself counts only where it fits between asking and receiving.
    """
    if trial.received_at is None or not is_believable(trial):
        return model
    model = _learn_link(model, trial)
    model = _learn_training(model, trial)
    return msgspec.structs.replace(
        model,
        samples=trial.samples or model.samples,
        update_bytes=newest(model.update_bytes, trial.work.family, trial.up_bytes),
        last_trained_at=trial.received_at,
        was_restarted=False,
    )


def counted(model: TwinModel, outcome: str, *, completed: bool | None) -> TwinModel:
    """Gives the model after a part ended so; `completed` is None where that says nothing."""
    outcomes = {**model.outcomes, outcome: model.outcomes.get(outcome, 0) + 1}
    if completed is None:
        return msgspec.structs.replace(model, outcomes=outcomes)
    return msgspec.structs.replace(
        model,
        outcomes=outcomes,
        completes=model.completes.after(completed),
        streak=model.streak + 1 if completed else 0,
    )


def is_believable(trial: Trial) -> bool:
    """Whether a device's words of its training can be true."""
    took_s = trial.took_s
    return took_s is not None and trial.samples >= 0 and 0.0 <= trial.seconds <= SLACK * took_s


def is_cold(model: TwinModel, asked_at: float) -> bool | None:
    """Whether a training asked for now must wait for its trainer's start; None: cannot be told."""
    if model.last_trained_at is None or asked_at - model.last_trained_at > IDLE_S:
        return True
    return model.was_restarted


def _learn_link(model: TwinModel, trial: Trial) -> TwinModel:
    accepted, training = trial.accepted_at, trial.training_at
    if not trial.is_whole:
        return model
    changed: dict[str, Estimate] = {}
    if accepted is not None:
        changed["delay_s"] = learned(model.delay_s, (accepted - trial.asked_at) / 2)
    delay = changed.get("delay_s", model.delay_s)
    letters_s = 2 * delay.next().median if delay is not None else 0.0
    if accepted is not None and training is not None and trial.work.down_bytes:
        rate = _goodput(trial.work.down_bytes, training - accepted, letters_s)
        if rate is not None:
            changed["down_bytes_per_s"] = learned(model.down_bytes_per_s, rate)
    if trial.opened_at is not None and trial.received_at is not None:
        rate = _goodput(trial.up_bytes, trial.received_at - trial.opened_at, letters_s)
        if rate is not None:
            changed["up_bytes_per_s"] = learned(model.up_bytes_per_s, rate)
    return msgspec.structs.replace(model, **changed)


def _goodput(size_bytes: int, lasted_s: float, letters_s: float) -> float | None:
    """Bytes a second beyond the letters' own way; None where nothing travelled by itself."""
    if lasted_s <= 0.0 or size_bytes <= 0:
        return None
    return size_bytes / max(lasted_s - letters_s, LEAST_SHARE * lasted_s)


def _learn_training(model: TwinModel, trial: Trial) -> TwinModel:
    seen = trial.work.seen(trial.samples)
    rates = model.seconds_per_sample
    if seen > 0 and trial.seconds > 0:
        family = trial.work.family
        rates = newest(rates, family, learned(rates.get(family), trial.seconds / seen))
    changed: dict[str, object] = {"seconds_per_sample": rates}
    beside_s = _beside_s(trial)
    if beside_s is not None and trial.is_cold is not None:
        name = "start_s" if trial.is_cold else "beside_s"
        changed[name] = learned(getattr(model, name), beside_s)
    return msgspec.structs.replace(model, **changed)


def _beside_s(trial: Trial) -> float | None:
    """What a part took beside letters, transfers and the training loop; None: not seen."""
    if not trial.is_whole or trial.training_at is None or trial.received_at is None:
        return None
    until = trial.received_at if trial.opened_at is None else trial.opened_at
    return max(until - trial.training_at - trial.seconds, 1e-3)


def newest(known: Mapping[str, Value], key: str, value: Value) -> dict[str, Value]:
    """The same with this entry, as the last one; the oldest go."""
    kept = {name: each for name, each in known.items() if name != key}
    return dict([*kept.items(), (key, value)][-MAX_FAMILIES:])
