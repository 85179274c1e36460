"""What a part in a round asks of a device, and what its end teaches the twin and the fleet's."""

import msgspec

from cloud.config import RunPlan
from federation.protocol.messages import INLINE_BYTES
from twin.calibration import judged_bytes, judged_chance, judged_time, judged_unfinished
from twin.estimates import beyond
from twin.forecast import Forecast
from twin.model import Trial, TwinModel, Work, counted, is_believable, learn
from twin.shadow import Shadow

BASE_RATE_WORTH = 2.0
"""Before the first parts ended, the base rate is a half, worth so many parts."""

LONGER = 1.5
"""A part that was given up would have taken longer by at least this factor, so it is guessed."""

_COMPLETED = {"received": True, "late": None, "spared": None}
"""Whether such an end says that a device completes what it begins; any other says it does not."""


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """A device's part in a round: what was seen and forecast; `outcome` is None while it is open.

    It ends `received`, `late` (the deadline passed), `silent` (so it did, without a word),
    `spared` (the round closed before it), `lost`, `declined`, `failed` or `refused`.
    """

    trial: Trial
    forecast: Forecast | None
    outcome: str | None = None


def family_of(plan: RunPlan, shadow: Shadow) -> str:
    """The model that a device trains in a run, as one word: name, sizes and the device's level."""
    sizes = ",".join(f"{name}={size}" for name, size in sorted(plan.model.sizes.items()))
    level = shadow.reported.state.get("hardware", {}).get("level", 0)
    return f"{plan.model.name}({sizes})" + (f"@{level}" if level else "")


def work_of(plan: RunPlan, model_bytes: int, deadline_s: float, shadow: Shadow) -> Work:
    """What a round of this run asks of a device now."""
    training = plan.training
    return Work(
        family=family_of(plan, shadow),
        epochs=training.epochs,
        max_samples=training.max_steps * training.batch_size,
        deadline_s=deadline_s,
        down_bytes=model_bytes if model_bytes > INLINE_BYTES else 0,
        up_bytes=model_bytes,
    )


def settle(
    model: TwinModel, fleet: TwinModel, part: Part, at: float
) -> tuple[TwinModel, TwinModel]:
    """Gives the twin's model and the fleet's after a part ended at this time.

    First the forecast is judged, with what was known as it was made; then both learn.
    """
    outcome = part.outcome or ""
    completed = _COMPLETED.get(outcome, False)
    late_but_done = outcome == "late" and part.trial.received_at is not None
    model = _judged(model, fleet, part, at)
    in_time = _came_in_time(part)
    learned_from = []
    for each in (model, fleet):
        grown = counted(learn(each, part.trial), outcome, completed=late_but_done or completed)
        if in_time is not None:
            grown = msgspec.structs.replace(grown, in_time=grown.in_time.after(in_time))
        learned_from.append(grown)
    return learned_from[0], learned_from[1]


def _judged(model: TwinModel, fleet: TwinModel, part: Part, at: float) -> TwinModel:
    said, trial, known = part.forecast, part.trial, model.calibration
    if said is None:
        return model
    in_time = _came_in_time(part)
    if in_time is not None:
        known = judged_chance(
            known,
            chance=said.finishes_before(trial.work.deadline_s),
            came=in_time,
            base_rate=fleet.in_time.mean(0.5, BASE_RATE_WORTH),
        )
    took_s = trial.took_s
    if took_s is not None and is_believable(trial) and trial.is_whole:
        known = judged_time(known, raw_s=said.raw_s, said_s=said.finish_s.median, observed_s=took_s)
        known = judged_bytes(known, said=said.up_bytes, observed=trial.up_bytes)
    elif part.outcome in ("late", "spared") and trial.is_whole and trial.training_at is not None:
        elapsed_s = at - trial.asked_at
        longer_s = max(beyond(said.finish_s, elapsed_s), LONGER * elapsed_s)
        known = judged_unfinished(known, raw_s=said.raw_s, longer_s=longer_s)
    return msgspec.structs.replace(model, calibration=known)


def _came_in_time(part: Part) -> bool | None:
    """Whether it finished before the deadline; None where the round did not wait so long."""
    if part.outcome == "spared":
        return None
    took_s = part.trial.took_s
    return took_s is not None and took_s <= part.trial.work.deadline_s
