"""What Alembic runs to find the database and the tables it should have.

The hub hands over a connection. A developer who writes a new step gives a URL instead:
`alembic -x url=sqlite:///scratch.db revision --autogenerate --rev-id 0002 -m "what changes"`.
"""

from typing import Literal

from alembic import context
from sqlalchemy import Connection, create_engine

from cloud.record.tables import Base, Document


def _render(kind: str, item: object, _context: object) -> str | Literal[False]:
    # A new step does not import the tables, which go on changing after it was written.
    return "sa.Text()" if kind == "type" and isinstance(item, Document) else False


def _run(connection: Connection) -> None:
    context.configure(connection=connection, target_metadata=Base.metadata, render_item=_render)
    with context.begin_transaction():
        context.run_migrations()


def _main() -> None:
    connection: Connection | None = context.config.attributes.get("connection")
    if connection is not None:
        _run(connection)
        return
    url = context.get_x_argument(as_dictionary=True)["url"]
    if not isinstance(url, str):
        raise TypeError("give the database once: -x url=...")
    with create_engine(url).connect() as opened:
        _run(opened)


_main()
