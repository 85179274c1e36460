"""A hub by hand for tests: letters in, facts and letters out, time as the test says."""

import numpy as np

from cloud.config import MethodChoice, ModelChoice, RunPlan
from cloud.coordination.coordinator import Coordinator
from cloud.coordination.facts import (
    HubMemory,
    RoundClosed,
)
from cloud.coordination.rounds import RoundPolicy
from federation.protocol import codec
from federation.protocol import messages as m
from federation.protocol.effects import Link, Record, Send, WakeAt
from federation.protocol.transfer import content_of, cut
from optimizer.baselines import select_uniformly

SHAPES = {"classifier.weight": (10, 64), "classifier.bias": (10,)}


def weights(value):
    return {name: np.full(shape, value, np.float32) for name, shape in SHAPES.items()}


def encoded(value):
    return codec.encode(weights(value))


def run_plan(devices=2, *, rounds=1, method="fedavg", sizes=None, **policy):
    rules = {"devices_per_round": devices, "quorum": devices} | policy
    model = ModelChoice(name="linear", sizes=sizes or {})
    return RunPlan(
        name="run",
        rounds=rounds,
        model=model,
        policy=RoundPolicy(**rules),
        method=MethodChoice(name=method),
    )


class Room:
    """A coordinator by hand: letters in, facts and letters out; `record` may outlive it."""

    def __init__(self, plan, model=None, *, record=None):
        self.facts, self.said = [], []
        self.now, self.wake_at = 0.0, 0.0
        self.record = record
        self.epochs = {}
        self.restart()
        self.do(self.hub.open_run(plan, model or encoded(0.0), self.now))

    def restart(self):
        memory = self.record.restore() if self.record else HubMemory()
        self.hub = Coordinator(memory, select=select_uniformly, read_content=lambda _: None)
        self.said.clear()
        self.do(self.hub.start(self.now))
        self.do(self.hub.on_link(Link(is_up=True, epoch=1), self.now))

    def do(self, effects):
        facts = [effect.fact for effect in effects if isinstance(effect, Record)]
        if self.record and facts:
            self.record.record(facts)
        self.facts += facts
        for effect in effects:
            match effect:
                case Send(letter, device):
                    self.said.append((device, letter))
                case WakeAt(at):
                    self.wake_at = at

    def hear(self, device, letter, epoch=None):
        epoch = epoch or self.epochs.get(device, 1)
        self.do(self.hub.on_message(m.Envelope(sender=device, epoch=epoch, body=letter), self.now))

    def born(self, *devices, **birth):
        for device in devices:
            self.hear(device, m.Birth(capability=m.Capability(agent="test"), **birth))

    def lost(self, device):
        self.hear(device, m.Presence(state="lost"))
        self.epochs[device] = self.epochs.get(device, 1) + 1

    def send(self, device, data, *, number=1, samples=1, sender=None, **changes):
        """A whole small update in one letter."""
        content = content_of(data, max(len(data), 1))
        fields = {
            "attempt": f"run_{number}_{device}",
            "content": content,
            "report": m.Report(samples=samples),
            "inline": data,
        }
        self.hear(sender or device, m.UpdateOpen(**(fields | changes)))
        return content

    def wait(self, until):
        while self.wake_at <= until and self.hub.run is not None:
            self.now = max(self.now, self.wake_at)
            self.do(self.hub.on_wake(self.now))
        self.now = until

    def of(self, kind):
        return [fact for fact in self.facts if isinstance(fact, kind)]

    def told(self, device, kind):
        return [letter for to, letter in self.said if to == device and isinstance(letter, kind)]

    def verdicts(self, device):
        return [ack.verdict for ack in self.told(device, m.UpdateAck)]

    def model(self):
        return codec.decode(self.of(RoundClosed)[-1].model)


def value(model):
    assert np.unique(model["classifier.weight"]).size == 1
    return float(model["classifier.weight"][0, 0])


def chunks(attempt, data, content):
    for index in range(content.chunks):
        crc32, part = cut(data, content, index)
        yield m.UpdateChunk(
            attempt=attempt, digest=content.digest, index=index, crc32=crc32, data=part
        )
