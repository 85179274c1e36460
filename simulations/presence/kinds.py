"""The model of presence that a scenario's `[availability]` asks for."""

import numpy as np

from federation.errors import ConfigError
from simulations.presence.markov import Markov
from simulations.presence.model import Always, ByBlock, ByRound, Presence
from simulations.presence.regions import Regional
from simulations.presence.traces import Recorded, read_trace
from simulations.tables import AvailabilityPlan


def presence_of(plan: AvailabilityPlan, devices: int, seed: int) -> Presence:
    """Gives who is there when, for a fleet of so many devices.

    Raises:
        ConfigError: a trace that is not there, or too long for its period.
        DataError: a trace that cannot be read.
    """
    inner = _alone(plan, devices, seed)
    outages = plan.outages
    if outages.regions == 0:
        return inner
    return Regional(
        inner,
        devices,
        regions=outages.regions,
        every_s=outages.every_s,
        lasts_s=outages.lasts_s,
        seed=seed,
    )


def _alone(plan: AvailabilityPlan, devices: int, seed: int) -> Presence:
    match plan.kind:
        case "always":
            return Always(devices)
        case "bernoulli":
            return ByRound(_chances(plan, devices), plan.every_rounds, seed)
        case "blocks":
            return ByBlock(_chances(plan, devices), plan.block_s, seed)
        case "markov":
            return Markov(
                devices, _by_hour(plan.on_s), _by_hour(plan.off_s), seed, plan.starts_hour
            )
        case "trace":
            if plan.trace is None:
                raise ConfigError(
                    "availability.trace is missing; kind 'trace' needs a .csv or .parquet file: "
                    "add it"
                )
            trace = read_trace(plan.trace)
            return Recorded(trace, devices, plan.trace_period_s, plan.trace_shift_s)


def _chances(plan: AvailabilityPlan, devices: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    chances = np.atleast_1d(np.asarray(plan.q, np.float64))
    return np.resize(chances, devices) if len(chances) > 1 else np.full(devices, chances[0])


def _by_hour(given: float | tuple[float, ...]) -> tuple[float, ...]:
    return given if isinstance(given, tuple) else (given,)
