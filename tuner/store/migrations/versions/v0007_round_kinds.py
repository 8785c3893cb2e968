"""What each round is for: earlier versions took a sweep's rounds by their names."""

from __future__ import annotations

import json
import re
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

_SWEPT = re.compile(r"sweep-\d+[bc]?")


def upgrade() -> None:
    """Add the column; a recorded file with a sweep's marks is a sweep's."""
    op.add_column("tuner_rounds", sa.Column("kind", sa.Text, nullable=False, server_default="search"))
    rounds = sa.table("tuner_rounds", *map(sa.column, ("study", "name", "spec", "kind")))
    connection = op.get_bind()
    for study, name, text in connection.execute(
        sa.select(rounds.c.study, rounds.c.name, rounds.c.spec)
    ).all():
        kind = _kind(name, json.loads(text))
        is_round = (rounds.c.study == study) & (rounds.c.name == name)
        connection.execute(sa.update(rounds).where(is_round).values(kind=kind))


def downgrade() -> None:
    """Take it by the name again."""
    op.drop_column("tuner_rounds", "kind")


def _kind(name: str, spec: Any) -> str:
    """A sweep's round is called `sweep-N`, `sweep-Nb` or `sweep-Nc` and evaluates its training rows."""
    data, run = ((spec.get(key) or {}) for key in ("data", "run"))
    train, held_out = ({source["path"] for source in data.get(key) or ()} for key in ("train", "eval"))
    if _SWEPT.fullmatch(name) and data.get("allow_overlap") and train == held_out:
        return "sweep"
    return "dry run" if run.get("engine") == "simulated" else "search"
