"""Nodes of a cluster that joined a round, were lost or were left out."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table; what happened to nodes before is only in the rounds' logs."""
    op.create_table(
        "tuner_node_changes",
        sa.Column("study", sa.Text, primary_key=True),
        sa.Column("round", sa.Text, primary_key=True),
        sa.Column("at", sa.Double, primary_key=True),
        sa.Column("node", sa.Text, primary_key=True),
        sa.Column("change", sa.Text, primary_key=True),
        sa.Column("gpus", sa.Integer, nullable=False),
        sa.Column("reason", sa.Text),
        sa.ForeignKeyConstraint(["study", "round"], ["tuner_rounds.study", "tuner_rounds.name"]),
    )


def downgrade() -> None:
    """Drop the table."""
    op.drop_table("tuner_node_changes")
