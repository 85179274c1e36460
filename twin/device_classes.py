"""Classes of devices that one meets, in figures that are documented or said to be assumed.

Where a figure is assumed, it is the order of magnitude that matters; fit a class to devices of
one's own before believing in seconds. Energies come from power and time, never out of the air.
"""

from collections.abc import Mapping
from types import MappingProxyType

from twin.physics import Physics, joules_per_mb

_MAH_V_J = 3.6  # 1 mAh at 1 V

RASPBERRY_PI_4 = Physics(
    macs_per_s=2e9,
    memory_bytes=2_000_000_000,
    step_s=0.005,
    training_w=3.7,
    up_bps=10e6,
    down_bps=50e6,
    up_j_per_mb=joules_per_mb(1.0, 10e6),
    down_j_per_mb=joules_per_mb(1.0, 50e6),
    idle_w=2.7,
)
"""A Raspberry Pi 4 B with 4 GB, on mains, behind home broadband.

Power: 540 mA idle and 1,280 mA with all four cores busy, at 5 V (J. Geerling, pidramble.com,
"Power Consumption Benchmarks"). Rate: four Cortex-A72 of 1.5 GHz with 4 float32 multiply-adds a
cycle come to 24e9 a second at the peak; a twelfth of it is assumed for small models, and 5 ms
a step for the interpreter. Assumed too: half of the memory, a radio of 1 W above idle while it
sends or receives, 10 Mbit/s up and 50 down.
"""

PHONE = Physics(
    macs_per_s=4e9,
    memory_bytes=1_000_000_000,
    step_s=0.003,
    training_w=2.5,
    up_bps=6e6,
    down_bps=13e6,
    up_j_per_mb=joules_per_mb(0.43839 * 6 + 1.28804, 6e6),
    down_j_per_mb=joules_per_mb(0.05197 * 13 + 1.28804, 13e6),
    idle_w=0.069,
    battery_j=4000 * 3.85 * _MAH_V_J,
    charge_w=10.0,
    charging_hours=(22.0, 7.0),
    restart_share=0.15,
)
"""A phone on LTE that is charged at night.

Link: medians of 6 Mbit/s up and 13 down, and a power of 438.39 mW (up) or 51.97 mW (down) for
each Mbit/s, above 1,288.04 mW (Huang et al., MobiSys 2012, section 4 and table 4); the tail after a
transfer is left out. Idle: 69 mW suspended (Carroll and Heiser, USENIX ATC 2010). Battery: 4,000
mAh at 3.85 V; charger: 5 V at 2 A. Assumed: 4e9 multiply-adds a second at 2.5 W, what a phone
can lead off as heat for long, 3 ms a step, 1 GB for an app.
"""

MICROCONTROLLER = Physics(
    macs_per_s=4e7,
    memory_bytes=8_000_000,
    step_s=0.001,
    training_w=0.35,
    up_bps=5e6,
    down_bps=10e6,
    up_j_per_mb=joules_per_mb(0.95, 5e6),
    down_j_per_mb=joules_per_mb(0.3, 10e6),
    idle_w=0.007,
    battery_j=3000 * 3.6 * _MAH_V_J,
    charge_w=0.5,
    charging_hours=(9.0, 16.0),
    restart_share=0.2,
)
"""A board like an ESP32-S3 with 8 MB of PSRAM, one 18650 cell and a small solar panel.

Power at 3.3 V, from Espressif's data sheet, rounded: some 108 mA with both cores busy at 240
MHz, 290 mA to send and 90 mA to receive 802.11n. Battery: 3,000 mAh at 3.6 V. Assumed: a
multiply-add every twelve cycles of each core, 2 mA on average between light sleep and beacons,
5 Mbit/s up and 10 down under TLS, half a watt of sun from nine to four.
"""

CLASSES: Mapping[str, Physics] = MappingProxyType(
    {
        "raspberry_pi_4": RASPBERRY_PI_4,
        "phone": PHONE,
        "microcontroller": MICROCONTROLLER,
    }
)
"""The classes by the names that scenarios use."""
