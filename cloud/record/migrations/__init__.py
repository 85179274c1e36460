"""How the tables came to be, step by step, and the way from any step to the newest."""

from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection, inspect, text

if TYPE_CHECKING:
    from alembic.config import Config

HEAD = "0002"
"""The newest revision. Known here so that a start with nothing to do needs no Alembic."""


def revision_of(connection: Connection) -> str | None:
    """The revision a database is at; None where it has no tables of ours."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    found: str | None = connection.scalar(text("SELECT version_num FROM alembic_version"))
    return found


def configuration(connection: Connection | None = None) -> "Config":
    """Alembic's configuration for the steps in this folder, wherever it is installed."""
    from alembic.config import Config

    config = Config()
    folder = str(Path(__file__).parent).replace("%", "%%")
    config.set_main_option("script_location", folder)
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def upgrade(connection: Connection) -> None:
    """Bring a database to the newest revision, within the connection's transaction.

    Raises:
        alembic.util.CommandError: the database is at a revision that is not known here.
    """
    from alembic import command

    command.upgrade(configuration(connection), "head")
