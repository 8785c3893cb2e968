"""What each attempt's worker computed with."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column; of earlier attempts nothing is known."""
    op.add_column("tuner_attempts", sa.Column("environment", sa.Text, nullable=False, server_default="{}"))


def downgrade() -> None:
    """Forget it."""
    op.drop_column("tuner_attempts", "environment")
