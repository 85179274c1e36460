"""Does a work with one driver: `python -m benchmarks.simulation_peers DRIVER WORK MARKS`."""

import importlib
import sys

from benchmarks.simulation_peers.work import read_work

if __name__ == "__main__":
    # By name, since Ray's processes look a driver's functions up where they stand.
    driver = importlib.import_module(f"benchmarks.simulation_peers.{sys.argv[1]}")
    if (marks := driver.run(read_work(sys.argv[2]))) is not None:
        marks.save(sys.argv[3])
