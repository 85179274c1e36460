"""Starts a SuperLink and SuperNodes, runs the no-op app on them, and times its rounds."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from benchmarks.claims import Options
from benchmarks.environments import Environment, find_environment, make_environment
from benchmarks.fleet import check_alive, running
from benchmarks.processes import cpu_s, wait_until
from federation.errors import HeadwaterError
from simulations.processes import Process, free_port

APP = Path(__file__).parent / "app"

REQUIREMENT = "flwr>=1.41,<2"

START_S = 90.0


@dataclass(frozen=True, slots=True)
class Timing:
    """Wall seconds of each round, and the CPU seconds all processes spend on one."""

    seconds: list[float]
    cpu_s_per_round: float


@dataclass(slots=True)
class Flower:
    """A deployment that is up."""

    environment: Environment
    folder: Path
    link: Process
    nodes: list[Process]
    _runs: int = 0

    @property
    def name(self) -> str:
        """What to call it in a claim."""
        return f"Flower {self.environment.version('flwr')}"

    @property
    def pids(self) -> list[int]:
        """All processes of the deployment; what they start descends from them."""
        return [self.link.pid, *(node.pid for node in self.nodes)]

    def run(self, *, rounds: int, parameters: int, patience_s: float) -> Timing:
        """What the rounds of one run take, the first left out; its clients do nothing.

        A run that is not over within `patience_s` gives the rounds it got to.

        Raises:
            HeadwaterError: it did not get to the end of its second round.
        """
        self._runs += 1
        marks = self.folder / f"marks-{self._runs}.txt"
        settings = {"rounds": rounds, "nodes": len(self.nodes), "parameters": parameters}
        told = " ".join(f"{key}={value}" for key, value in settings.items())
        start = _command(self.environment, self.folder, "flwr", "run", str(self.folder / "app"))
        start.command += ["bench", "--run-config", f'{told} marks="{marks}"']
        cpu_at: dict[int, float] = {}

        def is_over() -> bool:
            over = len(_marks(marks)) - 1  # the first mark is the start
            if over >= 1 and over not in cpu_at:
                cpu_at[over] = cpu_s(self.pids)
            return over >= rounds

        with running([start]):
            try:
                wait_until(is_over, "Flower's run", patience_s=patience_s, every_s=0.05)
            except HeadwaterError as error:
                if len(cpu_at) < 2:
                    raise HeadwaterError(f"{error}\n{start.last_words()}") from error
        ends = _marks(marks)[1:]
        first, last = min(cpu_at), max(cpu_at)
        return Timing(
            [later - earlier for earlier, later in pairwise(ends)],
            (cpu_at[last] - cpu_at[first]) / (last - first),
        )


@contextmanager
def flower_deployment(environment: Environment, folder: Path, *, nodes: int) -> Iterator[Flower]:
    """A SuperLink and SuperNodes on loopback, without TLS; all ended at the end."""
    port = free_port()
    home = folder / "home"
    home.mkdir(parents=True)
    (home / "config.toml").write_text(
        '[superlink]\ndefault = "bench"\n\n'
        f'[superlink.bench]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    shutil.copytree(APP, folder / "app", ignore=shutil.ignore_patterns("__pycache__"))
    link = _command(environment, folder, "flower-superlink", "--insecure", "--host", "127.0.0.1")
    link.command += ["--port", str(port), "--disable-runtime-dependency-installation"]
    with running([link]):
        wait_until(lambda: _is_up(link), "start of Flower's SuperLink", patience_s=START_S)
        supernodes = [_supernode(environment, folder, port, index) for index in range(nodes)]
        with running(supernodes):
            yield Flower(environment, folder, link, supernodes)


def flower_environment(options: Options) -> Environment | None:
    """Flower in an environment of its own, made at the first full run; None: left out, as told."""
    if options.is_quick:
        found = find_environment("flwr")
        if found is None:
            options.tell("Flower is left out: --quick uses it only once a full run installed it")
        return found
    try:
        return make_environment("flwr", [REQUIREMENT], afresh=False)
    except HeadwaterError as error:
        options.tell(f"Flower is left out: {error}")
        return None


def _supernode(environment: Environment, folder: Path, port: int, index: int) -> Process:
    node = _command(environment, folder, "flower-supernode", "--insecure")
    node.log = folder / f"flower-supernode-{index}.log"
    node.command += ["--superlink", f"127.0.0.1:{port}", "--port", str(free_port())]
    return node


def _command(environment: Environment, folder: Path, name: str, *arguments: str) -> Process:
    programs = environment.folder.resolve() / "bin"
    variables = {
        "FLWR_HOME": str(folder.resolve() / "home"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PATH": f"{programs}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    return Process([str(programs / name), *arguments], folder / f"{name}.log", variables)


def _is_up(link: Process) -> bool:
    check_alive([link])
    return "uvicorn running" in link.last_words(50).lower()


def _marks(path: Path) -> list[float]:
    return [float(line) for line in path.read_text().split()] if path.exists() else []
