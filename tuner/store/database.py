"""A study's database: URL, engine, transactions and errors."""

from __future__ import annotations

import errno
import os
import re
import sqlite3
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

from sqlalchemy import URL, Connection, Engine, NullPool, Pool, create_engine, event, inspect, make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, DBAPIError, DisconnectionError, OperationalError

from tuner.errors import StorageAway, StorageError
from tuner.installation import install_command
from tuner.store.schema import VERSION_TABLE

BUSY_TIMEOUT_SECONDS = 60
CONNECT_TIMEOUT_SECONDS = 10
_RETRY_SECONDS = 0.05
_SERVER = {
    "connect_timeout": CONNECT_TIMEOUT_SECONDS,
    "application_name": "tuner",
    # A network that drops packets without a word is noticed after a minute or two, and not after hours.
    "keepalives_idle": 60,
    "keepalives_interval": 10,
    "keepalives_count": 6,
    "tcp_user_timeout": 120_000,
}
"""Options of a connection to PostgreSQL, where the URL has no others."""

RUN_LOCKS, UPGRADE_LOCKS = 0x74756E65, 0x74756E66
"""First numbers of our advisory locks in PostgreSQL: to run a study, which the second names; to upgrade."""

_REFUSALS = ("42501", "25006")
"""PostgreSQL's codes for missing rights and for a server that only reads; SQLAlchemy takes them for bugs."""

_NOT_THERE = ("42P01", "42703")
"""PostgreSQL's codes for a table and for a column that does not exist."""

_FOR_GOOD = (errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EROFS, errno.ENOENT, errno.EINVAL)
"""What another try does not change."""

_SECRET_OPTIONS = ("password", "passfile", "sslpassword", "sslkey", "oauth_client_secret")
_SQLITE_OPTIONS = frozenset(
    ("timeout", "isolation_level", "detect_types", "check_same_thread", "cached_statements", "uri", "mode")
)

_FORMS = "sqlite:///FILE.db or postgresql+psycopg://USER@HOST/DATABASE"


def parse_url(text: str) -> URL:
    """Return the canonical URL: with its driver, and an absolute path for a file. Raises StorageError.

    No message contains what may be a password, which can stand anywhere in text that is no URL.
    """
    try:
        url = make_url(text)
    except (ArgumentError, ValueError) as error:
        raise StorageError(
            f"storage: {_harmless(text)!r} is not a database URL; write {_FORMS}"
        ) from error.__cause__
    match url.drivername:
        case "sqlite" | "sqlite+pysqlite":
            if not url.database or url.database.startswith((":memory:", "file:")) or url.host:
                raise StorageError("storage: the URL names no file; write sqlite:///FILE.db")
            _refuse_options(url, _SQLITE_OPTIONS)
            return url.set(drivername="sqlite", database=os.path.abspath(url.database))  # noqa: PTH100
        case "postgresql" | "postgres" | "postgresql+psycopg":
            _refuse_options(url, _postgres_options())
            return url.set(drivername="postgresql+psycopg")
        case scheme:
            raise StorageError(f"storage: database type {scheme!r} is not supported; write {_FORMS}")


def _harmless(text: str) -> str:
    """Return text that is no URL without all that may be a secret."""
    return re.sub(r"(?i)(password\w*=).*", r"\1***", re.sub(r":.*@", ":***@", text, flags=re.DOTALL))


def _refuse_options(url: URL, known: frozenset[str]) -> None:
    """Raise StorageError for options that the driver does not have, and would fail on much later."""
    unknown = sorted(name for name in url.query if name not in known)
    if known and unknown:
        raise StorageError(
            f"storage: the URL's option {unknown[0]!r} does not exist; there are {', '.join(sorted(known))}"
        )


@cache
def _postgres_options() -> frozenset[str]:
    """Return the options of a PostgreSQL connection; none if the driver is not installed."""
    try:
        from psycopg.pq import Conninfo
    except ImportError:
        return frozenset()
    return frozenset(option.keyword.decode() for option in Conninfo.get_defaults())


def shown_url(url: str | URL) -> str:
    """Return a URL without its secrets, to show, record or log; text that is no URL is not shown at all."""
    try:
        url = make_url(url)
    except (ArgumentError, ValueError):
        return _harmless(str(url))
    secret = {name: "***" for name in url.query if name in _SECRET_OPTIONS}
    text = url.update_query_dict(secret).render_as_string(hide_password=True)
    return text.replace(quote_plus("***"), "***")


def normal_url(url: str) -> str:
    """Return the URL in a form that is also valid for Optuna. Raises StorageError."""
    return parse_url(url).render_as_string(hide_password=False)


def is_sqlite(url: URL) -> bool:
    """Return whether the database is a file."""
    return url.drivername == "sqlite"


def database_file(url: URL) -> Path:
    """Return the path of an SQLite database."""
    assert url.database is not None
    return Path(url.database)


def exists(url: str) -> bool:
    """Whether there may be facts to read: the file is there, or the server has our tables.

    Creates and changes nothing. Raises StorageError for a URL, or a server, that cannot be used.
    """
    target = parse_url(url)
    if is_sqlite(target):
        with explained(target):
            path = database_file(target)
            _refuse_special(path)
            return path.exists() and path.stat().st_size > 0
    engine = open_engine(target)
    try:
        with explained(target), reading(engine) as connection:
            return inspect(connection).has_table(VERSION_TABLE)
    finally:
        engine.dispose()


def _without_secrets(url: URL, text: str) -> str:
    """Return a driver's message without the secrets of the URL, should it quote any."""
    secrets = {url.password, *(url.query.get(name) for name in _SECRET_OPTIONS)}
    for secret in secrets:
        if isinstance(secret, str) and len(secret) > 2:
            text = text.replace(secret, "***").replace(quote_plus(secret), "***")
    return text


def open_engine(url: URL, *, poolclass: type[Pool] | None = None, **connect_args: Any) -> Engine:
    """Return an engine, not connected yet. Raises StorageError if the driver is missing."""
    if is_sqlite(url):
        # The driver begins no transactions, or it would begin them late, and none for reads.
        engine = create_engine(
            url,
            poolclass=poolclass,
            connect_args={"timeout": BUSY_TIMEOUT_SECONDS, "isolation_level": None, **connect_args},
        )
        _follow_file(engine, database_file(url))
        event.listen(engine, "connect", _set_up_sqlite)
        event.listen(engine, "begin", _begin_in_sqlite)
        return engine
    try:
        engine = create_engine(url, poolclass=poolclass, **engine_arguments(url, **connect_args))
        # First: SQLAlchemy's own look at a new connection fails on text that is not UTF-8.
        event.listen(engine, "connect", lambda made, _: _refuse_encoding(url, made), insert=True)
        return engine
    except ImportError as error:
        raise StorageError(
            f"storage: {shown_url(url)} needs a driver that is not installed ({error}); "
            f"{install_command('postgres')}"
        ) from error


def engine_arguments(url: URL, **connect_args: Any) -> dict[str, Any]:
    """Return the arguments of `create_engine` that let it wait for a busy file, or notice a lost server."""
    if is_sqlite(url):
        return {"connect_args": {"timeout": BUSY_TIMEOUT_SECONDS}}
    chosen = {name: value for name, value in (_SERVER | connect_args).items() if name not in url.query}
    return {"pool_pre_ping": True, "connect_args": chosen}


def optuna_arguments(url: str) -> dict[str, Any]:
    """Return the same for the tables of Optuna in the database at a URL."""
    return engine_arguments(parse_url(url))


def _follow_file(engine: Engine, path: Path) -> None:
    """Let connections use the file that has the name now, and never create one.

    SQLite would keep writing to a file that was deleted or replaced, and those writes would be lost.
    """

    def inode() -> int:
        try:
            return path.stat().st_ino
        except FileNotFoundError:
            raise OSError(errno.ESTALE, "the file is gone; put it back") from None

    def refuse_missing(*_: Any) -> None:
        inode()

    def remember(_: Any, record: Any) -> None:
        record.info["inode"] = inode()

    def refuse_replaced(_: Any, record: Any, __: Any) -> None:
        if inode() != record.info["inode"]:
            raise DisconnectionError(f"{path} was replaced")

    event.listen(engine, "do_connect", refuse_missing)
    event.listen(engine, "connect", remember)
    event.listen(engine, "checkout", refuse_replaced)


def _refuse_encoding(url: URL, connection: Any) -> None:
    """Raise StorageError for a PostgreSQL database whose text is not UTF-8."""
    encoding = connection.info.parameter_status("server_encoding")
    if encoding != "UTF8":
        raise StorageError(
            f"storage: {shown_url(url)}: the encoding of this database is {encoding}, and tuner needs UTF8. "
            "Create another one with: createdb --encoding UTF8 --template template0 NAME"
        )


def _set_up_sqlite(connection: Any, _record: Any) -> None:
    connection.execute("PRAGMA foreign_keys=ON")
    # WAL, so that readers and the writer never wait for each other. FULL, so that a fact is on the disk
    # before anyone acts on it: NORMAL survives kill -9 too, but a power cut could take back the fact
    # that a checkpoint has a successor after its file was deleted. It costs a sync for each record.
    connection.execute("PRAGMA synchronous=FULL")
    _switch_to_wal(connection)


def _switch_to_wal(connection: sqlite3.Connection) -> None:
    """Switch the file's journal; of several that do so at once SQLite refuses some without waiting."""
    until = time.monotonic() + BUSY_TIMEOUT_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
        time.sleep(_RETRY_SECONDS)


def _begin_in_sqlite(connection: Connection) -> None:
    # A writer that begins as a reader fails at once, whatever the timeout, when another wrote meanwhile.
    writes = connection.get_execution_options().get("tuner_writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """Open a connection whose statements all see the same snapshot of the database."""
    with engine.connect() as connection:
        if connection.dialect.name == "postgresql":
            connection = connection.execution_options(isolation_level="REPEATABLE READ")
        with connection.begin():
            yield connection


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """Open a connection in a transaction that is committed as a whole, or not at all."""
    with engine.connect() as connection, connection.execution_options(tuner_writes=True).begin():
        yield connection


@contextmanager
def whole_or_absent(url: URL) -> Iterator[None]:
    """Create the database file if it does not exist, and remove it again if the block fails.

    Raises StorageError where none can be created, or where the one that is there cannot be written.
    """
    if not is_sqlite(url):
        yield
        return
    path = database_file(url)
    with explained(url):
        created = _create_file(path)
    with ExitStack() as undo:
        if created:
            for suffix in ("", "-wal", "-shm", "-journal"):
                undo.callback(Path(f"{path}{suffix}").unlink, missing_ok=True)
        yield
        undo.pop_all()


def _create_file(path: Path) -> bool:
    """Create the file if needed, and return whether it was created."""
    # One that exists is not opened here: closing it would drop the locks that SQLite and Optuna hold on
    # it in this process.
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
    except FileExistsError:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a directory, not a database") from None
        _refuse_special(path)
        for needed in (path, path.parent):
            if not _may(needed, os.R_OK | os.W_OK):
                raise PermissionError(errno.EACCES, f"{needed} is not writable") from None
        return False
    return True


def _refuse_special(path: Path) -> None:
    """Raise OSError for what SQLite would wait for without end."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.EINVAL, "is a pipe or a device, not a database")


def _may(path: Path, rights: int) -> bool:
    return os.access(path, rights, effective_ids=os.access in os.supports_effective_ids)


def is_only_readable(url: URL) -> bool:
    """Return whether the database is a file that this user may read but not write."""
    if not is_sqlite(url):
        return False
    path = database_file(url)
    return _may(path, os.R_OK) and not (_may(path, os.W_OK) and _may(path.parent, os.W_OK))


def read_only(url: URL) -> sqlite3.Connection:
    """Connect without leaving files behind: a read-only connection cannot delete its own journal."""
    file = database_file(url)
    mode = "mode=ro" if Path(f"{file}-wal").exists() else "immutable=1"
    return sqlite3.connect(f"{file.as_uri()}?{mode}", uri=True, isolation_level=None)


def open_read_only(url: URL) -> Engine:
    """Return an engine that reads a file which cannot be written; it connects anew each time."""

    def begin(connection: Connection) -> None:
        if connection.get_execution_options().get("tuner_writes", False):
            raise refusal_of(url, "is not writable")
        connection.exec_driver_sql("BEGIN")

    engine = create_engine("sqlite://", poolclass=NullPool, creator=lambda: read_only(url))
    event.listen(engine, "begin", begin)
    return engine


def refuse_encoding(url: URL, connection: Connection) -> None:
    """Raise StorageError for a PostgreSQL database that does not keep every text."""
    if connection.dialect.name != "postgresql":
        return
    encoding = connection.exec_driver_sql("SHOW server_encoding").scalar()
    if encoding != "UTF8":
        raise refusal_of(
            url,
            f"the database has the encoding {encoding}, and tuner needs UTF8; create one with: "
            f"CREATE DATABASE {url.database} ENCODING 'UTF8' TEMPLATE template0",
        )


def explained_at(url: str) -> AbstractContextManager[None]:
    """Return `explained` for a URL as text."""
    return explained(parse_url(url))


@contextmanager
def explained(url: URL) -> Iterator[None]:
    """Convert errors caused by the machine or the user to StorageError; let bugs pass.

    Those that another try may not meet become StorageAway.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, FileNotFoundError) and is_sqlite(url):
            raise refusal_of(url, f"there is no directory {database_file(url).parent}") from error
        kind = StorageError if error.errno in _FOR_GOOD else StorageAway
        raise refusal_of(url, error.strerror or str(error), kind=kind) from error
    except DBAPIError as error:
        refused = getattr(error.orig, "sqlstate", None) in _REFUSALS
        is_damaged = _lacks_a_table(error)
        is_away = not is_damaged and (isinstance(error, OperationalError) or error.connection_invalidated)
        if not is_away and type(error) is not DatabaseError and not refused and not is_damaged:
            raise
        kind = StorageAway if is_away else StorageError
        raise refusal_of(url, " ".join(str(error.orig).split()), kind=kind) from error


def _lacks_a_table(error: DBAPIError) -> bool:
    """Return whether somebody has removed a table or a column that the statement names."""
    found = error.orig
    if isinstance(found, sqlite3.OperationalError):
        return re.match("no such (table|column)|table .* has no column", str(found)) is not None
    return getattr(found, "sqlstate", None) in _NOT_THERE


def refusal_of(url: URL, reason: str, *, kind: type[StorageError] = StorageError) -> StorageError:
    """Return the error of a database that cannot be used, with what to do where that is known."""
    place = str(database_file(url)) if is_sqlite(url) else f"storage: {shown_url(url)}"
    reason = _without_secrets(url, reason)
    advice = ""
    if "malformed" in reason or "damaged" in reason:
        advice = (
            "; the file is damaged: put a copy of it back, or save what can be read with "
            "`sqlite3 FILE .recover | sqlite3 NEW`"
        )
    elif re.search("no such (table|column)|has no column|(relation|column) .* does not exist", reason):
        advice = "; somebody has removed it: restore a copy of the database"
    elif "not a database" in reason:
        advice = "; `storage` must name a database of tuner or Optuna, or a file that does not exist yet"
    elif re.search("not writable|Permission denied|Read-only file system", reason):
        advice = "; make it writable, or copy the study's folder to where you may write"
    elif "disk I/O" in reason or "disk is full" in reason:
        # "disk I/O error" is what SQLite says, too, where it cannot make its journal.
        advice = "; is the disk full? Free some space there"
    elif kind is StorageAway and not is_sqlite(url):
        advice = "; see that the server runs, and that `storage` has its host, port, user and database"
    return kind(f"{place}: {reason}{advice}")
