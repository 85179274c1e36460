import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from federation.errors import CodecError, ProtocolError
from federation.learning.aggregation import WeightedMean, staleness_weight
from federation.learning.layers import choose_layers, group_layers

SHAPES = {"a.weight": (4, 3), "a.bias": (4,), "b.weight": (2, 4)}
BASE = {name: np.full(shape, 7, np.float32) for name, shape in SHAPES.items()}


def update(seed, names=tuple(SHAPES)):
    rng = np.random.default_rng(seed)
    scale = 10.0 ** rng.integers(-3, 6)
    return {n: (scale * rng.standard_normal(SHAPES[n])).astype(np.float32) for n in names}


def aggregate(contributions, base=BASE):
    mean = WeightedMean()
    for device, tensors, weight in contributions:
        mean.add(device, tensors, weight)
    return mean.apply(base)


FLEET = st.lists(
    st.tuples(
        st.integers(0, 2**32 - 1),
        st.sets(st.sampled_from(sorted(SHAPES))),
        st.floats(0, 1e4),
    ),
    max_size=8,
)


@given(FLEET, st.data())
def test_any_order_of_arrival_gives_the_same_bits(fleet, data):
    """Whatever the order in which updates arrive, the result has the same bits."""
    contributions = [
        (f"d{i:02}", update(seed, sorted(names)), weight)
        for i, (seed, names, weight) in enumerate(fleet)
    ]
    shuffled = data.draw(st.permutations(contributions))

    one, other = aggregate(contributions), aggregate(shuffled)

    assert list(one) == list(BASE)
    assert all(one[n].tobytes() == other[n].tobytes() for n in BASE)


@given(FLEET)
def test_it_is_the_weighted_mean_of_those_who_voted(fleet):
    """Each tensor is the mean over the devices that sent it, and the base where none did."""
    contributions = [
        (f"d{i:02}", update(seed, sorted(names)), weight)
        for i, (seed, names, weight) in enumerate(fleet)
    ]

    result = aggregate(contributions)

    for name, base in BASE.items():
        voters = [(t[name], w) for _, t, w in contributions if name in t and w > 0]
        expected = base
        if voters:
            stack = np.stack([t.astype(np.longdouble) for t, _ in voters])
            shares = np.array([w for _, w in voters], np.longdouble)
            expected = np.tensordot(shares / shares.sum(), stack, 1)
        scale = max((np.abs(t).max() for t, _ in voters), default=0)
        assert result[name].dtype == np.float32
        np.testing.assert_allclose(result[name], expected, rtol=1e-6, atol=1e-7 * scale)


def test_absent_is_never_zero():
    """A device that leaves a tensor out does not pull it towards zero."""
    whole, part = update(1), update(2, ("a.weight",))

    result = aggregate([("d1", whole, 1.0), ("d2", part, 99.0)])

    assert result["b.weight"].tobytes() == whole["b.weight"].tobytes()


def test_nobody_leaves_the_base_alone():
    """With no update, the base stays, as a copy."""
    result = aggregate([])

    assert all(np.array_equal(result[n], BASE[n]) for n in BASE)
    assert not any(np.shares_memory(result[n], BASE[n]) for n in BASE)


def test_sums_run_in_float64():
    """Many small contributions are not swallowed by a large one."""
    base = {"w": np.zeros(1, np.float32)}
    fleet = [("a", {"w": np.float32([2**25])}, 1.0)]
    fleet += [(f"b{i}", {"w": np.float32([1])}, 1.0) for i in range(255)]

    result = aggregate(fleet, base)

    assert result["w"][0] == np.float32((2**25 + 255) / 256)


def test_a_second_update_of_a_device_is_refused():
    """A device counts once."""
    mean = WeightedMean()
    mean.add("d1", update(1), 1.0)

    with pytest.raises(ProtocolError, match="second update of 'd1'"):
        mean.add("d1", update(2), 1.0)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf"), 1e16])
def test_weights_out_of_range_are_refused(weight):
    """A weight is a number from zero to the cap."""
    with pytest.raises(ProtocolError, match="weight"):
        WeightedMean().add("d1", update(1), weight)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"c": np.zeros(1, np.float32)}, ProtocolError),
        ({"a.bias": np.zeros(5, np.float32)}, CodecError),
        ({"a.bias": np.float32([1, np.nan, 0, 0])}, CodecError),
    ],
)
def test_unfit_updates_never_reach_the_mean(change, error):
    """A foreign, misshapen or broken tensor raises, naming it."""
    with pytest.raises(error, match=repr(next(iter(change)))):
        aggregate([("d1", update(1) | change, 1.0)])


def test_staleness_falls_polynomially():
    """A fresh update is worth 1, and an older one (1 + age)^-alpha."""
    assert staleness_weight(0) == 1.0
    assert staleness_weight(3, 0.5) == 0.5
    assert staleness_weight(9, 0.0) == 1.0


def test_layers_group_by_the_name_before_the_last_dot():
    """Weight and bias of a module are one layer."""
    assert group_layers(SHAPES) == {"a": ("a.weight", "a.bias"), "b": ("b.weight",)}
    assert set(choose_layers(BASE, ["a"])) == {"a.weight", "a.bias"}
    assert choose_layers(BASE, None) == BASE


def test_light_modules_reach_no_torch():
    """Aggregation, methods, data and layers load without torch."""
    code = (
        "import sys, federation.learning, federation.learning.aggregation, "
        "federation.learning.methods, federation.learning.data, federation.learning.layers, "
        "federation.learning.training; print('torch' in sys.modules)"
    )

    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert found.stdout.strip() == "False"
