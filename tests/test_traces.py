"""A fleet is there as the devices of a recorded trace were, from CSV and from Parquet."""

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from federation.errors import ConfigError, DataError
from simulations.presence.kinds import presence_of
from simulations.presence.traces import Recorded, read_trace
from simulations.scenario import read_scenario
from simulations.tables import AvailabilityPlan

TRACE = """device,on_s,off_s,battery
oak,0,10,0.5
elm,20,40,0.4
oak,30,50,0.3
elm,35,60,0.9
ash,5,100,0.1
"""


def written(tmp_path, text=TRACE, name="trace.csv"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def recorded(tmp_path, devices=3, **plan):
    return presence_of(
        AvailabilityPlan(kind="trace", trace=written(tmp_path), **plan), devices, seed=0
    )


def test_devices_are_there_when_they_were(tmp_path):
    """In the order of their first lines; times that touch or overlap are one."""
    presence = recorded(tmp_path)

    seen = {now: presence.on(1, now).tolist() for now in (0.0, 10.0, 39.0, 55.0, 99.0)}

    assert seen == {
        0.0: [True, False, False],
        10.0: [False, False, True],
        39.0: [True, True, True],
        55.0: [False, True, True],
        99.0: [False, False, True],
    }
    assert presence.leaves_at(1, 1, 25.0) == 60.0
    assert presence.returns_at(0, 1, 12.0) == 30.0
    assert presence.returns_at(0, 1, 31.0) == 31.0


def test_a_trace_repeats(tmp_path):
    """Again at its end, or every period; over the end a time on goes on."""
    short, long = recorded(tmp_path), recorded(tmp_path, trace_period_s=200.0)

    assert short.on(1, 139.0).tolist() == [True, True, True]
    assert long.on(1, 139.0).tolist() == [False, False, False]
    assert long.on(1, 239.0).tolist() == [True, True, True]
    assert short.returns_at(0, 1, 60.0) == 100.0
    assert long.returns_at(0, 1, 60.0) == 200.0
    with pytest.raises(ConfigError, match=r"trace_period_s is 50\.0; the trace ends at 100"):
        recorded(tmp_path, trace_period_s=50.0)


def test_a_time_on_goes_on_over_the_end(tmp_path):
    """What is on at the end and at the beginning leaves only at the first end."""
    text = "device,on_s,off_s\na,0,10\na,80,100\nb,0,100\n"
    presence = Recorded(read_trace(written(tmp_path, text)), 2)

    assert presence.leaves_at(0, 1, 90.0) == 110.0
    assert presence.leaves_at(1, 1, 90.0) == math.inf


def test_a_larger_fleet_goes_through_the_trace_again(tmp_path):
    """Device i is as the trace's i modulo 3, later by a shift for each turn."""
    together, apart = recorded(tmp_path, 7), recorded(tmp_path, 7, trace_shift_s=25.0)

    assert together.on(1, 55.0).tolist() == [False, True, True, False, True, True, False]
    assert apart.on(1, 5.0).tolist() == [True, False, True, True, True, True, False]
    for now in np.arange(0.0, 220.0, 7.0):
        assert apart.on(1, now).tolist() == [apart.is_on(place, 1, now) for place in range(7)]


@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 50), st.integers(1, 20)), min_size=1,
        max_size=30,
    ),
    st.integers(0, 300),
)  # fmt: skip
def test_any_trace_is_what_its_lines_say(tmp_path_factory, lines, now):
    """A device is on where one of its lines covers the time of the trace, and nowhere else."""
    text = "device,on_s,off_s\n" + "".join(f"{d},{on},{on + n}\n" for d, on, n in lines)
    presence = Recorded(read_trace(written(tmp_path_factory.mktemp("trace"), text)), 5)
    names = list(dict.fromkeys(d for d, _, _ in lines))
    at = now % max(on + n for _, on, n in lines)

    whole = presence.on(1, float(now)).tolist()

    for place in range(5):
        own = [(on, on + n) for d, on, n in lines if d == names[place % len(names)]]
        assert whole[place] == any(on <= at < off for on, off in own)
        assert presence.is_on(place, 1, float(now)) == whole[place]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("device,on_s\na,1\n", "no column 'off_s'"),
        ("device,on_s,off_s\n", "has no times"),
        ("device,on_s,off_s\na,1,soon\n", "line 2: off_s is 'soon'"),
        ("device,on_s,off_s\na,1\n", "line 2: off_s is None"),
        ("device,on_s,off_s\na,0,1\na,5,5\n", "row 2: on_s is 5 and off_s 5"),
        ("device,on_s,off_s\na,-1,5\n", "row 1: on_s is -1"),
        ("device,on_s,off_s\na,nan,5\n", "row 1: on_s is nan"),
        ("device,on_s,off_s\na,1,inf\n", "off_s inf"),
    ],
)
def test_a_bad_trace_is_refused(tmp_path, text, said):
    """The message names the file, and the line or row."""
    with pytest.raises(DataError, match=r"trace\.csv") as caught:
        read_trace(written(tmp_path, text))

    assert said in str(caught.value)


def test_a_file_that_is_no_trace_is_refused(tmp_path):
    """Absent, of another kind, or not text: one sentence, with the remedy."""
    with pytest.raises(ConfigError, match=r"neither \.csv nor \.parquet"):
        read_trace(written(tmp_path, name="trace.json"))
    with pytest.raises(ConfigError, match="there is no trace"):
        read_trace(tmp_path / "none.csv")
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read"):
        read_trace(tmp_path / "bytes.csv")


def test_parquet_says_the_same(tmp_path):
    """The same rows as Parquet are the same fleet; a file that is none is refused."""
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {
        "device": ["oak", "elm", "oak", "elm", "ash"],
        "on_s": [0, 20, 30, 35, 5],
        "off_s": [10, 40, 50, 60, 100],
    }
    path = tmp_path / "trace.parquet"
    parquet.write_table(pyarrow.table(columns), path)

    one, two = read_trace(path), read_trace(written(tmp_path))

    for field in ("first", "on_s", "off_s"):
        assert getattr(one, field).tolist() == getattr(two, field).tolist()
    parquet.write_table(pyarrow.table({"device": ["a"], "on_s": [1]}), path)
    with pytest.raises(DataError, match="no column 'off_s'"):
        read_trace(path)
    path.write_bytes(b"not parquet")
    with pytest.raises(DataError, match="cannot be read"):
        read_trace(path)


def test_parquet_without_its_reader_is_said(tmp_path, monkeypatch):
    """Where pyarrow is not installed, the message says what to install."""
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)

    with pytest.raises(ConfigError, match="pip install pyarrow"):
        read_trace(written(tmp_path, name="trace.parquet"))


def test_a_trace_lies_beside_its_scenario(tmp_path):
    """A relative path is relative to the scenario's file, and a variant may name another."""
    written(tmp_path)
    text = """
[run]
name = "t"
rounds = 1
model = { name = "linear" }
policy = { devices_per_round = 1 }
[fleet]
devices = 3
[availability]
kind = "trace"
trace = "trace.csv"
[[variants]]
name = "shifted"
availability = { trace_shift_s = 5.0 }
"""
    scenario = read_scenario(written(tmp_path, text, "scenario.toml"))

    assert scenario.availability.trace == (tmp_path / "trace.csv").resolve()
    presence = presence_of(scenario.availability, 3, scenario.seed)
    assert presence.on(1, 39.0).all()
    assert msgspec.structs.asdict(scenario.availability)["trace_shift_s"] == 0.0
