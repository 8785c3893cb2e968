"""Decay branches as they are run, scores on `data.test`, and correct tokens of evaluations."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Replace the table of branches, into which no earlier version wrote, and create that of scores.

    How many tokens were correct in earlier evaluations is not known.
    """
    op.add_column("tuner_evaluations", sa.Column("correct_tokens", sa.BigInteger))
    op.drop_table("tuner_branches")
    _create_for_trials(
        "tuner_branches",
        sa.Column("max_train_steps", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("from_step", sa.Integer, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("reason", sa.Text),
        sa.Column("attempts", sa.Text, nullable=False),
        sa.Column("checkpoint", sa.Text, nullable=False),
        sa.Column("evaluation", sa.Text, nullable=False),
    )
    _create_for_trials(
        "tuner_final_scores",
        sa.Column("step", sa.Integer, nullable=False),
        sa.Column("loss", sa.Double, nullable=False),
        sa.Column("standard_error", sa.Double),
        sa.Column("num_examples", sa.Integer, nullable=False),
        sa.Column("num_tokens", sa.BigInteger, nullable=False),
        sa.Column("rows", sa.Text, nullable=False),
        sa.Column("scored_at", sa.Double, nullable=False),
    )


def downgrade() -> None:
    """Drop the scores and the correct tokens; branches begin anew."""
    op.drop_column("tuner_evaluations", "correct_tokens")
    op.drop_table("tuner_final_scores")
    op.drop_table("tuner_branches")
    _create_for_trials(
        "tuner_branches",
        sa.Column("max_train_steps", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("decay_steps", sa.Integer, nullable=False),
        sa.Column("from_step", sa.Integer, nullable=False),
        sa.Column("executed_steps", sa.Integer, nullable=False),
        sa.Column("state", sa.Text),
        sa.Column("reason", sa.Text),
        sa.Column("ended_at", sa.Double),
        sa.Column("eval_loss", sa.Double),
        sa.Column("example_nll", sa.LargeBinary),
        sa.Column("example_tokens", sa.LargeBinary),
    )


def _create_for_trials(name: str, *columns: sa.Column[object]) -> None:
    op.create_table(
        name,
        sa.Column("study", sa.Text, primary_key=True),
        sa.Column("round", sa.Text, primary_key=True),
        sa.Column("trial", sa.Integer, primary_key=True, autoincrement=False),
        *columns,
        sa.ForeignKeyConstraint(
            ["study", "round", "trial"],
            ["tuner_trials.study", "tuner_trials.round", "tuner_trials.number"],
        ),
    )
