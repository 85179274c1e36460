"""What simulating a fleet costs, beside Flower, pfl-research and a plain loop over torch."""

import argparse
import sys
from functools import partial, update_wrapper

from benchmarks.claims import Claim, Options, main
from benchmarks.simulation_peers.accelerator import measure_accelerator
from benchmarks.simulation_peers.comparison import NOOP, OVERHEAD, SMALL, all_drivers, compare
from benchmarks.simulation_peers.scale import measure_scale

PARTS = ("overhead", "small", "accelerator", "scale")


def measure(options: Options, parts: tuple[str, ...] = PARTS) -> list[Claim]:
    """CPU and wall time of simulated rounds, start-up and memory, all processes counted.

    Parts: `overhead` (nobody trains), `small` (small models), `accelerator` (the same where torch
    sees one), `scale` (a million devices); --claim PART measures one alone.
    """
    cases = (*(OVERHEAD if "overhead" in parts else ()), *(SMALL if "small" in parts else ()))
    claims: list[Claim] = []
    if cases and options.is_quick:
        options.tell("left out of --quick: 100 of 1,000 clients, convolutions, two processes")
        cases = tuple(case for case in cases if case == NOOP or case == SMALL[0])
    if cases:
        blocks = 1 if options.is_quick else 3
        claims += compare(options, all_drivers(options), cases, blocks=blocks)
    if "accelerator" in parts:
        claims += measure_accelerator(options)
    if "scale" in parts:
        claims += measure_scale(options)
    return claims


def _parts() -> tuple[str, ...]:
    """The parts that the command line asks for; the rest of it is left for `main`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--claim", choices=PARTS, action="append")
    asked, rest = parser.parse_known_args()
    sys.argv[1:] = rest
    return tuple(asked.claim or PARTS)


if __name__ == "__main__":
    main("simulation", update_wrapper(partial(measure, parts=_parts()), measure))
