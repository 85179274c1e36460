import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from federation.errors import CodecError
from federation.protocol.codec import check_part, check_update, decode, digest_of, encode, layer_of
from federation.protocol.tensors import MAX_HEADER_BYTES, pack, unpack
from tests.tensors import ANY, FINITE, model


@given(ANY)
def test_dense_returns_every_bit(weights):
    """Dense weights come back with the same names, shapes and bits."""
    payload = encode(weights)

    back = decode(payload)

    assert list(back) == sorted(weights)
    for name, tensor in weights.items():
        assert back[name].shape == tensor.shape
        assert back[name].dtype == np.float32
        assert back[name].tobytes() == tensor.tobytes()


@given(FINITE, st.integers())
def test_int8_is_off_by_less_than_a_level(weights, seed):
    """Int8 weights come back in shape, each within one level of what it was."""
    back = decode(encode(weights, encoding="int8", seed=seed))

    for name, tensor in weights.items():
        level = float(np.abs(tensor).max(initial=0)) / 127
        error = np.abs(back[name].astype(np.float64) - tensor)
        assert back[name].shape == tensor.shape
        assert (error <= level * 1.00001 + 1e-44).all()


def test_int8_rounds_without_bias():
    """The mean of many int8 roundings is the value itself."""
    weights = {"w": np.array([1.0, 0.3, -0.7123, 1e-3], np.float32)}

    mean = np.mean(
        [decode(encode(weights, encoding="int8", seed=s))["w"] for s in range(4000)], axis=0
    )

    standard_error = (1 / 127) * 0.5 / np.sqrt(4000)
    assert np.abs(mean - weights["w"]).max() < 5 * standard_error


def test_int8_needs_a_quarter_of_the_bytes():
    """An int8 payload is about a quarter of the dense one."""
    weights = {"w": np.linspace(-1, 1, 40_000, dtype=np.float32)}

    assert len(encode(weights, encoding="int8")) < 0.26 * len(encode(weights))


@given(FINITE, st.data(), st.sampled_from(["dense", "int8"]))
def test_masked_entries_travel_alone(weights, data, encoding):
    """Kept entries come back in their places, dropped ones are zero, and only kept ones travel."""
    masks = {
        name: data.draw(arrays.arrays(np.bool_, tensor.shape))
        for name, tensor in weights.items()
        if data.draw(st.booleans())
    }
    kept_only = {n: t[masks[n]] if n in masks else t for n, t in weights.items()}

    payload = encode(weights, encoding=encoding, masks=masks, seed=3)

    back = decode(payload, masks)
    plain = decode(encode(kept_only, encoding=encoding, seed=3))
    for name, tensor in weights.items():
        mask = masks.get(name, np.ones(tensor.shape, bool))
        assert back[name].shape == tensor.shape
        assert not back[name][~mask].any()
        assert back[name][mask].tobytes() == plain[name].tobytes()
    raw, _ = unpack(payload)
    assert sum(t.size for t in raw.values()) == sum(t.size for t in kept_only.values())


def test_another_mask_is_refused():
    """A receiver with no mask, or with another mask of the same size, is told so."""
    weights = model()
    mask = weights["a.weight"] > 0
    payload = encode(weights, masks={"a.weight": mask})

    with pytest.raises(CodecError, match="mask"):
        decode(payload)
    with pytest.raises(CodecError, match="mask"):
        decode(payload, {"a.weight": np.roll(mask, 1)})


def test_a_mask_of_another_shape_is_refused():
    """A mask that does not fit its tensor is refused when encoding."""
    with pytest.raises(CodecError, match=r"mask of 'a.weight'"):
        encode(model(), masks={"a.weight": np.ones(5, bool)})


def test_the_methods_tensors_are_never_rounded():
    """A tensor with a slash in its name keeps every bit, whatever the encoding."""
    weights = model() | {"control/a.weight": model(1)["a.weight"]}

    back = decode(encode(weights, encoding="int8", compact=True), like=weights)

    assert back["control/a.weight"].tobytes() == weights["control/a.weight"].tobytes()
    assert back["a.weight"].tobytes() != weights["a.weight"].tobytes()


def test_absent_is_never_zero():
    """A tensor that was not sent is absent from the result."""
    part = {n: t for n, t in model().items() if layer_of(n) == "b"}

    assert set(decode(encode(part))) == {"b.weight", "b.bias"}


@given(ANY, st.data())
def test_truncated_bytes_are_refused(weights, data):
    """Any proper prefix of a payload, and any longer one, raises CodecError."""
    payload = encode(weights)
    length = data.draw(st.integers(0, len(payload) - 1))

    with pytest.raises(CodecError):
        decode(payload[:length])
    with pytest.raises(CodecError):
        decode(payload + b"\0")


@given(FINITE, st.data(), st.sampled_from(["dense", "int8"]))
def test_flipped_bytes_never_crash(weights, data, encoding):
    """A payload with bytes changed gives weights or CodecError, nothing else."""
    payload = bytearray(encode(weights, encoding=encoding))
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))

    try:
        back = decode(bytes(payload))
    except CodecError:
        return
    assert all(t.dtype == np.float32 for t in back.values())


@given(st.binary(max_size=400))
def test_arbitrary_bytes_never_crash(content):
    """Bytes from anywhere give weights or CodecError."""
    header = len(content).to_bytes(8, "little") + content
    for payload in (content, header):
        try:
            decode(payload)
        except CodecError:
            continue


@pytest.mark.parametrize(
    "header",
    [
        b'{"w":{"dtype":"F32","shape":[18446744073709551615,2],"data_offsets":[0,0]}}',
        b'{"w":{"dtype":"F32","shape":[0,9223372036854775807],"data_offsets":[0,0]}}',
        b'{"w":{"dtype":"BF16","shape":[0],"data_offsets":[0,0]}}',
        b'{"w":{"dtype":"I64","shape":[0],"data_offsets":[0,0]}}',
        b'{"w":{"dtype":"F32","shape":[0,0,0,0,0,0,0,0,0],"data_offsets":[0,0]}}',
        b'{"../w":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
        b'{"w":{"dtype":"I8","shape":[0],"data_offsets":[0,0]}}',
        b'{"__metadata__":{"headwater":"{\\"scales\\":{\\"w\\":1e300}}"},'
        b'"w":{"dtype":"I8","shape":[0],"data_offsets":[0,0]}}',
        b'{"__metadata__":{"headwater":"{\\"scales\\":{\\"v\\":1.0}}"}}',
        b'{"__metadata__":{"headwater":"[1]"}}',
        b'{"__metadata__":{"headwater":7}}',
        b"[" * 5000,
    ],
)
def test_hostile_headers_are_refused(header):
    """Headers made to overflow, to mislead or to nest are refused."""
    with pytest.raises(CodecError):
        decode(len(header).to_bytes(8, "little") + header)


def test_long_headers_are_not_parsed():
    """A header over the cap is refused by its length, on both sides."""
    long = b"{" + b" " * MAX_HEADER_BYTES + b"}"
    with pytest.raises(CodecError, match="header"):
        decode(len(long).to_bytes(8, "little") + long)
    with pytest.raises(CodecError, match="header"):
        encode({f"t{i}": np.zeros(1, np.float32) for i in range(6000)})


@given(
    st.permutations(list(model().items())),
    st.sampled_from(["dense", "int8"]),
    st.sampled_from(["masks", "kept"]),
)
def test_the_same_weights_give_the_same_bytes(items, encoding, way):
    """Neither the order of names nor the memory layout shows in the bytes."""
    some = {n: t > -0.5 for n, t in items if n != "a.weight"}
    how = {"encoding": encoding, "compact": True, "seed": 5}
    first = encode(model(), **{way: dict(sorted(some.items()))}, **how)

    shuffled = {n: np.asfortranarray(t) for n, t in items}

    assert encode(shuffled, **{way: some}, **how) == first


def test_digest_is_sha256():
    """A digest is the SHA-256 in lower-case hexadecimal."""
    assert digest_of(b"river") == hashlib.sha256(b"river").hexdigest()


@pytest.mark.parametrize("name", ["", "__metadata__", "a b", "é", "x" * 201, "\n"])
def test_names_that_cannot_travel_are_refused(name):
    """A tensor name must be short and plain."""
    with pytest.raises(CodecError, match="name"):
        encode({name: np.zeros(1, np.float32)})


def test_only_float32_is_weights():
    """Another dtype is refused, not converted."""
    with pytest.raises(CodecError, match="float64"):
        encode({"w": np.zeros(2)})


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_int8_refuses_what_it_cannot_say(value):
    """NaN and infinity cannot be rounded to int8."""
    with pytest.raises(CodecError, match="'w'"):
        encode({"w": np.array([1, value], np.float32)}, encoding="int8")


def test_packed_tensors_keep_dtypes_and_text():
    """Other dtypes and a text travel through pack and unpack."""
    given_ = {"n": np.arange(3), "d": np.linspace(0, 1, 4), "b": np.int8([1, -1])}

    back, text = unpack(pack(given_, "facts: é"))

    assert text == "facts: é"
    assert all(np.array_equal(back[n], t) and back[n].dtype == t.dtype for n, t in given_.items())


def test_a_fitting_update_passes():
    """An update with exactly the tensors asked for is let through."""
    check_update(model(1), model())
    check_update({n: t for n, t in model(1).items() if n.startswith("a.")}, model(), ["a"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"b.bias": None}, r"lacks tensor 'b.bias'"),
        ({"c.bias": np.zeros(2, np.float32)}, r"has tensor 'c.bias'"),
        ({"b.bias": np.zeros(3, np.float32)}, r"'b.bias' has shape \(3,\); expected \(2,\)"),
        ({"b.bias": np.zeros(2)}, r"'b.bias' is float64; expected float32"),
        ({"b.bias": np.array([1, np.nan], np.float32)}, r"'b.bias' has 1 values"),
        ({"a.bias": np.array([1, -np.inf, 0], np.float32)}, r"'a.bias' has 1 values"),
    ],
)
def test_unfit_updates_are_refused(change, words):
    """A refusal names the tensor, the fact and the expectation."""
    update = {n: t for n, t in (model(1) | change).items() if t is not None}

    with pytest.raises(CodecError, match=words):
        check_update(update, model())


def test_layers_not_asked_for_are_refused():
    """A whole model is refused where one layer was asked for."""
    with pytest.raises(CodecError, match="not asked for"):
        check_update(model(1), model(), ["a"])


STATE = "control/a.weight"


def test_the_methods_tensors_are_always_expected():
    """What the base holds beside the model must come back in full, whatever layers were asked."""
    base = model() | {STATE: np.zeros((3, 4), np.float32)}
    state = {STATE: np.ones((3, 4), np.float32)}

    check_update(state, base, ())
    check_update({"b.bias": base["b.bias"], "b.weight": base["b.weight"]} | state, base, ["b"])

    with pytest.raises(CodecError, match=f"lacks tensor '{STATE}'"):
        check_update({"b.bias": base["b.bias"], "b.weight": base["b.weight"]}, base, ["b"])
    with pytest.raises(CodecError, match="shape"):
        check_update({STATE: np.ones((2, 4), np.float32)}, base, (), narrower=True)


def test_no_layers_is_a_fitting_update():
    """Where no layer was asked for, nothing is what fits."""
    check_update({}, model(), ())

    with pytest.raises(CodecError, match="not asked for"):
        check_update({"b.bias": model()["b.bias"]}, model(), ())


def test_narrower_updates_pass_where_they_are_expected():
    """Leading slices pass if the device's model may be narrower, and only then."""
    narrow = {n: t[tuple(slice(max(1, s - 1)) for s in t.shape)] for n, t in model().items()}

    check_update(narrow, model(), narrower=True)
    check_update(model(), model(), narrower=True)

    with pytest.raises(CodecError, match=r"shape \(2,\); expected \(3,\)"):
        check_update(narrow, model())


@pytest.mark.parametrize("shape", [(4, 4), (3, 5), (12,), (3, 4, 1), (0, 4), ()])
def test_what_is_no_leading_slice_is_refused(shape):
    """Larger in a dimension, empty, or of other dimensions: refused."""
    with pytest.raises(CodecError, match="expected"):
        check_part("a.weight", np.zeros(shape, np.float32), model()["a.weight"])
