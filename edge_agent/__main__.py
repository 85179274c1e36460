"""`headwater-agent`: run one device from its `agent.toml`.

Written with argparse and the standard library alone, since it is installed on small devices.
"""

import argparse
import logging
import os
import random
import signal
import sys
from pathlib import Path
from typing import NoReturn

from edge_agent.cascade_report import CascadeReport
from edge_agent.config import read_agent_config
from federation.errors import HeadwaterError
from federation.protocol.clock import steady_clock


def main() -> None:
    """The command line. Exit code 0: stopped as asked; 2: something the user can mend."""
    arguments = _parser().parse_args()
    level = logging.INFO if arguments.verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    try:
        sys.exit(arguments.verb(arguments))
    except HeadwaterError as error:
        sys.stderr.write(f"headwater-agent: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read our words has gone, as `head` does; Python shall not try again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("headwater-agent", description="One device of a fleet.")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    run = verbs.add_parser("run", help="train and infer as the hub asks, until stopped")
    run.add_argument("config", type=Path, help="the device's agent.toml")
    run.set_defaults(verb=_run)
    # Before or after the verb: whoever looks for a fault should not have to look for a flag.
    for place, default in ((parser, False), (run, argparse.SUPPRESS)):
        place.add_argument("--verbose", action="store_true", default=default, help="log each step")
    check = verbs.add_parser("check", help="see whether configuration, data and broker will do")
    check.add_argument("config", type=Path, help="the device's agent.toml")
    check.set_defaults(verb=_check)
    predict = verbs.add_parser("predict", help="infer with the newest release that was fetched")
    predict.add_argument("config", type=Path, help="the device's agent.toml")
    predict.add_argument("input", type=Path, help="an .npz with the array x (samples first)")
    predict.set_defaults(verb=_predict)
    return parser


def _run(arguments: argparse.Namespace) -> int:
    from edge_agent.runner import AgentRunner

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end_now)
    config = read_agent_config(arguments.config)
    runner = AgentRunner(config, clock=steady_clock(), rng=random.Random())  # noqa: S311 -- jitter
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: runner.stop())
    runner.run()
    return 0


def _end_now(*_: object) -> NoReturn:
    """Nothing has begun yet, so there is nothing to bring to an end."""
    sys.exit(0)


def _check(arguments: argparse.Namespace) -> int:
    from edge_agent.checking import check_agent

    for line in check_agent(read_agent_config(arguments.config)):
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
    return 0


def _predict(arguments: argparse.Namespace) -> int:
    from edge_agent.predicting import predict_file

    reports: list[CascadeReport] = []
    config = read_agent_config(arguments.config)
    for line in predict_file(config, arguments.input, reports.append):
        sys.stdout.write(f"{line}\n")
    for report in reports:
        sys.stderr.write(f"{report.told()}\n")
    return 0


if __name__ == "__main__":
    main()
