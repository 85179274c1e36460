"""An agent by hand for tests: letters in, effects out, a journal in memory, power that fails."""

import random

import numpy as np

from edge_agent.agent import Agent, AgentSettings
from edge_agent.facts import Held
from edge_agent.trainer import fulfil
from federation.learning.data import LocalData
from federation.protocol import codec
from federation.protocol import messages as m
from federation.protocol.effects import Link, Record, Send, StopTraining, Train, WakeAt
from federation.protocol.transfer import content_of, cut

SETTINGS = AgentSettings(heartbeat_s=30.0, timeout_s=5.0)
ATTEMPT = "run_3_dev"
CAPABILITY = m.Capability(agent="test")


def local_data():
    rng = np.random.default_rng(4)
    return LocalData(
        rng.normal(size=(40, 64)).astype(np.float32), rng.integers(0, 10, 40).astype(np.int64)
    )


def base_model(hidden=300):
    rng = np.random.default_rng(3)
    shapes = {
        "hidden.weight": (hidden, 64),
        "hidden.bias": (hidden,),
        "classifier.weight": (10, hidden),
        "classifier.bias": (10,),
    }
    return codec.encode(
        {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}
    )


BASE = base_model()
CONTENT = content_of(BASE, 16 * 1024)


def assignment(attempt=ATTEMPT, deadline_s=600.0, **changes):
    plan = m.LocalPlan(
        model=m.ModelSpec(name="mlp", sizes={"hidden": 300}), max_steps=2, learning_rate=0.1, seed=9
    )
    fields = {"attempt": attempt, "run": "run", "round": 3, "deadline_s": deadline_s}
    return m.Assignment(**(fields | {"base": CONTENT, "plan": plan} | changes))


def from_hub(letter, epoch=1):
    return m.Envelope(sender="hub", epoch=epoch, body=letter)


class Desk:
    """A device by hand: it performs effects, and answers as a hub would."""

    def __init__(self, held=None, *, stop_after=None, capability=CAPABILITY):
        self.held = held or Held()
        self.said, self.trains, self.stopped, self.facts = [], [], [], []
        self.wake_at, self.now, self.epoch, self.steps = 0.0, 100.0, 0, 0
        self.stop_after = stop_after
        self.capability = capability
        self.trainings = 0
        self.agent = None

    def boot(self):
        self.agent = Agent(
            "dev", self.capability, self.held, settings=SETTINGS, rng=random.Random(0)
        )
        self.epoch += 1
        self.do(self.agent.start(self.now))
        return self

    def meet(self, hub_epoch=1):
        self.do(self.agent.on_link(Link(is_up=True, epoch=self.epoch), self.now))
        self.hear(m.HubState(online=True), hub_epoch)
        return self

    def hear(self, letter, epoch=1):
        if self.agent is not None:
            self.do(self.agent.on_message(from_hub(letter, epoch), self.now))

    def do(self, effects):
        """Perform effects one by one; the power fails after `stop_after` of them in all."""
        for effect in effects:
            self.steps += 1
            if self.stop_after is not None and self.steps > self.stop_after:
                self.agent = None
                return
            match effect:
                case Record(fact):
                    self.held.record(fact)
                    self.facts.append(fact)
                case Send(letter):
                    self.said.append(letter)
                case Train():
                    self.trainings += 1
                    self.trains.append(effect)
                case StopTraining(attempt):
                    self.stopped.append(attempt)
                case WakeAt(at):
                    self.wake_at = at

    def wake(self):
        self.now = max(self.now, self.wake_at)
        self.do(self.agent.on_wake(self.now))

    def take(self, kind):
        taken = [letter for letter in self.said if isinstance(letter, kind)]
        self.said = [letter for letter in self.said if not isinstance(letter, kind)]
        return taken


class Counterpart:
    """The hub's side of one attempt: it serves the base, takes the update, counts acceptances."""

    def __init__(self):
        self.parts, self.accepted = {}, []

    def answer(self, desk):
        """Answer all that was said; False when there is nothing more to do."""
        said, desk.said = desk.said, []
        trains, desk.trains = desk.trains, []
        for letter in said:
            self.react(desk, letter)
        for job in trains:
            if desk.agent is not None:
                desk.do(
                    desk.agent.on_trained(fulfil(job.assignment, job.base, local_data()), desk.now)
                )
        return bool(said or trains)

    def react(self, desk, letter):
        match letter:
            case m.Birth():
                done = bool(self.accepted)
                desk.hear(m.Welcome(epoch=desk.epoch, open_attempts=() if done else (ATTEMPT,)))
                if not done and ATTEMPT not in (letter.working, *letter.finished):
                    desk.hear(assignment())
            case m.BlobRequest():
                for index in letter.wanted:
                    crc32, data = cut(BASE, CONTENT, index)
                    desk.hear(
                        m.BlobChunk(digest=CONTENT.digest, index=index, crc32=crc32, data=data)
                    )
            case m.UpdateOpen():
                self.acknowledge(desk, letter.content)
                self.content = letter.content
            case m.UpdateChunk():
                self.parts.setdefault(letter.digest, {})[letter.index] = letter.data
                self.acknowledge(desk, self.content)

    def acknowledge(self, desk, content):
        parts = self.parts.setdefault(content.digest, {})
        if len(parts) < content.chunks:
            received = sum(1 << index for index in parts).to_bytes(
                -(-content.chunks // 8), "little"
            )
            desk.hear(m.UpdateAck(attempt=ATTEMPT, digest=content.digest, received=received))
            return
        update = b"".join(parts[index] for index in range(content.chunks))
        verdict = "duplicate" if update in self.accepted else "stored"
        if verdict == "stored":
            self.accepted.append(update)
        desk.hear(m.UpdateAck(attempt=ATTEMPT, digest=content.digest, verdict=verdict))


def live(desk, hub):
    """Boot, meet the hub, and go on until nothing is left to say."""
    desk.boot()
    if desk.agent is not None:
        desk.meet()
    while desk.agent is not None and hub.answer(desk):
        pass
