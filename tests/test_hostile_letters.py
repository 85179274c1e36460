"""Whatever bytes a peer sends, they are refused by a ProtocolError and nothing else."""

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from federation.errors import CodecError, ProtocolError
from federation.protocol import codec
from federation.protocol import messages as m
from federation.protocol.topics import ROUTES, open_letter
from federation.protocol.wishes import OfTwins

SOUND = m.seal("d01", 3, m.TaskEvent(attempt="run_1_d01", event="failed", reason="a reason"))


@given(st.binary(max_size=300))
def test_any_bytes_are_a_letter_or_refused(payload: bytes) -> None:
    """Random bytes never get past the typed decoder, nor break it."""
    with pytest.raises(ProtocolError):
        m.unseal(payload)


@given(st.integers(0, len(SOUND) - 1), st.integers(0, 255))
def test_a_letter_with_a_damaged_byte_is_read_or_refused(at: int, byte: int) -> None:
    """One changed byte gives another letter or a refusal: broken text is no other error."""
    damaged = SOUND[:at] + bytes([byte]) + SOUND[at + 1 :]
    try:
        assert isinstance(m.unseal(damaged), m.Envelope)
    except ProtocolError:
        return


@pytest.mark.parametrize(
    "payload",
    [
        SOUND.replace(b"a reason", b"\xff\xfe\xfd\xfc\xfb\xfa\xf9\xf8"),
        msgspec.msgpack.encode({"version": 1, "more": None})[:-1] + b"\x91" * 100_000 + b"\xc0",
        b"\x91" * 100_000,
        SOUND + b"\x00" * m.MAX_LETTER_BYTES,
    ],
    ids=["broken text", "deep unknown field", "deep nesting", "oversize"],
)
def test_letters_made_to_break_the_reader_are_refused(payload: bytes) -> None:
    """Text that is not UTF-8, nesting without end and excess size are refused with a reason."""
    with pytest.raises(ProtocolError, match="letter"):
        open_letter("fleet", "fl/1/fleet/d/d01/up/task", payload)


def test_a_tensor_too_large_to_be_is_refused() -> None:
    """A shape whose product is beyond any memory, though it names no byte, is a CodecError."""
    header = {"w": {"dtype": "F32", "shape": [0, *[2**31 - 1] * 3], "data_offsets": [0, 0]}}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    with pytest.raises(CodecError, match="w"):
        codec.decode(len(text).to_bytes(8, "little") + text)


def test_every_letter_has_a_route_and_comes_back_as_it_went() -> None:
    """The table of routes names every letter of the protocol."""
    unions = (m.FromDevice, m.FromHub, m.ToAll, m.FromPeer, OfTwins)
    letters = {kind for union in unions for kind in union.__args__}

    assert set(ROUTES) == letters
