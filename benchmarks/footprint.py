"""What a device pays: disk, import time and memory, beside an idle Flower SuperNode."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from benchmarks.claims import ROOT, Claim, Options, claim, main
from benchmarks.environments import (
    Environment,
    find_environment,
    installed_closure_mb,
    make_environment,
)
from benchmarks.flower.deployment import flower_environment
from benchmarks.residents import Resident, measure_residents

DISK_GOALS_MB = {"edge": 80.0, "edge,infer": 130.0}
MEMORY_GOALS_MB = {"idle": 45.0, "inferring": 80.0}

FIRST_RUN = {
    "edge": "import edge_agent.__main__, edge_agent.runner, edge_agent.trainer",
    "edge,infer": "import edge_agent.__main__, edge_agent.runner, edge_agent.inference",
}
"""What a device imports, so that an environment holds the byte code that it comes to hold."""

FLOWER_NODE = "flwr.supernode.cli"


@dataclass(frozen=True, slots=True)
class Installed:
    """What a set of extras takes: as pip leaves it, and without byte code nobody asked for."""

    environment: Environment
    packages: int
    compiled_mb: float
    lean_mb: float


def measure(options: Options) -> list[Claim]:
    """What a device pays: installed size, import time, and memory in its three ways of life.

    Devices live in environments of their own with the extras they need; the training one alone
    uses the environment this runs in, for its torch.
    """
    flower = flower_environment(options)
    installed = {extras: _install(options, extras) for extras in DISK_GOALS_MB}
    claims = _disk_claims(installed, flower)
    claims += _import_claims(options, installed, flower)
    found = measure_residents(
        options,
        idle=installed["edge"].environment,
        inferring=installed["edge,infer"].environment,
        flower=flower,
    )
    return claims + _memory_claims(found, flower)


def _install(options: Options, extras: str) -> Installed:
    name = f"device-{extras.replace(',', '-')}"
    known = find_environment(name)
    if known is None or not (known.folder / "lean_mb").exists() or not options.is_quick:
        options.tell(f"a fresh environment with [{extras}]")
        wanted = [f"{ROOT}[{extras}]"]
        known = make_environment(name, wanted, afresh=True, is_compiled=False)
        known.run(FIRST_RUN[extras])
        (known.folder / "lean_mb").write_text(str(known.installed_mb))
        known.compile()
    else:
        options.tell(f"the environment with [{extras}] is that of the last full run")
    lean_mb = float((known.folder / "lean_mb").read_text())
    return Installed(known, len(known.distributions), known.installed_mb, lean_mb)


def _disk_claims(installed: dict[str, Installed], flower: Environment | None) -> list[Claim]:
    peer = _flower_name(flower)
    flower_mb = flower.installed_mb if flower is not None else None
    flower_packages = len(flower.distributions) if flower is not None else None
    claims = []
    for extras, found in installed.items():
        goal = DISK_GOALS_MB[extras]
        sizes = (
            (f"[{extras}] installed by pip", found.compiled_mb),
            (f"[{extras}] installed by pip --no-compile, and run", found.lean_mb),
        )
        claims += [
            claim(name, size_mb, "MB", peer=peer, peer_value=flower_mb, goal=goal)
            for name, size_mb in sizes
        ]
        claims.append(
            claim(f"[{extras}] packages", found.packages, "", peer=peer, peer_value=flower_packages)
        )
    train_mb = installed_closure_mb("headwater[edge,train]")
    return [*claims, claim("[edge,train] in this environment, with its torch", train_mb, "MB")]


def _import_claims(
    options: Options, installed: dict[str, Installed], flower: Environment | None
) -> list[Claim]:
    options.tell("imports")
    edge, infer = (found.environment for found in installed.values())
    imports: list[tuple[str, Environment, str]] = [
        ("idle agent", edge, "edge_agent.runner"),
        ("inference", infer, "edge_agent.inference"),
    ]
    if flower is not None:
        imports.append(("flower", flower, FLOWER_NODE))
    seconds: dict[str, list[float]] = {name: [] for name, _, _ in imports}
    cpu: dict[str, list[float]] = {name: [] for name, _, _ in imports}
    for _ in range(3 if options.is_quick else 9):
        for name, environment, module in imports:
            wall_s, cpu_s = _time_import(environment, module)
            seconds[name].append(wall_s)
            cpu[name].append(cpu_s)
    return [
        claim(
            f"import of the {name}{what}",
            median(found[name]),
            unit,
            peer=_flower_name(flower),
            peer_value=median(found["flower"]) if "flower" in found else None,
        )
        for name in ("idle agent", "inference")
        for what, unit, found in ((": time", "s", seconds), (": CPU", "CPU s", cpu))
    ]


def _time_import(environment: Environment, module: str) -> tuple[float, float]:
    said = environment.run(
        "import time\nwall, cpu = time.perf_counter(), time.process_time()\n"
        f"import {module}\nprint(time.perf_counter() - wall, time.process_time() - cpu)"
    )
    wall_s, cpu_s = said.split()[-2:]
    return float(wall_s), float(cpu_s)


def _memory_claims(found: dict[str, Resident], flower: Environment | None) -> list[Claim]:
    peer = f"{_flower_name(flower)}, idle SuperNode"
    theirs = found.get("flower")
    if theirs is not None:
        peer += f" ({theirs.memory.processes} processes)"
    values: list[tuple[str, str, Callable[[Resident], float]]] = [
        ("resident (RSS)", "MiB", lambda resident: resident.memory.rss_mb),
        ("its own (USS)", "MiB", lambda resident: resident.memory.uss_mb),
        ("shared in proportion (PSS)", "MiB", lambda resident: resident.memory.pss_mb),
    ]
    claims = [
        claim(
            f"{name} device: {what}",
            value(found[name]),
            unit,
            peer=peer,
            peer_value=value(theirs) if theirs is not None else None,
            goal=MEMORY_GOALS_MB.get(name) if "RSS" in what else None,
        )
        for name in ("idle", "inferring", "training")
        for what, unit, value in values
    ]
    idle = claim(
        "idle device: CPU",
        100 * found["idle"].cpu_share,
        "% of a core",
        peer=peer,
        peer_value=100 * theirs.cpu_share if theirs is not None else None,
        goal=0.2,
    )
    return [*claims, idle]


def _flower_name(flower: Environment | None) -> str:
    return "Flower: left out" if flower is None else f"Flower {flower.version('flwr')}"


if __name__ == "__main__":
    main("footprint", measure)
