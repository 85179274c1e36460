"""The topic grammar: build and parse; no other module spells a topic.

```
fl/1/<namespace>/d/<device>/up/state | birth | hb | task | req | twin
fl/1/<namespace>/d/<device>/up/x/<attempt>/open | x/<attempt>/c/<n>
fl/1/<namespace>/d/<device>/dn/task | ctl | twin | x/<attempt> | blob/<digest>/<n>
fl/1/<namespace>/d/<device>/peer/model | ask/<neighbour> | c/<digest>/<n>
fl/1/<namespace>/d/<device>/ask/<model>, answered on dn/answer/<request>
fl/1/<namespace>/pub/hub | release/<run>
fl/1/<namespace>/serving
```

The direction is a fixed level, so the broker's permissions for a device are few lines: publish
its own `up/#`, `peer/#` and `ask/#`, read its own `dn/#`, `pub/#`, and of every device
`peer/model`, `peer/c/#` and `peer/ask/<itself>`.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

from federation.errors import ProtocolError
from federation.protocol import messages as m
from federation.protocol.wishes import DesiredState, ReportedState

NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
"""Devices, runs and namespaces: lower-case letters, digits and hyphens, at most 64."""


def check_name(kind: str, name: str) -> str:
    """The name itself, if it may stand in a topic.

    Raises:
        ProtocolError: another character than a-z, 0-9 and hyphen, or longer than 64.
    """
    if NAME.fullmatch(name) is None:
        raise ProtocolError(
            f"{kind} {name!r} cannot stand in a topic: "
            "use 1 to 64 lower-case letters, digits and hyphens, not beginning with a hyphen"
        )
    return name


@dataclass(frozen=True, slots=True)
class Route:
    """How a letter travels: its topic, quality of service, retention and expiry in seconds."""

    topic: str
    qos: int = 1
    retain: bool = False
    expiry_s: int = 0


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a letter came in: whose branch (empty: public) and in which direction."""

    device: str
    direction: str


# Chunks go without the broker's guarantee: the transfer asks again for what is missing, and a
# chunk that a broker queued for somebody who was away would arrive twice.
ROUTES: Mapping[type[m.AnyLetter], Route] = MappingProxyType(
    {
        m.Presence: Route("up/state", retain=True),
        m.Birth: Route("up/birth", expiry_s=600),
        m.Heartbeat: Route("up/hb", qos=0, expiry_s=60),
        m.TaskEvent: Route("up/task", expiry_s=3600),
        m.BlobRequest: Route("up/req", expiry_s=60),
        m.UpdateOpen: Route("up/x/{0.attempt}/open", expiry_s=3600),
        m.UpdateChunk: Route("up/x/{0.attempt}/c/{0.index}", qos=0),
        ReportedState: Route("up/twin", expiry_s=3600),
        DesiredState: Route("dn/twin", expiry_s=3600),
        m.Assignment: Route("dn/task", expiry_s=3600),
        m.Cancel: Route("dn/task", expiry_s=3600),
        m.Welcome: Route("dn/ctl", expiry_s=300),
        m.Rebirth: Route("dn/ctl", expiry_s=300),
        m.UpdateAck: Route("dn/x/{0.attempt}", expiry_s=60),
        m.BlobChunk: Route("dn/blob/{0.digest}/{0.index}", qos=0),
        m.BlobGone: Route("dn/blob/{0.digest}/gone", expiry_s=300),
        m.PeerModel: Route("peer/model", retain=True),
        m.PeerLeft: Route("peer/model", retain=True),
        m.PeerAsk: Route("peer/ask/{0.peer}", expiry_s=60),
        m.PeerChunk: Route("peer/c/{0.digest}/{0.index}", qos=0),
        m.HubState: Route("pub/hub", retain=True),
        m.Release: Route("pub/release/{0.run}", retain=True),
    }
)
"""How each letter travels; its topic is below the device's branch, or below the root if public."""


@lru_cache(maxsize=64)
def root(namespace: str) -> str:
    """The prefix of all topics of one fleet."""
    return f"fl/{m.MAJOR}/{check_name('namespace', namespace)}"


def hub_filters(namespace: str) -> list[str]:
    """What the hub subscribes to."""
    return [f"{root(namespace)}/d/+/up/#"]


def device_filters(namespace: str, device: str) -> list[str]:
    """What a device subscribes to: its own branch, and what is said to all."""
    return [f"{root(namespace)}/d/{device}/dn/#", f"{root(namespace)}/pub/#"]


def public_filter(namespace: str) -> str:
    """What is said to all."""
    return f"{root(namespace)}/pub/#"


def peer_filters(namespace: str, device: str, neighbours: Iterable[str]) -> list[str]:
    """What a peer subscribes to: its neighbours' models, and what they ask of it.

    The neighbour `+` is every device, as a broker's permissions have it.
    """
    branches = [f"{root(namespace)}/d/{neighbour}/peer" for neighbour in neighbours]
    topics = ("model", "c/#", f"ask/{device}")
    return [f"{branch}/{topic}" for branch in branches for topic in topics]


def ask_filter(namespace: str, *, is_shared: bool = False) -> str:
    """What a server of models subscribes to: what devices ask, or its share of it."""
    share = "$share/models/" if is_shared else ""
    return f"{share}{root(namespace)}/d/+/ask/+"


def serving_route(namespace: str) -> Route:
    """Where a server of models is said to be gone, by its last will."""
    return Route(f"{root(namespace)}/serving")


def ask_route(namespace: str, device: str, model: str, expiry_s: int) -> Route:
    """How a device asks a model; after the expiry nobody wants the answer."""
    check_name("model", model)
    return Route(f"{root(namespace)}/d/{device}/ask/{model}", expiry_s=expiry_s)


def answer_route(namespace: str, device: str, request: str, expiry_s: int) -> Route:
    """How a device is answered: on its own branch, wherever it might like it to go."""
    check_name("request", request)
    return Route(f"{root(namespace)}/d/{device}/dn/answer/{request}", expiry_s=expiry_s)


def answer_filter(namespace: str, device: str) -> str:
    """What a device that asks models subscribes to: the answers to it."""
    return f"{root(namespace)}/d/{device}/dn/answer/+"


def asking_route(namespace: str, device: str) -> Route:
    """Where a device that asks models is said to be gone, by its last will; nobody listens."""
    return Route(f"{root(namespace)}/d/{device}/ask/models/gone", qos=0)


def is_answer(namespace: str, device: str, topic: str) -> bool:
    """Whether the letter on this topic is a model's answer: those have an envelope of their own."""
    return topic.startswith(f"{root(namespace)}/d/{device}/dn/answer/")


def route(namespace: str, device: str, letter: m.AnyLetter) -> Route:
    """How this letter travels; `device` names the branch and is ignored for public letters."""
    rule = ROUTES[type(letter)]
    branch = "" if rule.topic.startswith("pub/") else f"d/{device}/"
    below = rule.topic if "{" not in rule.topic else rule.topic.format(letter)
    topic = f"{root(namespace)}/{branch}{below}"
    return Route(topic, rule.qos, rule.retain, rule.expiry_s)


def parse(namespace: str, topic: str) -> Origin:
    """Where a letter on this topic comes from or goes to.

    Raises:
        ProtocolError: the topic is not in this namespace's tree.
    """
    prefix = f"{root(namespace)}/"
    levels = topic.removeprefix(prefix).split("/")
    if topic.startswith(prefix):
        match levels:
            case ["d", device, "up" | "dn" | "peer" | "ask" as direction, _, *_] if NAME.fullmatch(
                device
            ):
                return Origin(device, direction)
            case ["pub", _, *_]:
                return Origin("", "pub")
            case _:
                pass
    raise ProtocolError(
        f"topic {topic!r} is not of this fleet; expected {prefix}d/<device>/up|dn|peer|ask/... "
        f"or {prefix}pub/...: check the namespace on both sides"
    )


def open_letter(namespace: str, topic: str, payload: bytes) -> tuple[Origin, m.Envelope]:
    """The envelope that arrived on a topic, its sender checked against the branch.

    Raises:
        ProtocolError: an unreadable letter, or one whose sender does not own the branch.
    """
    origin = parse(namespace, topic)
    envelope = m.unseal(payload)
    owner = origin.device if origin.direction in {"up", "peer", "ask"} else "hub"
    if envelope.sender != owner:
        raise ProtocolError(
            f"letter of {envelope.sender!r} came on the branch of {owner!r}: refused; "
            "a device may only write below its own name"
        )
    expected = route(namespace, origin.device, envelope.body).topic
    if expected != topic:
        raise ProtocolError(
            f"letter {type(envelope.body).__name__} came on {topic!r}; it belongs on {expected!r}"
        )
    return origin, envelope
