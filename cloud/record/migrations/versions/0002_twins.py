"""The tables of the twins: shadows, their history, and what forecasts came to."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Take the step."""
    op.create_table(
        "twins",
        sa.Column("device", sa.Text(), primary_key=True),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.Column("desired_version", sa.BigInteger(), nullable=False),
        sa.Column("modified_at", sa.Double(), nullable=False),
        sa.Column("shadow", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
    )
    op.create_index("ix_twins_desired_version", "twins", ["desired_version"])
    for table, document in (("twin_changes", "change"), ("twin_snapshots", "shadow")):
        op.create_table(
            table,
            sa.Column("device", sa.Text(), sa.ForeignKey("twins.device"), primary_key=True),
            sa.Column("revision", sa.BigInteger(), autoincrement=False, primary_key=True),
            sa.Column("received_at", sa.Double(), nullable=False),
            sa.Column(document, sa.Text(), nullable=False),
        )
    _create_forecasts()


def downgrade() -> None:
    """Take it back."""
    for table in (
        "twin_following",
        "twin_forecasts",
        "twin_snapshots",
        "twin_changes",
        "twins",
    ):
        op.drop_table(table)


def _create_forecasts() -> None:
    op.create_table(
        "twin_forecasts",
        sa.Column("run", sa.Text(), primary_key=True),
        sa.Column("round", sa.BigInteger(), autoincrement=False, primary_key=True),
        sa.Column("device", sa.Text(), primary_key=True),
        sa.Column("asked_at", sa.Double(), nullable=False),
        sa.Column("outcome", sa.Text()),
        sa.Column("trial", sa.Text(), nullable=False),
        sa.Column("forecast", sa.Text()),
    )
    op.create_index("ix_twin_forecasts_device_asked_at", "twin_forecasts", ["device", "asked_at"])
    op.create_index("ix_twin_forecasts_outcome", "twin_forecasts", ["outcome"])
    op.create_table(
        "twin_following",
        sa.Column("id", sa.Integer(), autoincrement=False, primary_key=True),
        sa.Column("event", sa.BigInteger(), nullable=False),
        sa.Column("fleet", sa.Text(), nullable=False),
    )
