"""Letters by reference: in one process an envelope need not be bytes to be on its way.

Its size is that of its bytes, so links are as busy and accounts as full as with them.
"""

from typing import Any

import msgspec

from federation.protocol import messages as m
from federation.protocol.topics import ROUTES, Route, open_letter, route

_encoder = msgspec.msgpack.Encoder()
_LONGEST_HEADER = ((2**8, 2), (2**16, 3), (2**63, 5))
"""A run of bytes below so many costs so many bytes more than its own, in MessagePack."""


class Sealed:
    """An envelope on its way; `to` names the one client that it is for."""

    __slots__ = ("_size", "envelope", "to")

    def __init__(self, envelope: m.Envelope, to: str) -> None:
        self.envelope = envelope
        self.to = to
        self._size = -1

    def __len__(self) -> int:
        """How many bytes the envelope would have, encoded."""
        if self._size < 0:
            self._size = _size_of(self.envelope)
        return self._size


def seal(
    namespace: str, device: str, letter: m.AnyLetter, *, sender: str, epoch: int
) -> tuple[Route, Sealed]:
    """How a letter travels, and itself; `device` names its branch, empty for public letters."""
    way, below = route(namespace, device, letter), ROUTES[type(letter)].topic
    to = "hub" if below.startswith("up/") else device if below.startswith("dn/") else ""
    return way, Sealed(m.Envelope(sender=sender, epoch=epoch, body=letter), to)


def unseal(namespace: str, topic: str, payload: bytes | Sealed) -> m.Envelope:
    """The envelope that arrived; bytes are checked as a mailbox checks them.

    Raises:
        ProtocolError: an unreadable letter, or one whose sender does not own the branch.
    """
    if isinstance(payload, Sealed):
        return payload.envelope
    return open_letter(namespace, topic, payload)[1]


def _size_of(envelope: m.Envelope) -> int:
    letter: Any = envelope.body
    for name in ("inline", "data"):
        content = getattr(letter, name, None)
        if content:
            light = msgspec.structs.replace(letter, **{name: b""})
            rest = len(_encoder.encode(msgspec.structs.replace(envelope, body=light)))
            header = next(more for limit, more in _LONGEST_HEADER if len(content) < limit)
            return rest - 2 + header + len(content)
    return len(_encoder.encode(envelope))
