"""`headwater-hub train`, and `headwater-moe train`: alone, or as one of many processes."""

from pathlib import Path
from typing import Annotated

import typer


def train(
    plan: Annotated[
        Path, typer.Argument(help="The training's file, or sotu, kjv-rv, watch or hapt.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of this training; it goes on from there.")],
    hub: Annotated[
        Path | None, typer.Option(help="The hub's folder, to publish the result in.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train a model from hub data; under torchrun every process takes its share."""
    from cloud.trainers.job import carry_out
    from cloud.trainers.ready import find_plan

    carry_out(find_plan(plan), out, hub, as_json=as_json)
