"""A mistake in what a fleet is like is named by the whole path of its key."""

import pytest

from federation.errors import ConfigError
from simulations.scenario import read_scenario

SMALL = """
[run]
name = "small"
rounds = 2
model = { name = "linear" }
policy = { devices_per_round = 3 }
[fleet]
devices = 4
"""

PHONES = """
[[device.classes]]
like = "phone"
share = 0.5
[[device.classes]]
like = "microcontroller"
share = 0.5
"""


def read(tmp_path, added):
    path = tmp_path / "scenario.toml"
    path.write_text(SMALL + added, encoding="utf-8")
    return read_scenario(path)


@pytest.mark.parametrize(
    ("added", "said"),
    [
        (PHONES + "battery_j = -3", "device.classes[1].battery_j is -3.0; expected 0 or more"),
        (PHONES + "macs_per_s = 0", "device.classes[1].macs_per_s is 0.0; expected above 0"),
        (PHONES + "up_bps = inf", "device.classes[1].up_bps is inf"),
        (PHONES + "idle_w = nan", "device.classes[1].idle_w is nan"),
        (PHONES + "charging_hours = [22, 25]", "device.classes[1].charging_hours is (22.0, 25.0)"),
        (PHONES + "restart_share = 0", "device.classes[1].restart_share is 0.0"),
        (PHONES + "level = 65", "device.classes[1].level is 65"),
        (PHONES + "battery_j = 'full'", "device.classes[1].battery_j is text in quotes"),
        (PHONES + "batery_j = 3", "unknown key 'batery_j'; [device.classes[1]] may have"),
        (PHONES.replace("'phone'", "'fone'").replace('"phone"', '"fone"'), "classes[0].like"),
        (PHONES + "[[device.classes]]\nshare = 0.0", "device.classes[2].share is 0.0"),
        (PHONES + "[[device.classes]]\nshare = 0.5", "device.classes.share is [0.5, 0.5, 0.5]"),
        ("[device]\nseconds_per_step = 0.5" + PHONES, "device.seconds_per_step is 0.5; expected"),
        ("[device]\nclock_drift_ppm = -1", "device.clock_drift_ppm is -1"),
        ("[device]\nclock_offset_s = inf", "device.clock_offset_s is inf"),
        ("[device]\ninitial_charge = [0.9, 0.1]", "device.initial_charge is [0.9, 0.1]"),
        ("[link]\nup_bps = -1", "link.up_bps is -1"),
        ("[link]\nrate_bps = 1", "unknown key 'rate_bps'; [link] may have"),
        ("[availability]\nkind = 'sometimes'", "availability.kind is 'sometimes'"),
        ("[availability]\nkind = 'markov'\non_s = [1, 2]", "availability.on_s is (1.0, 2.0)"),
        ("[availability]\noff_s = 0", "availability.off_s is 0"),
        ("[availability]\nblock_s = 0", "availability.block_s is 0"),
        ("[availability]\nstarts_hour = 168", "availability.starts_hour is 168"),
        ("[availability]\nkind = 'trace'", "availability.trace is missing; expected a .csv"),
        ("[availability]\ntrace = 3", "availability.trace is a whole number; expected"),
        ("[availability]\ntrace_shift_s = -1", "availability.trace_shift_s is -1"),
        ("[availability.outages]\nregions = -1", "availability.outages.regions is -1"),
        ("[availability.outages]\nevery_s = 0", "availability.outages.every_s is 0"),
        ("[availability.outages]\nlasts_s = [9, 1]", "availability.outages.lasts_s is [9.0, 1.0]"),
        ("[availability.outages]\nregion = 1", "unknown key 'region'; [availability.outages]"),
        ("[availability]\nq = [0.0, 0.0, 0.0, 0.0, 1.0]", "availability.q is"),
        ("[failures]\nchance = 2", "failures.chance is 2"),
        ("[failures]\nphases = { lunch = 1 }", "failures.phases is 'lunch'; expected one of"),
        ("[failures.phases]\nmid-upload = -1", "failures.phases.mid-upload is -1"),
        ("[failures.phases]\nmid-upload = 0", "failures.phases is {'mid-upload': 0.0}"),
        ("[failures]\naway_s = [2, 1]", "failures.away_s is [2.0, 1.0]"),
        ("[failures]\nchances = 0.1", "unknown key 'chances'; [failures] may have"),
        ("[[faults]]\nkind = 'leave'\ndevice = 'd00'\nat_s = -1", "faults[0].at_s is -1"),
        (
            "[[faults]]\nkind = 'leave'\ndevice = 'd00'\nat_s = 1\n"
            "[[faults]]\nkind = 'kill'\ndevice = 'd00'",
            "faults[1].at_s is missing, and so is phase; expected either at_s or phase",
        ),
        (
            "[[faults]]\nkind = 'hub-kill'\nat_s = 1\nphase = 'round-open'",
            "faults[0].at_s is given together with phase",
        ),
        ("[[faults]]\nkind = 'cut'\ndevices = []\nat_s = 1\nfor_s = 1", "faults[0].devices is"),
        ("partition = 'drawn'", "fleet.samples is 0; expected 1 or more"),
    ],
)
def test_a_mistake_is_named_by_its_path(tmp_path, added, said):
    """The message has the file, the key's path, its value and what was expected."""
    with pytest.raises(ConfigError, match=r"scenario\.toml") as caught:
        read(tmp_path, added)

    assert said in str(caught.value)


def test_tables_say_what_they_say(tmp_path):
    """A class keeps the figures of the class it is like, but for its own."""
    phone, board = read(tmp_path, PHONES + "battery_j = 60\n").device.classes

    assert phone.physics().battery_j == pytest.approx(55_440.0)
    assert (board.physics().battery_j, board.physics().charge_w) == (60.0, 0.5)
    hours = read(tmp_path, "[availability]\nkind = 'markov'\non_s = 60\noff_s = " + str([60] * 24))
    assert hours.availability.on_s == 60.0
    assert len(hours.availability.off_s) == 24
