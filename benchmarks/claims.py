"""What every benchmark gives: claims, each with its peer and its goal, shown as a table or JSON."""

import argparse
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import psutil
from rich.console import Console
from rich.table import Table

from federation.errors import HeadwaterError

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache"

BUSY_LOAD = 0.25
"""With more than this many runnable processes a core before the start, figures are doubtful."""

BrokerKind = Literal["auto", "mosquitto", "nats"]


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """One measured figure. Less is better; `holds` says whether it is at most the goal.

    `ratio` is the value over the peer's: None where there is no peer, or it gave no figure;
    `peer` then says why.
    """

    name: str
    value: float
    unit: str
    peer: str = ""
    peer_value: float | None = None
    ratio: float | None = None
    goal: float | None = None
    holds: bool | None = None


@dataclass(frozen=True, slots=True)
class Options:
    """How a benchmark was asked to run. `folder` is on a disk and empty; `tell` shows progress."""

    is_quick: bool
    broker: BrokerKind
    folder: Path
    tell: Callable[[str], None]


def claim(
    name: str,
    value: float,
    unit: str,
    *,
    peer: str = "",
    peer_value: float | None = None,
    goal: float | None = None,
) -> Claim:
    """A claim with its ratio and whether it holds; figures are rounded to five digits."""
    return Claim(
        name=name,
        value=_short(value),
        unit=unit,
        peer=peer,
        peer_value=None if peer_value is None else _short(peer_value),
        ratio=_short(value / peer_value) if peer_value else None,
        goal=goal,
        holds=None if goal is None else value <= goal,
    )


def machine() -> dict[str, Any]:
    """What the figures depend on: the machine, and how busy it is with other work now."""
    cores = os.cpu_count() or 1
    load = os.getloadavg()[0]
    return {
        "cpu": _cpu_name(),
        "cores": cores,
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load_before": round(load, 2),
        "was_busy": load > BUSY_LOAD * cores,
    }


def main(name: str, measure: Callable[[Options], list[Claim]]) -> None:
    """The command line of a benchmark. Exit code 0: measured; 2: something can be mended."""
    arguments = _parser(name, measure.__doc__ or "").parse_args()
    fetched = CACHE / "mosquitto"
    if fetched.is_dir():
        os.environ.setdefault("HEADWATER_MOSQUITTO", str(fetched))
    host = machine() | {"is_quick": arguments.quick}
    try:
        with _work_folder(name) as folder:
            options = Options(arguments.quick, arguments.broker, folder, _tell)
            claims = measure(options)
    except HeadwaterError as error:
        sys.stderr.write(f"benchmarks.{name}: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    if arguments.json:
        result = {"benchmark": name, "machine": host, "claims": claims}
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(result)).decode() + "\n")
    else:
        Console(width=None if sys.stdout.isatty() else 150).print(_table(name, host, claims))


def _parser(name: str, about: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(f"python -m benchmarks.{name}", description=about)
    parser.add_argument("--quick", action="store_true", help="end in under a minute, measure less")
    parser.add_argument("--json", action="store_true", help="print one JSON object, no table")
    parser.add_argument("--broker", choices=("auto", "mosquitto", "nats"), default="auto")
    return parser


@contextmanager
def _work_folder(name: str) -> Iterator[Path]:
    # Beside the sources, not in /tmp: that may be memory, where forcing to disk costs nothing.
    CACHE.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"benchmark-{name}-", dir=CACHE))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _tell(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _table(name: str, host: dict[str, Any], claims: list[Claim]) -> Table:
    busy = " (busy: figures are doubtful)" if host["was_busy"] else ""
    caption = (
        f"{host['cpu']}, {host['cores']} cores, {host['memory_gb']} GB, {host['system']}, "
        f"Python {host['python']}; load before: {host['load_before']}{busy}"
    )
    table = Table(title=name, caption=caption)
    for heading, justify in (("claim", "left"), ("value", "right"), ("goal", "right")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for heading in ("holds", "peer", "peer's value", "ratio"):
        table.add_column(heading, justify="left" if heading == "peer" else "right")
    for each in claims:
        holds = {None: "", True: "yes", False: "[bold red]no[/]"}[each.holds]
        table.add_row(
            each.name,
            f"{each.value:g} {each.unit}",
            "" if each.goal is None else f"{each.goal:g}",
            holds,
            each.peer,
            "" if each.peer_value is None else f"{each.peer_value:g}",
            "" if each.ratio is None else f"{each.ratio:.3g}",
        )
    return table


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
