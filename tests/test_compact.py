import json
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from federation.errors import CodecError
from federation.protocol.codec import decode, encode
from federation.protocol.tensors import pack, unpack
from tests.tensors import FINITE, model


def zlib_run(content):
    machine = zlib.compressobj(wbits=-15)
    return machine.compress(content) + machine.flush()


def kept_of(weights, data):
    return {
        name: data.draw(arrays.arrays(np.bool_, tensor.shape))
        for name, tensor in weights.items()
        if data.draw(st.booleans())
    }


@given(FINITE, st.data(), st.sampled_from(["dense", "int8"]))
def test_kept_entries_say_where_they_are(weights, data, encoding):
    """Kept entries come back in their places without a mask at the reader; the others are zero."""
    kept = kept_of(weights, data)
    alone = {n: t[kept[n]] if n in kept else t for n, t in weights.items()}

    payload = encode(weights, encoding=encoding, kept=kept, compact=True, seed=3)

    back = decode(payload, like=weights, sparse=True)
    plain = decode(encode(alone, encoding=encoding, seed=3))
    assert list(back) == sorted(weights)
    for name, tensor in weights.items():
        where = kept.get(name, np.ones(tensor.shape, bool))
        assert back[name].shape == tensor.shape
        assert back[name].dtype == np.float32
        assert not back[name][~where].any()
        assert back[name][where].tobytes() == plain[name].tobytes()


@given(st.integers(0, 2000), st.integers(0, 3), st.integers(0, 2**32 - 1))
def test_positions_survive_any_gap(size, kept_count, seed):
    """Few entries far apart come back in their places, whatever lies between them."""
    rng = np.random.default_rng(seed)
    kept = np.zeros(size, bool)
    kept[rng.permutation(size)[:kept_count]] = True
    weights = {"w": rng.standard_normal(size).astype(np.float32)}

    back = decode(encode(weights, kept={"w": kept}), like=weights, sparse=True)

    assert np.array_equal(back["w"], np.where(kept, weights["w"], np.float32(0)))


@given(FINITE, st.integers())
def test_compact_int8_says_the_same(weights, seed):
    """Deflated int8 gives the weights of plain int8, and never takes more bytes by itself."""
    plain = encode(weights, encoding="int8", seed=seed)

    payload = encode(weights, encoding="int8", compact=True, seed=seed)

    back, expected = decode(payload, like=weights), decode(plain)
    assert {n: t.tobytes() for n, t in back.items()} == {
        n: t.tobytes() for n, t in expected.items()
    }
    assert sum(t.size for t in unpack(payload)[0].values()) <= sum(t.size for t in back.values())


def test_small_levels_deflate():
    """Differences, small with few exceptions, take a fifth less as compact int8."""
    values = np.random.default_rng(4).laplace(size=40_000).astype(np.float32)

    plain = encode({"w": values}, encoding="int8", seed=1)
    compact = encode({"w": values}, encoding="int8", compact=True, seed=1)

    assert len(compact) < 0.8 * len(plain)


def test_compact_tensors_need_a_reader_who_bounds_them():
    """A compact tensor is refused where nobody said how large it is, or where it is larger."""
    zeros = {"w": np.zeros((300, 300), np.float32)}
    whole = encode(zeros, encoding="int8", compact=True)
    some = encode(zeros, kept={"w": np.zeros((300, 300), bool)})
    assert len(whole) < 500

    for payload in (whole, some):
        with pytest.raises(CodecError, match="compact"):
            decode(payload, sparse=True)
        for shape in [(299, 300), (300,), (90_000,), (300, 300, 1)]:
            with pytest.raises(CodecError, match="at most"):
                decode(payload, like={"w": np.zeros(shape, np.float32)}, sparse=True)
    with pytest.raises(CodecError, match="only some entries"):
        decode(some, like=zeros)


@pytest.mark.parametrize(
    ("form", "run"),
    [
        ({"shape": [4], "kept": -1}, b""),
        ({"shape": [4], "kept": 5}, b""),
        ({"shape": [-4]}, b""),
        ({"shape": [2**62]}, b""),
        ({"shape": [2**80]}, b""),
        ({"shape": []}, b""),
        ({"shape": "4"}, b""),
        ({"shape": [4.5]}, b""),
        ({"shape": [4]}, b""),
        ({"shape": [4]}, zlib_run(b"\1" * 3)),
        ({"shape": [4]}, zlib_run(b"\1" * 5)),
        ({"shape": [4]}, zlib_run(b"\1" * 2_000_000)),
        ({"shape": [4]}, zlib_run(b"\1" * 4) + b"\0"),
        ({"shape": [4]}, zlib_run(b"\1" * 4)[:-1]),
        ({"shape": [4], "kept": 2}, zlib_run(b"\0\3") + zlib_run(b"\1\1")),
        ({"shape": [4], "kept": 2}, zlib_run(b"\xff\0") + zlib_run(b"\1\1")),
        ({"shape": [4], "kept": 2}, zlib_run(b"\0") + zlib_run(b"\1\1")),
        ({"shape": [4], "kept": 2}, zlib_run(b"\0\0") + zlib_run(b"\1")),
        ({"shape": [4], "kept": 2}, zlib_run(b"\0" * 2_000_000) + zlib_run(b"\1\1")),
        ({"shape": [4], "kept": 0}, b"\xff\xff\xff"),
    ],
)
def test_hostile_compact_tensors_are_refused(form, run):
    """A run of bytes that is not what its form says is refused, without being inflated whole."""
    facts = {"scales": {"w": 1.0}, "compact": {"w": form}}
    payload = pack({"w": np.frombuffer(run, np.int8)}, json.dumps(facts))

    with pytest.raises(CodecError):
        decode(payload, like={"w": np.zeros(4, np.float32)}, sparse=True)


def test_float_entries_must_be_all_there():
    """Float32 values of a sparse tensor are refused when some or too many bytes are there."""
    weights = {"w": np.arange(6, dtype=np.float32)}
    tensors, text = unpack(encode(weights, kept={"w": weights["w"] > 2}))

    for run in (tensors["w"][:-1], np.append(tensors["w"], np.int8(0))):
        with pytest.raises(CodecError, match="3 entries"):
            decode(pack({"w": run}, text), like=weights, sparse=True)


def test_a_compact_tensor_is_a_run_of_bytes():
    """A compact tensor of another dtype or with dimensions is refused, and so is a masked one."""
    like = {"w": np.zeros(4, np.float32)}
    run = np.frombuffer(zlib_run(b"\1" * 4), np.int8)
    facts = {"scales": {"w": 1.0}, "compact": {"w": {"shape": [4]}}}
    assert decode(pack({"w": run}, json.dumps(facts)), like=like)["w"].tolist() == [1.0] * 4

    for tensor in (run.astype(np.float32), run.reshape(1, -1)):
        with pytest.raises(CodecError, match="compact"):
            decode(pack({"w": tensor}, json.dumps(facts)), like=like)
    with pytest.raises(CodecError, match="compact"):
        decode(pack({"w": run}, json.dumps(facts | {"masks": {"w": "0"}})), like=like)


@given(FINITE, st.data(), st.sampled_from(["dense", "int8"]))
def test_flipped_bytes_of_sparse_tensors_never_crash(weights, data, encoding):
    """A sparse payload with bytes changed gives tensors no larger than allowed, or CodecError."""
    kept = kept_of(weights, data)
    payload = bytearray(encode(weights, encoding=encoding, kept=kept, compact=True))
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))

    try:
        back = decode(bytes(payload), like=weights, sparse=True)
    except CodecError:
        return
    assert all(t.dtype == np.float32 for t in back.values())


@given(st.binary(max_size=60), st.integers(0, 40), st.booleans())
def test_arbitrary_runs_never_crash(run, kept, quantised):
    """Any bytes in a compact tensor's place give a tensor of its shape, or CodecError."""
    facts = {"compact": {"w": {"shape": [6, 5], "kept": kept}}}
    facts |= {"scales": {"w": 0.5}} if quantised else {}
    like = {"w": np.zeros((6, 5), np.float32)}

    try:
        back = decode(
            pack({"w": np.frombuffer(run, np.int8)}, json.dumps(facts)), None, like, sparse=True
        )
    except CodecError:
        return
    assert back["w"].shape == (6, 5)


def test_kept_entries_need_a_fitting_mask():
    """What shall be kept is refused for another shape, and together with a mask."""
    with pytest.raises(CodecError, match=r"mask of 'a.weight'"):
        encode(model(), kept={"a.weight": np.ones(5, bool)})
    both = {"a.bias": np.ones(3, bool)}
    with pytest.raises(CodecError, match="one of both"):
        encode(model(), kept=both, masks=both)
