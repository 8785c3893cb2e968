"""How trials' best adapters answer prompts, by `evaluation.answers`."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table of answer scores; no earlier trial has one."""
    op.create_table(
        "tuner_answer_scores",
        sa.Column("study", sa.Text, primary_key=True),
        sa.Column("round", sa.Text, primary_key=True),
        sa.Column("trial", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("step", sa.Integer, nullable=False),
        sa.Column("metric", sa.Text, nullable=False),
        sa.Column("mean", sa.Double, nullable=False),
        sa.Column("standard_error", sa.Double),
        sa.Column("num_examples", sa.Integer, nullable=False),
        sa.Column("is_objective", sa.Boolean, nullable=False),
        sa.ForeignKeyConstraint(
            ["study", "round", "trial"],
            ["tuner_trials.study", "tuner_trials.round", "tuner_trials.number"],
        ),
    )


def downgrade() -> None:
    """Drop the answer scores."""
    op.drop_table("tuner_answer_scores")
