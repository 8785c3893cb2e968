"""The first tables: rounds, trials and what they leave."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create all tables."""
    _create_rounds_and_trials()
    _create_what_trials_leave()
    _create_what_rounds_leave()


def downgrade() -> None:
    """Drop all tables, those that refer to others first."""
    for table in ("promotions", "branches", "checkpoints", "evaluations", "attempts", "trials", "rounds"):
        op.drop_table(f"tuner_{table}")


def _create_rounds_and_trials() -> None:
    op.create_table(
        "tuner_rounds",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("max_train_steps", sa.Integer, nullable=False),
        sa.Column("spec", sa.Text, nullable=False),
        sa.Column("begun_at", sa.Double, nullable=False),
        sa.Column("train_rows", sa.Integer, nullable=False),
        sa.Column("eval_rows", sa.Integer, nullable=False),
        sa.Column("workload", sa.Text, nullable=False),
        sa.Column("evaluation_share", sa.Double, nullable=False),
    )
    op.create_table(
        "tuner_trials",
        sa.Column("round", sa.Text, primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("hyperparameters", sa.Text, nullable=False),
        sa.Column("continues", sa.Text),
        sa.Column("optuna_trial", sa.Integer),
        sa.Column("state", sa.Text),
        sa.Column("reason", sa.Text),
        sa.Column("note", sa.Text),
        sa.Column("ended_at", sa.Double),
        sa.ForeignKeyConstraint(["round"], ["tuner_rounds.name"]),
    )


def _create_what_trials_leave() -> None:
    op.create_table(
        "tuner_attempts",
        sa.Column("round", sa.Text, primary_key=True),
        sa.Column("trial", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("from_step", sa.Integer, nullable=False),
        sa.Column("to_step", sa.Integer, nullable=False),
        sa.Column("started_at", sa.Double, nullable=False),
        sa.Column("ended_at", sa.Double),
        sa.Column("outcome", sa.Text),
        sa.Column("message", sa.Text),
        _of_a_trial(),
    )
    op.create_table(
        "tuner_evaluations",
        sa.Column("round", sa.Text, primary_key=True),
        sa.Column("trial", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("step", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("eval_loss", sa.Double, nullable=False),
        sa.Column("train_loss", sa.Double),
        sa.Column("learning_rate", sa.Double),
        sa.Column("clipped_updates", sa.Integer, nullable=False),
        sa.Column("example_nll", sa.LargeBinary, nullable=False),
        sa.Column("example_tokens", sa.LargeBinary, nullable=False),
        _of_a_trial(),
    )
    op.create_table(
        "tuner_checkpoints",
        sa.Column("round", sa.Text, primary_key=True),
        sa.Column("trial", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("kind", sa.Text, primary_key=True),
        sa.Column("step", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("path", sa.Text, nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("sha256", sa.Text, nullable=False),
        sa.Column("removed", sa.Boolean, nullable=False),
        sa.ForeignKeyConstraint(
            ["round", "trial", "attempt"],
            ["tuner_attempts.round", "tuner_attempts.trial", "tuner_attempts.number"],
        ),
    )


def _create_what_rounds_leave() -> None:
    op.create_table(
        "tuner_branches",
        sa.Column("round", sa.Text, primary_key=True),
        sa.Column("trial", sa.Integer, primary_key=True, autoincrement=False),
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
        _of_a_trial(),
    )
    op.create_table(
        "tuner_promotions",
        sa.Column("to_round", sa.Text, primary_key=True),
        sa.Column("from_round", sa.Text, nullable=False),
        sa.Column("plan", sa.Text, nullable=False),
        sa.Column("file_text", sa.Text, nullable=False),
        sa.Column("planned_at", sa.Double, nullable=False),
        sa.ForeignKeyConstraint(["from_round"], ["tuner_rounds.name"]),
    )


def _of_a_trial() -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(["round", "trial"], ["tuner_trials.round", "tuner_trials.number"])
