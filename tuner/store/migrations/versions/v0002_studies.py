"""Many studies live in one database: every key begins with the study."""

from __future__ import annotations

import json
from collections.abc import Callable

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_NAMES = ("rounds", "trials", "attempts", "evaluations", "checkpoints", "branches", "promotions")


def upgrade() -> None:
    """Give each row the study that the file of its round names."""
    tables = _set_aside()
    _create(tables, _with_study)
    rounds = op.get_bind().execute(sa.text("SELECT name, spec FROM tuner_rounds_aside")).all()
    for name, spec in rounds:
        op.get_bind().execute(
            sa.text(
                "INSERT INTO tuner_rounds SELECT CAST(:study AS TEXT), aside.* "
                "FROM tuner_rounds_aside AS aside WHERE aside.name = :name"
            ),
            {"study": json.loads(spec)["study"], "name": name},
        )
    for table in tables[1:]:
        round_column = "from_round" if table.name == "tuner_promotions" else "round"
        op.execute(
            f"INSERT INTO {table.name} SELECT tuner_rounds.study, aside.* FROM {table.name}_aside AS aside "
            f"JOIN tuner_rounds ON tuner_rounds.name = aside.{round_column}"
        )
    _forget(tables)


def downgrade() -> None:
    """Take the study away; fails where two studies have a round of one name."""
    tables = _set_aside()
    _create(tables, _without_study)
    for table in tables:
        columns = ", ".join(column.name for column in table.columns if column.name != "study")
        op.execute(f"INSERT INTO {table.name} ({columns}) SELECT {columns} FROM {table.name}_aside")
    _forget(tables)


def _set_aside() -> list[sa.Table]:
    """Copy the rows of all tables and drop the tables; as they were, those that others refer to first."""
    metadata = sa.MetaData()
    metadata.reflect(op.get_bind(), only=[f"tuner_{name}" for name in _NAMES])
    for table in metadata.sorted_tables:
        op.execute(f"CREATE TABLE {table.name}_aside AS SELECT * FROM {table.name}")
    metadata.drop_all(op.get_bind())
    return metadata.sorted_tables


def _create(tables: list[sa.Table], add: Callable[[sa.Table, sa.MetaData], sa.Table]) -> None:
    metadata = sa.MetaData()
    for table in tables:
        add(table, metadata)
    metadata.create_all(op.get_bind())


def _with_study(table: sa.Table, metadata: sa.MetaData) -> sa.Table:
    study = sa.Column("study", sa.Text, primary_key=True)
    return sa.Table(table.name, metadata, study, *_columns(table), *_foreign_keys(table, ["study"]))


def _without_study(table: sa.Table, metadata: sa.MetaData) -> sa.Table:
    return sa.Table(table.name, metadata, *_columns(table), *_foreign_keys(table, []))


def _columns(table: sa.Table) -> list[sa.Column[object]]:
    return [
        sa.Column(column.name, column.type, primary_key=column.primary_key, nullable=column.nullable)
        for column in table.columns
        if column.name != "study"
    ]


def _foreign_keys(table: sa.Table, first: list[str]) -> list[sa.ForeignKeyConstraint]:
    """The table's foreign keys, each beginning with these columns."""
    made = []
    for constraint in table.foreign_key_constraints:
        pairs = [(key.parent.name, key.column.name) for key in constraint.elements]
        pairs = [(name, name) for name in first] + [pair for pair in pairs if pair[0] != "study"]
        referred = constraint.referred_table.name
        made.append(
            sa.ForeignKeyConstraint(
                [here for here, _ in pairs], [f"{referred}.{there}" for _, there in pairs]
            )
        )
    return made


def _forget(tables: list[sa.Table]) -> None:
    for table in tables:
        op.drop_table(f"{table.name}_aside")
