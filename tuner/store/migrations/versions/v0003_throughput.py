"""What each worker process has done for a round, and in how many seconds."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table; of earlier work nothing is known."""
    op.create_table(
        "tuner_throughput",
        sa.Column("study", sa.Text, primary_key=True),
        sa.Column("round", sa.Text, primary_key=True),
        sa.Column("session", sa.Text, primary_key=True),
        *(
            sa.Column(f"{name}_seconds", sa.Double, nullable=False)
            for name in ("training", "evaluating", "saving")
        ),
        *(
            sa.Column(name, sa.BigInteger, nullable=False)
            for name in ("passes", "micro_steps", "trial_steps", "tokens", "padded_tokens")
        ),
        sa.Column("peak_memory_bytes", sa.BigInteger, nullable=False),
        sa.ForeignKeyConstraint(["study", "round"], ["tuner_rounds.study", "tuner_rounds.name"]),
    )


def downgrade() -> None:
    """Drop the table."""
    op.drop_table("tuner_throughput")
