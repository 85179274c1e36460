"""The devices of a scenario as a world wants them: by place, made when they are looked at."""

from dataclasses import dataclass

from edge_agent.agent import AgentSettings
from federation.protocol.messages import LocalPlan
from simulations.bodies import Bodies
from simulations.device_model import DeviceModel, Member
from simulations.fleet import FleetData
from simulations.herd import Population
from simulations.scenario import LateJoin, Scenario


def bodies_of(scenario: Scenario) -> Bodies:
    """The physical side of a scenario's fleet."""
    hour = scenario.availability.starts_hour
    return Bodies(
        scenario.fleet, scenario.link, scenario.device, seed=scenario.seed, starts_hour=hour
    )


def population_of(scenario: Scenario, data: FleetData, *, sleeps: bool = True) -> Population:
    """All devices of a scenario; those with nothing to do sleep, or none ever does."""
    plan, bodies = scenario.device, bodies_of(scenario)
    late = {f.device: f.at_s for f in scenario.faults if isinstance(f, LateJoin)}
    names = list(data.devices)
    settings = AgentSettings(
        heartbeat_s=plan.heartbeat_s,
        keepalive_s=plan.keepalive_s,
        timeout_s=plan.timeout_s,
        shares_memory=scenario.shares_memory,
    )
    has_bodies = bool(plan.classes) or plan.clock_offset_s > 0 or plan.clock_drift_ppm > 0

    def member(place: int) -> Member:
        name = names[place]
        model = DeviceModel(
            seconds_per_step=bodies.step_s(place),
            checkpoint_s=plan.checkpoint_s,
            joins_at_s=late.get(name, 0.0),
            level=bodies.level(place),
            quality=bodies.quality(place),
            settings=settings,
            body=OneBody(bodies, place) if has_bodies else None,
        )
        return Member(name, data.devices[name], model)

    return Population(names, member, bodies.level, sleeps=sleeps, late=late)


@dataclass(frozen=True, slots=True)
class OneBody:
    """One of many bodies: a `simulations.device_model.Body`."""

    bodies: Bodies
    place: int

    def training_s(self, plan: LocalPlan, steps: int, samples: int) -> float:
        """How long it trains for so many steps."""
        return self.bodies.training_s(self.place, plan, steps, samples)

    def training_j(self, plan: LocalPlan, steps: int, samples: int) -> float:
        """The energy that takes."""
        return self.bodies.training_j(self.place, plan, steps, samples)

    def transfer_j(self, up_bytes: int, down_bytes: int) -> float:
        """The energy to send and receive so many bytes."""
        return self.bodies.transfer_j(self.place, up_bytes, down_bytes)

    def spend(self, joules: float, now: float) -> bool:
        """Take energy from its battery; False: that is empty now."""
        return self.bodies.spend(self.place, joules, now)

    def back_at(self, now: float) -> float:
        """When an empty battery has charged enough."""
        return self.bodies.back_at(self.place, now)

    def fits(self, plan: LocalPlan) -> bool:
        """Whether its memory is enough to train this."""
        return self.bodies.fits(self.place, plan)

    def shows(self, now: float) -> float:
        """What its own clock shows."""
        offset_s, drift = self.bodies.clock_of(self.place)
        return now + offset_s + drift * now
