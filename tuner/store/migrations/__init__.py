"""How the tables came to be, revision by revision, and how a database is brought up to date."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, Engine, text

from tuner.errors import StorageError
from tuner.installation import installation
from tuner.store.database import UPGRADE_LOCKS, reading, writing
from tuner.store.schema import VERSION_TABLE

_ONE_BY_ONE = text("SELECT pg_advisory_xact_lock(:space, 0)").bindparams(space=UPGRADE_LOCKS)


def configuration() -> Config:
    """Alembic's settings: where the revisions are. The connection goes into its `attributes`."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    return config


@contextmanager
def one_by_one(engine: Engine) -> Iterator[None]:
    """Keep other processes from making tables in a PostgreSQL database meanwhile; a file has one writer."""
    if engine.dialect.name != "postgresql":
        yield
        return
    with engine.connect() as connection, connection.begin():
        connection.execute(_ONE_BY_ONE)
        yield


def upgrade(engine: Engine) -> None:
    """Bring our tables to the newest revision, as a whole or not at all; Optuna's are left alone.

    Raises StorageError when the database was made by a newer version of tuner.
    """
    config = configuration()
    scripts = ScriptDirectory.from_config(config)
    with reading(engine) as connection:
        if _revision(connection) == scripts.get_current_head():
            return
    with writing(engine) as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(_ONE_BY_ONE)
        _refuse_newer(connection, scripts)
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def revision_of(engine: Engine) -> tuple[str | None, str, bool]:
    """Our revision in a database (None: no tables of ours), the newest one known, and whether it is newer."""
    with engine.connect() as connection:
        found = _revision(connection)
    known = {script.revision for script in ScriptDirectory.from_config(configuration()).walk_revisions()}
    return found, newest_revision(), found is not None and found not in known


def newest_revision() -> str:
    """The last revision that this version of tuner knows."""
    newest = ScriptDirectory.from_config(configuration()).get_current_head()
    assert newest is not None
    return newest


def _revision(connection: Connection) -> str | None:
    context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
    return context.get_current_revision()


def _refuse_newer(connection: Connection, scripts: ScriptDirectory) -> None:
    revision = _revision(connection)
    try:
        scripts.get_revision(revision or "base")
    except CommandError as error:
        raise StorageError(
            f"storage: the database has revision {revision}, this version of tuner knows up to "
            f"{scripts.get_current_head()}; it was made by a newer version: {installation().upgrade}"
        ) from error
