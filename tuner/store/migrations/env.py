"""Alembic's way in: runs the revisions on the connection it is handed, counted in our own table."""

from __future__ import annotations

from alembic import context

from tuner.store.schema import METADATA, VERSION_TABLE

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=METADATA,
    version_table=VERSION_TABLE,
)
with context.begin_transaction():
    context.run_migrations()
