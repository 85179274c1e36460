"""`headwater-hub teach`: a teacher from mirrored data, and what its students begin with."""

from pathlib import Path
from typing import Annotated

import typer


def teach(
    plan: Annotated[Path, typer.Argument(help="What to teach: a TOML file.")],
    hub: Annotated[
        Path, typer.Option("--hub", help="The hub's file.", envvar="HEADWATER_HUB")
    ] = Path("hub.toml"),
) -> None:
    """Train a teacher on what devices mirror, and prepare their students for a run."""
    from cloud.commands import read_hub
    from cloud.record.registry import Registry
    from cloud.teaching import TeachingPlan, prepare
    from federation.config import read_config
    from twin.mirror import MirrorStore

    folder = read_hub(hub).folder
    wanted = read_config(plan, TeachingPlan)
    mirrors = MirrorStore(folder / "mirrors", is_reader=True)  # The hub may be running.
    found = prepare(wanted, mirrors, Registry(folder))
    lines = [f"# teacher {found.teacher}", f'teaching = "{found.teaching}"', "", "[students]"]
    for device, model in found.students.items():
        sizes = ", ".join(f"{name} = {size}" for name, size in model.sizes.items())
        lines.append(f'{device} = {{ name = "{model.name}", sizes = {{ {sizes} }} }}')
    typer.echo("\n".join(lines))
