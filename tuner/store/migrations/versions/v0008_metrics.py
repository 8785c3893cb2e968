"""Further numbers of an evaluation, and the objective that chose among them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

_COLUMNS = ("metrics", "objective")


def upgrade() -> None:
    """Add the columns; evaluations that are there have the loss alone."""
    for name in _COLUMNS:
        op.add_column("tuner_evaluations", sa.Column(name, sa.Text))


def downgrade() -> None:
    """Drop the columns."""
    for name in _COLUMNS:
        op.drop_column("tuner_evaluations", name)
