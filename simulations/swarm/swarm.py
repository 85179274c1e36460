"""Brings up a swarm of agents, lets it live through a run, and takes it down again."""

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from edge_agent.agent import AgentSettings
from federation.errors import HeadwaterError, LinkError
from federation.protocol.clock import steady_clock
from federation.protocol.link import MailboxConfig, parse_url
from federation.protocol.topics import check_name, device_filters
from simulations.swarm.connection import raise_descriptor_limit
from simulations.swarm.dropping import NOBODY, Dropping
from simulations.swarm.member import Member, Surroundings
from simulations.swarm.tally import Tally
from simulations.swarm.training import Trainer

AT_ONCE = 32
"""So many agents shake hands with the broker at the same time."""

DESCRIPTORS_EACH = 4
"""A socket and paho's pair of them, and one more for the connection that just ended."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class SwarmConfig:
    """How many agents there are, where they connect, and how they behave."""

    agents: int
    broker: str
    namespace: str = "fleet"
    keepalive_s: int = 30
    patience_s: float = 120.0
    password: str = ""
    heartbeat_s: float = 30.0
    dropping: Dropping = NOBODY
    seed: int = 0


def names_of(agents: int) -> list[str]:
    """The names of a swarm's agents."""
    digits = max(4, len(str(agents - 1)))
    return [f"swarm-{place:0{digits}d}" for place in range(agents)]


class Swarm:
    """A swarm that lives on the running loop; see `swarming`."""

    def __init__(self, config: SwarmConfig, trainer: Trainer) -> None:
        parse_url(config.broker)
        check_name("namespace", config.namespace)
        self.tally = Tally()
        self._config = config
        self._around = Surroundings(
            namespace=config.namespace,
            trainer=trainer,
            dropping=config.dropping,
            tally=self.tally,
            gate=asyncio.Semaphore(AT_ONCE),
            settings=AgentSettings(heartbeat_s=config.heartbeat_s, keepalive_s=config.keepalive_s),
            # As a device that lost its storage: above what a hub last heard from this name.
            first_epoch=int(steady_clock()() * 1000),
        )
        self.members = [self._member(name) for name in names_of(config.agents)]
        self._lives: list[asyncio.Task[None]] = []

    @property
    def linked(self) -> int:
        """How many agents have their link up."""
        return sum(member.is_linked for member in self.members)

    def begin(self) -> None:
        """Start all agents."""
        for member in self.members:
            life = asyncio.create_task(member.live(), name=member.name)
            self._lives.append(life)

    async def wait_until(
        self, holds: Callable[[], bool], what: str, *, patience_s: float, asks_record: bool = False
    ) -> None:
        """Wait for a condition; one that asks the record is looked at on a thread, not so often.

        Raises:
            LinkError: it does not hold within this patience.
            HeadwaterError: an agent ended, which none may.
        """
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + patience_s
        while not (await asyncio.to_thread(holds) if asks_record else holds()):
            self.check_alive()
            if loop.time() > give_up_at:
                complaints = {each.complaint for each in self.members if each.complaint}
                said = f"; they say: {' | '.join(sorted(complaints)[:3])}" if complaints else ""
                raise LinkError(f"{what}: not within {patience_s:g} s{said}")
            await asyncio.sleep(0.5 if asks_record else 0.02)

    async def end(self) -> None:
        """Let all agents say goodbye, so that the hub knows at once."""
        self._around.is_closing = True
        await asyncio.gather(*(member.leave() for member in self.members))
        for life in self._lives:
            life.cancel()
        await asyncio.gather(*self._lives, return_exceptions=True)
        self._around.trainer.close()

    def check_alive(self) -> None:
        """See that no agent ended by an error of its own.

        Raises:
            HeadwaterError: with what ended it.
        """
        for life in self._lives:
            if life.done() and not life.cancelled() and (error := life.exception()) is not None:
                raise HeadwaterError(f"{life.get_name()} ended: {error!r}") from error

    def _member(self, name: str) -> Member:
        config = self._config
        mailbox = MailboxConfig(
            url=config.broker,
            client_id=f"{config.namespace}-{name}",
            filters=tuple(device_filters(config.namespace, name)),
            keepalive_s=config.keepalive_s,
            user=name if config.password else "",
            password=config.password,
            session_expiry_s=600,
        )
        rng = random.Random(f"{config.seed}/{name}")  # noqa: S311 - jitter
        return Member(name, mailbox, self._around, rng)


@asynccontextmanager
async def swarming(config: SwarmConfig, trainer: Trainer) -> AsyncIterator[Swarm]:
    """A swarm whose agents all have their link up; they leave in the end.

    Raises:
        ConfigError: an address that is none.
        LinkError: not all of them reach the broker; their last complaints are in it.
    """
    raise_descriptor_limit(DESCRIPTORS_EACH * config.agents + 256)
    swarm = Swarm(config, trainer)
    swarm.begin()
    try:
        await swarm.wait_until(
            lambda: swarm.linked == config.agents,
            f"{config.agents} agents at {config.broker}",
            patience_s=config.patience_s,
        )
        yield swarm
    finally:
        await swarm.end()
