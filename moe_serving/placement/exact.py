"""The best placement for a history, proved: a mixed-integer program, the oracle of small cases.

Needs the `plan` extra (Pyomo and HiGHS). For a dozen experts and batches; `search` is for use.

Shapes: B batches, E experts, D devices.
"""

from dataclasses import dataclass
from typing import Any

from federation.errors import ConfigError
from moe_serving.placement.baselines import History
from moe_serving.placement.record import Loads, Placement, check_history, place


@dataclass(frozen=True, slots=True)
class Proven:
    """The best placement found, its merit, and a bound that no placement betters."""

    placement: Placement
    merit: float
    bound: float


def best_placement(
    counts_BE: History, devices: int, slots: int, *, copies: int = 0, time_limit_s: float = 30.0
) -> Proven:
    """Minimises the mean over batches of the busiest device's load over the mean load.

    Binary variables say which device holds which expert, with at most `copies` beyond one each;
    continuous ones divide each expert's load of each batch among its holders.

    Raises:
        ConfigError: The experts do not fit, the `plan` extra is missing, or no placement was
            found in the time.
    """
    load_BE = check_history(counts_BE, devices, slots)
    try:
        from pyomo.contrib.appsi.solvers import Highs
    except ImportError as error:
        raise ConfigError("exact placement needs Pyomo; pip install 'headwater[plan]'") from error
    model = _program(load_BE, devices, slots, copies)
    solver: Any = Highs()
    solver.config.time_limit = time_limit_s
    solver.config.load_solution = False
    solver.highs_options = {"threads": 1, "mip_rel_gap": 1e-6}
    found = solver.solve(model)
    if found.best_feasible_objective is None:
        raise ConfigError(f"no placement was found in {time_limit_s} s; allow more, or use search")
    found.solution_loader.load_vars()
    holders = [
        [device for device in range(devices) if model.holds[expert, device].value > 0.5]
        for expert in range(load_BE.shape[1])
    ]
    placement = place(devices, holders)
    return Proven(placement, found.best_feasible_objective, found.best_objective_bound)


def _program(load_BE: Loads, devices: int, slots: int, copies: int) -> Any:
    import pyomo.environ as pyo

    batches, experts = load_BE.shape
    model: Any = pyo.ConcreteModel()
    model.B, model.E, model.D = (pyo.RangeSet(0, size - 1) for size in (batches, experts, devices))
    model.holds = pyo.Var(model.E, model.D, domain=pyo.Binary)
    model.share = pyo.Var(model.B, model.E, model.D, bounds=(0, 1))
    model.busiest = pyo.Var(model.B, domain=pyo.NonNegativeReals)
    model.has_home = pyo.Constraint(model.E, rule=lambda m, e: sum(m.holds[e, d] for d in m.D) >= 1)
    model.fits = pyo.Constraint(model.D, rule=lambda m, d: sum(m.holds[e, d] for e in m.E) <= slots)
    model.copies = pyo.Constraint(
        expr=sum(model.holds[e, d] for e in model.E for d in model.D) <= experts + copies
    )
    model.is_whole = pyo.Constraint(
        model.B, model.E, rule=lambda m, b, e: sum(m.share[b, e, d] for d in m.D) == 1
    )
    model.is_there = pyo.Constraint(
        model.B, model.E, model.D, rule=lambda m, b, e, d: m.share[b, e, d] <= m.holds[e, d]
    )
    model.waits = pyo.Constraint(
        model.B,
        model.D,
        rule=lambda m, b, d: (
            sum(float(load_BE[b, e]) * m.share[b, e, d] for e in m.E) <= m.busiest[b]
        ),
    )
    model.merit = pyo.Objective(expr=sum(model.busiest[b] for b in model.B) / batches)
    return model
