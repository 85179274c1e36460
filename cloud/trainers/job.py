"""A training as one process sees it: its place among others, its progress, its result."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.distributed.rendezvous import rendezvous

from cloud.trainers.loop import Place, Step, Watcher
from cloud.trainers.plans import TrainPlan
from cloud.trainers.publishing import publish
from cloud.trainers.running import Result, Setting, run_training
from federation.config import read_config
from federation.datasets.cached import cache_folder
from federation.errors import ConfigError
from federation.protocol.clock import steady_clock

REPORTED_STEPS = 20
"""Every so many steps a line of metrics is written."""


def carry_out(path: Path, out: Path, hub: Path | None, *, as_json: bool) -> None:
    """Train what the file says; rank 0 says what came of it and publishes it.

    Raises:
        HeadwaterError: as `run_training` and `publish`.
    """
    plan = read_config(path, TrainPlan)
    with _joined() as place:
        setting = Setting(out, cache_folder(os.environ), place, _device(place))
        with _reporting(plan, out, place, quiet=as_json) as watchers:
            outcome = run_training(plan, setting, watchers)
        if not place.leads:
            return
        text = msgspec.json.format(msgspec.json.encode(outcome.result), indent=2)
        part = out / "result.json.part"
        part.write_bytes(text + b"\n")
        part.replace(out / "result.json")
        typer.echo(text.decode() if as_json else _told(outcome.result))
        if hub is not None:
            where = publish(plan, outcome.task, outcome.weights, hub, steady_clock()())
            typer.echo(f"published as {where}", err=as_json)


@contextmanager
def _joined() -> Iterator[Place]:
    """This process's place: what torchrun says, or alone.

    Raises:
        ConfigError: torchrun's variables are there in part.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks == 1:
        yield Place()
        return
    missing = [v for v in ("RANK", "MASTER_ADDR", "MASTER_PORT") if v not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {ranks} and {missing[0]} is not set; torchrun sets all of them: start "
            "with torchrun, or without WORLD_SIZE"
        )
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    store, rank, ranks = next(rendezvous("env://"))
    # torchrun keeps one store over its restarts, and in it the addresses of processes that are
    # gone (github.com/pytorch/pytorch/issues/135712): each attempt has keys of its own.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    own = dist.PrefixStore(f"attempt-{attempt}", store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=own, rank=rank, world_size=ranks)
    try:
        yield Place(rank, ranks, dist.group.WORLD, leads=rank == 0)
    finally:
        dist.destroy_process_group()


def _device(place: Place) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", place.rank)))


@contextmanager
def _reporting(plan: TrainPlan, out: Path, place: Place, *, quiet: bool) -> Iterator[list[Watcher]]:
    """What is told of each step: a bar for people, and lines of metrics for machines."""
    if not place.leads:
        yield []
        return
    out.mkdir(parents=True, exist_ok=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True, quiet=quiet or not sys.stderr.isatty())
    with (out / "metrics.jsonl").open("ab") as lines, Progress(*columns, console=console) as bar:
        task = bar.add_task(plan.name)

        def show(step: Step) -> None:
            text = f"{plan.name} loss {step.loss:.4f}"
            bar.update(task, description=text, completed=step.number, total=step.of)

        def note(step: Step) -> None:
            if step.number % REPORTED_STEPS == 0 or step.number == step.of:
                lines.write(msgspec.json.encode(step) + b"\n")
                lines.flush()

        yield [show, note]


def _told(result: Result) -> str:
    state = sum(result.state_bytes.values()) / 1e6
    return (
        f"{result.name}: {result.steps} steps in {result.seconds:.1f} s, test loss "
        f"{result.loss:.4f}, right {100 * result.accuracy:.2f} %, state {state:.1f} MB"
        + (f", {100 * result.kept:.1f} % of the weights live" if result.kept < 1 else "")
    )
